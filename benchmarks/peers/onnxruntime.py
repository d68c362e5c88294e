"""onnxruntime-genai as a side of the benchmark.

    python -m peers.onnxruntime make FOLDER OUT int4      (in benchmarks/)
    python -m peers.onnxruntime serve OUT --threads 2 --context 64

The package's own model builder makes the folder: `int4` is its default, blocks of 32 in the tied
table too. The clock of a token runs around generate_next_token, which runs the model and takes the
greedy token; that choice is in it because the package gives no way to leave it out.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime_genai as genai
from onnxruntime_genai import models

from worker import Message, offline, serve, side_arguments


def make(folder: Path, out: Path, form: str) -> None:
    # beside the builder, which imports its own files by their bare names
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder)]
    command += ["-o", str(out), "-p", form, "-e", "cpu", "-c", str(out / "cache")]
    here = Path(next(iter(models.__path__)))
    subprocess.run(command, cwd=here, env=offline(), check=True)


def bytes_read(folder: Path) -> int:
    """Bytes of weights that a token reads: all tensors but the tables of sines and cosines."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return sum(
        int(entry.value)
        for tensor in graph.initializer
        if not tensor.name.startswith(("cos_cache", "sin_cache"))
        for entry in tensor.external_data
        if entry.key == "length"
    )


def cache_bytes(folder: Path) -> int:
    """Bytes of keys and values of a token: float32, as the builder makes them for processors."""
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    heads = decoder["num_hidden_layers"] * decoder["num_key_value_heads"]
    return int(2 * 4 * heads * decoder["head_size"])


def start(arguments: argparse.Namespace) -> tuple[Message, Callable[[Message], Message]]:
    config = genai.Config(str(arguments.model))
    threads = {"intra_op_num_threads": arguments.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = genai.Model(config)
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=arguments.context, do_sample=False)
    held: list[genai.Generator | list[int]] = []

    def answer(request: Message) -> Message:
        prompt, prefill = request["prompt"], None
        if request["fresh"] or not held or held[1] != prompt:
            generator = genai.Generator(model, options)
            begin = time.perf_counter()
            generator.append_tokens(prompt)
            prefill = time.perf_counter() - begin
            held[:] = [generator, prompt]
        generator, seconds = held[0], []
        if request["tokens"]:
            generator.rewind_to(len(prompt) - 1)
            generator.append_tokens(prompt[-1:])
            generator.generate_next_token()  # takes the token of logits that are there
        for _ in request["tokens"]:
            begin = time.perf_counter()
            generator.generate_next_token()
            seconds.append(time.perf_counter() - begin)
        return {"prefill_seconds": prefill, "seconds": seconds}

    ready = {
        "version": f"onnxruntime-genai {genai.__version__}",
        "bytes_per_token": bytes_read(arguments.model),
        "cache_bytes_per_token": cache_bytes(arguments.model),
    }
    return ready, answer


def main() -> None:
    arguments = side_arguments("onnxruntime-genai: make a folder, or answer requests.").parse_args()
    if arguments.verb == "make":
        make(arguments.folder, arguments.out, arguments.form)
    else:
        serve(lambda: start(arguments))


if __name__ == "__main__":
    main()
