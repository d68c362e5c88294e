"""OpenVINO GenAI as a side of the benchmark.

    python -m peers.openvino make FOLDER OUT int4      (in benchmarks/)
    python -m peers.openvino serve OUT --threads 2 --set INFERENCE_PRECISION_HINT f32

The folder is what optimum-cli exports, with its own defaults for `int4` and `int8`. The pipeline
keeps its defaults too, but for the cache of prefixes, with which a prompt that was read before
would take no time. Every request therefore reads its prompt; seconds of each step are those that
the pipeline reports for inference alone, without the choice of a token.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai

from worker import Message, offline, serve, side_arguments


def make(folder: Path, out: Path, form: str) -> None:
    exporter = Path(sys.executable).parent / "optimum-cli"
    command = [str(exporter), "export", "openvino", "-m", str(folder), "--weight-format", form]
    command += ["--task", "text-generation-with-past", str(out)]
    subprocess.run(command, env=offline(), check=True)


def start(arguments: argparse.Namespace) -> tuple[Message, Callable[[Message], Message]]:
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = max(arguments.context, scheduler.max_num_batched_tokens)
    properties = {"INFERENCE_NUM_THREADS": arguments.threads, **dict(arguments.set)}
    pipeline = genai.LLMPipeline(
        str(arguments.model), "CPU", scheduler_config=scheduler, **properties
    )

    def answer(request: Message) -> Message:
        options = genai.GenerationConfig()
        options.ignore_eos, options.do_sample = True, False
        options.max_new_tokens = 1 + len(request["tokens"])
        prompt = openvino.Tensor(np.array([request["prompt"]], np.int64))
        raw = pipeline.generate(prompt, options).perf_metrics.raw_metrics
        first, *rest = (micro / 1e6 for micro in raw.token_infer_durations)
        if len(rest) != len(request["tokens"]):
            raise RuntimeError(f"{len(rest)} steps reported, {len(request['tokens'])} asked for")
        return {"prefill_seconds": first, "seconds": rest}

    ready = {
        "version": f"openvino-genai {genai.__version__}",
        # the tied table is stored once, and the rest of the file is read whole
        "bytes_per_token": (arguments.model / "openvino_model.bin").stat().st_size,
    }
    return ready, answer


def main() -> None:
    arguments = side_arguments("OpenVINO GenAI: make a folder, or answer requests.").parse_args()
    if arguments.verb == "make":
        make(arguments.folder, arguments.out, arguments.form)
    else:
        serve(lambda: start(arguments))


if __name__ == "__main__":
    main()
