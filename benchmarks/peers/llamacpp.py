"""llama.cpp as a side of the benchmark, through llama-cpp-python's low-level calls.

    python -m peers.llamacpp make FOLDER OUT.gguf Q4_K_M     (in benchmarks/)
    python -m peers.llamacpp serve OUT.gguf --threads 2 --context 64 --set flash off

Stock settings: nothing but the context's length and the number of threads is set, unless `flash`
(auto, on, off) or `kv` (f16, q8_0, f32) is given. Types are made from one f16 file beside OUT by
llama_model_quantize, as the `llama-quantize` tool would; "Q4_0-pure" is that tool's --pure: no
tensor gets a better type than the named one. The clock runs around llama_decode alone: tokens are
given, none is sampled, no text is made. A request with "logits" gives every token's logits instead,
saved under that path, for quality.py; one with "text" gives its tokens.
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
import numpy as np

from peers.gguf_export import export
from worker import Message, serve, side_arguments

FLASH = {"auto": -1, "off": 0, "on": 1}
CACHE_TYPES = {name.lower(): gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0")}
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


def make(folder: Path, out: Path, kind: str) -> None:
    """`out` in type `kind`, by way of an f16 file that is kept beside it; "F16" is that file."""
    plain = out.with_name("F16.gguf")
    if not plain.exists():
        export(folder, plain)
    if out != plain:
        quantize(plain, out, kind)


def cache_bytes(path: Path, kind: str) -> int:
    """Bytes of keys and values of one token."""
    fields = gguf.GGUFReader(path).fields
    family = fields["general.architecture"].contents()

    def number(name: str) -> int:
        return int(fields[f"{family}.{name}"].contents())

    heads = number("attention.head_count")
    kv_width = number("embedding_length") // heads * number("attention.head_count_kv")
    block, size = gguf.GGML_QUANT_SIZES[CACHE_TYPES[kind]]
    return 2 * number("block_count") * kv_width * size // block


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


def llama_context(arguments: argparse.Namespace, settings: dict[str, str]) -> ctypes.c_void_p:
    model_options = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(arguments.model).encode(), model_options)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = arguments.context
    options.n_threads = options.n_threads_batch = arguments.threads
    options.flash_attn_type = FLASH[settings["flash"]]
    options.type_k = options.type_v = CACHE_TYPES[settings["kv"]]
    context = model and llama_cpp.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError(f"llama.cpp cannot open {arguments.model} with {settings}")
    return context


class Decoder:
    """Answers requests; keeps the last prompt's keys and values."""

    def __init__(self, context: ctypes.c_void_p) -> None:
        self.context = context
        self.memory = llama_cpp.llama_get_memory(context)
        self.most = llama_cpp.llama_n_batch(context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context))
        )
        self.prompt: list[int] = []

    def decode(self, ids: list[int]) -> float:
        """Seconds that llama_decode takes to append `ids` and give the last one's logits."""
        seconds = 0.0
        for first in range(0, len(ids), self.most):
            part = ids[first : first + self.most]
            tokens = (llama_cpp.llama_token * len(part))(*part)
            batch = llama_cpp.llama_batch_get_one(tokens, len(part))
            start = time.perf_counter()
            status = llama_cpp.llama_decode(self.context, batch)
            seconds += time.perf_counter() - start
            if status:
                raise RuntimeError(f"llama_decode gave status {status}")
        return seconds

    def save_logits(self, ids: list[int], path: str) -> Message:
        """(tokens, vocabulary) float32 as an .npy file."""
        llama_cpp.llama_memory_clear(self.memory, True)
        self.prompt = []
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode gave status {status}")
        found = llama_cpp.llama_get_logits(self.context)
        np.save(path, np.ctypeslib.as_array(found, (len(ids), self.vocabulary)))
        return {}

    def tokens_of(self, text: str) -> Message:
        """Ids of a text in which no special token is looked for; none is added."""
        vocabulary = llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(self.context))
        raw = text.encode()
        out = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), out, len(out), False, False)
        return {"ids": list(out[:count])}

    def answer(self, request: Message) -> Message:
        if "text" in request:
            return self.tokens_of(request["text"])
        prompt, prefill = request["prompt"], None
        if "logits" in request:
            return self.save_logits(prompt, request["logits"])
        if request["fresh"] or self.prompt != prompt:
            llama_cpp.llama_memory_clear(self.memory, True)
            prefill = self.decode(prompt)
            self.prompt = prompt
        start = time.perf_counter()
        seconds = [self.decode([token]) for token in request["tokens"]]
        wall = time.perf_counter() - start
        llama_cpp.llama_memory_seq_rm(self.memory, -1, len(prompt), -1)
        return {"prefill_seconds": prefill, "seconds": seconds, "wall_seconds": wall}


def start(arguments: argparse.Namespace) -> tuple[Message, Callable[[Message], Message]]:
    settings = {"flash": "auto", "kv": "f16", **dict(arguments.set)}
    size, by_type = weights_read(arguments.model)
    buffers = collect_buffers()
    context = llama_context(arguments, settings)
    ready = {
        "version": f"llama-cpp-python {llama_cpp.__version__}, ggml {ggml_version()}",
        "system_info": llama_cpp.llama_print_system_info().decode().strip(" |"),
        "buffers_mib": buffers,
        "file_bytes": arguments.model.stat().st_size,
        "bytes_per_token": size,
        "bytes_by_type": by_type,
        "cache_bytes_per_token": cache_bytes(arguments.model, settings["kv"]),
    }
    print("system_info:", ready["system_info"], file=sys.stderr, flush=True)
    return ready, Decoder(context).answer


def main() -> None:
    arguments = side_arguments("llama.cpp: make a type, or answer requests.").parse_args()
    if arguments.verb == "make":
        make(arguments.folder, arguments.out, arguments.form)
    else:
        serve(lambda: start(arguments))


if __name__ == "__main__":
    main()
