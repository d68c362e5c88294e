"""llama.cpp as a side of the decode benchmark, through llama-cpp-python's low-level calls.

    python -m peers.llamacpp quantize F16.gguf OUT.gguf Q4_K_M     (in benchmarks/)
    python -m peers.llamacpp serve MODEL.gguf --threads 2 --context 64

Stock settings: nothing but the context's length and the number of threads is set, and types are
made by llama_model_quantize as the `llama-quantize` tool would. "Q4_0-pure" is that tool's --pure:
no tensor gets a better type than the named one. The clock runs around llama_decode alone: tokens
are given, none is sampled, no text is made.
"""

import argparse
import ctypes
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp

from worker import Message, serve

FLASH = {"auto": -1, "off": 0, "on": 1}
MODEL_BUFFER = re.compile(r"(\S+) model buffer size = +([\d.]+) MiB")
KEPT: list[object] = []  # what llama.cpp points at must outlive the call that gave it


def ggml_version() -> str:
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    base = ctypes.CDLL(str(library))
    words = []
    for function in (base.ggml_version, base.ggml_commit):
        function.restype = ctypes.c_char_p
        words.append(function().decode())
    return " ".join(words)


def quantize(source: Path, out: Path, kind: str) -> None:
    """Write `out` from `source` with file type `kind`, such as Q8_0 or Q4_0-pure."""
    name, _, pure = kind.partition("-")
    file_type = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}", None)
    if file_type is None or pure not in ("", "pure"):
        raise SystemExit(f"this llama.cpp has no type {kind!r}")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.pure = file_type, pure == "pure"
    partial = out.with_suffix(".partial")
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(partial).encode(), ctypes.byref(options)
    )
    if status:
        raise SystemExit(f"llama_model_quantize failed with status {status}; see above")
    partial.replace(out)


def weights_read(path: Path) -> tuple[int, dict[str, int]]:
    """Bytes of weights that one token reads, and of those the bytes by type.

    An embedding table of its own gives one row; a table that is also the head is read whole, once.
    """
    tensors = gguf.GGUFReader(path).tensors
    untied = any(tensor.name == "output.weight" for tensor in tensors)
    by_type: Counter[str] = Counter()
    for tensor in tensors:
        lookup_only = untied and tensor.name == "token_embd.weight"
        rows = int(tensor.shape[-1]) if lookup_only else 1
        by_type[tensor.tensor_type.name] += int(tensor.n_bytes) // rows
    return by_type.total(), dict(by_type)


def collect_buffers() -> dict[str, float]:
    """A dictionary that loading fills: MiB of weights by buffer ("AMX", "CPU_REPACK": repacked)."""
    buffers: dict[str, float] = {}

    @llama_cpp.llama_log_callback
    def log(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        line = text.decode(errors="replace")
        found = MODEL_BUFFER.search(line)
        if found:
            buffers[found[1]] = buffers.get(found[1], 0.0) + float(found[2])
        sys.stderr.write(line)

    llama_cpp.llama_log_set(log, None)
    KEPT.append(log)
    return buffers


def llama_context(arguments: argparse.Namespace) -> ctypes.c_void_p:
    model_options = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(arguments.model).encode(), model_options)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = arguments.context
    options.n_threads = options.n_threads_batch = arguments.threads
    options.flash_attn_type = FLASH[arguments.flash]
    context = model and llama_cpp.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError(f"llama.cpp cannot open {arguments.model}")
    return context


def decoder(context: ctypes.c_void_p) -> Callable[[Message], Message]:
    def decode(ids: list[int]) -> float:
        """Seconds that llama_decode takes to append `ids` and give the last one's logits."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        start = time.perf_counter()
        status = llama_cpp.llama_decode(context, batch)
        seconds = time.perf_counter() - start
        if status:
            raise RuntimeError(f"llama_decode gave status {status}")
        return seconds

    def answer(request: Message) -> Message:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        prefill = decode(request["prompt"])
        start = time.perf_counter()
        seconds = [decode([token]) for token in request["tokens"]]
        wall = time.perf_counter() - start
        return {"prefill_seconds": prefill, "seconds": seconds, "wall_seconds": wall}

    return answer


def start(arguments: argparse.Namespace) -> tuple[Message, Callable[[Message], Message]]:
    size, by_type = weights_read(arguments.model)
    buffers = collect_buffers()
    context = llama_context(arguments)
    ready = {
        "version": f"llama-cpp-python {llama_cpp.__version__}, ggml {ggml_version()}",
        "system_info": llama_cpp.llama_print_system_info().decode().strip(" |"),
        "buffers_mib": buffers,
        "file_bytes": arguments.model.stat().st_size,
        "bytes_per_token": size,
        "bytes_by_type": by_type,
    }
    print("system_info:", ready["system_info"], file=sys.stderr, flush=True)
    return ready, decoder(context)


def main() -> None:
    parser = argparse.ArgumentParser(description="llama.cpp: make a type, or decode on request.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("quantize")
    making.add_argument("source", type=Path)
    making.add_argument("out", type=Path)
    making.add_argument("kind")
    serving = verbs.add_parser("serve")
    serving.add_argument("model", type=Path)
    serving.add_argument("--threads", type=int, default=2)
    serving.add_argument("--context", type=int, default=64)
    serving.add_argument("--flash", choices=FLASH, default="auto")
    arguments = parser.parse_args()
    if arguments.verb == "quantize":
        quantize(arguments.source, arguments.out, arguments.kind)
    else:
        serve(lambda: start(arguments))


if __name__ == "__main__":
    main()
