"""chalot as a side of the decode benchmark: the only file here that knows chalot's Python names.

    python -m chalot_side convert FOLDER OUT.myai nl4     (in benchmarks/)
    python -m chalot_side serve MODEL.myai --threads 2 --context 64

A token's time is the native call alone, the counterpart of llama_decode; what Python adds around
it (the batch, a greedy choice, the session) is given beside it.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chalot
from worker import Message, serve


class Timed:
    """A compiled program that notes how long each run takes."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.seconds: list[float] = []

    def run(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        logits = self.program.run(*arguments)
        self.seconds.append(time.perf_counter() - start)
        return logits


def weights_read(model: "chalot.Model") -> dict[str, int]:
    """Bytes of weights that one token reads, by scheme; of an untied embedding it is one row."""
    by_scheme: Counter[str] = Counter()
    for name, entry in model.file.manifest.tensors.items():
        lookup_only = name == "embedding" and not model.config.tied
        by_scheme[entry.scheme] += entry.extent.bytes // (entry.shape[0] if lookup_only else 1)
    return dict(by_scheme)


def decoder(model: "chalot.Model") -> Callable[[Message], Message]:
    timed = model.engine.runnable = Timed(model.engine.runnable)

    def answer(request: Message) -> Message:
        steps = []
        with model.session(temperature=0, repetition_penalty=1) as session:
            session.prefill(request["prompt"])
            session.step()  # chooses from the prompt's logits; the next one runs the program
            prefill = sum(timed.seconds)
            timed.seconds.clear()
            begin = time.perf_counter()
            # Its own greedy ids, not the request's: time does not depend on which they are.
            for _ in request["tokens"]:
                start = time.perf_counter()
                session.step()
                steps.append(time.perf_counter() - start)
            wall = time.perf_counter() - begin
        native = list(timed.seconds)
        timed.seconds.clear()
        host = [step - run for step, run in zip(steps, native, strict=True)]
        return {
            "prefill_seconds": prefill,
            "seconds": native,
            "host_seconds": host,
            "wall_seconds": wall,
        }

    return answer


def start(arguments: argparse.Namespace) -> tuple[Message, Callable[[Message], Message]]:
    model = chalot.load(arguments.model, threads=arguments.threads, context=arguments.context)
    by_scheme = weights_read(model)
    ready = {
        "version": f"chalot {chalot.__version__}",
        "system_info": f"{model.backend.name}, {model.backend.threads} threads",
        "file_bytes": arguments.model.stat().st_size,
        "bytes_per_token": sum(by_scheme.values()),
        "bytes_by_type": by_scheme,
    }
    return ready, decoder(model)


def main() -> None:
    parser = argparse.ArgumentParser(description="chalot: convert, or decode on request.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    converting = verbs.add_parser("convert")
    converting.add_argument("folder", type=Path)
    converting.add_argument("out", type=Path)
    converting.add_argument("scheme")
    serving = verbs.add_parser("serve")
    serving.add_argument("model", type=Path)
    serving.add_argument("--threads", type=int, default=2)
    serving.add_argument("--context", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.verb == "convert":
        chalot.convert(arguments.folder, arguments.out, scheme=arguments.scheme)
    else:
        serve(lambda: start(arguments))


if __name__ == "__main__":
    main()
