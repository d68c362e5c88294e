#!/usr/bin/env python3
"""Decoding speed of chalot beside llama.cpp: same checkpoint, threads and depth, in turn.

    python benchmarks/decode.py --peer-python PEERS/bin/python

Each side is a process of its own. A round measures the machine's read loops, then lets every side
decode the same number of tokens one at a time after the same prompt; the next round starts with
the next side. The clock runs around the native call alone on both sides. The checkpoint has
random weights in a known model's shape (make_models.py), so nothing here says anything of quality:
losses, measured elsewhere on a trained model, can be handed in with --loss.

Prints a table and appends one line to results/decode.jsonl.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import HERE, OthersWork, ReadBandwidth, describe_machine, provenance
from make_models import SHAPES, UNUSED_TAIL, make
from report import Rounds, summarise, table
from worker import Worker, WorkerError

SETTLE_SECONDS = 0.3  # OpenMP's threads spin for 0.2 s after their last work
PEER_PACKAGES = "llama-cpp-python, gguf"
PATH_OPTIONS = ("--work", "--peer-python", "--results", "--loss")


@dataclass(frozen=True)
class Side:
    """One model file and the command that serves it."""

    name: str
    command: list[str]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_once(made: Path, log: Path, command: list[str], again: bool = False) -> Path:
    """Run `command`, which makes `made`, unless it is there; its output goes to `log`."""
    if made.exists() and not again:
        return made
    say(f"making {made}")
    made.parent.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(command, cwd=HERE, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise SystemExit(f"{' '.join(command)}\nfailed; the end of {log}:\n{tail}")
    return made


def peer_sides(options: argparse.Namespace, folder: Path) -> list[Side]:
    """GGUF files of every wanted type, all from one f16 file, and how to serve them."""
    if not options.peers:
        return []
    python, work, model = options.peer_python, options.work, options.model
    probe = subprocess.run([python, "-c", "import gguf, llama_cpp"], capture_output=True)
    if probe.returncode:
        raise SystemExit(f"{python} lacks {PEER_PACKAGES}: see benchmarks/README.md")
    plain = work / "gguf" / f"{model}-F16.gguf"
    export = [python, "-m", "peers.gguf_export", str(folder), str(plain)]
    run_once(plain, work / "logs" / f"{plain.stem}.log", export)
    sides = []
    for kind in options.peers:
        file = work / "gguf" / f"{model}-{kind}.gguf"
        command = [python, "-m", "peers.llamacpp", "quantize", str(plain), str(file), kind]
        run_once(file, work / "logs" / f"{file.stem}.log", command)
        serve = [python, "-m", "peers.llamacpp", "serve", str(file), "--flash", options.flash]
        sides.append(Side(kind, serve))
    return sides


def chalot_sides(options: argparse.Namespace, folder: Path) -> list[Side]:
    """A .myai file for every wanted scheme, made anew: its bytes change with this repository."""
    sides = []
    for scheme in options.schemes:
        stem = f"{options.model}-{scheme.replace(',', '+')}"
        file = options.work / "chalot" / f"{stem}.myai"
        command = [sys.executable, "-m", "chalot_side", "convert", str(folder), str(file), scheme]
        run_once(file, options.work / "logs" / f"{stem}.log", command, not options.reuse)
        sides.append(Side(scheme, [sys.executable, "-m", "chalot_side", "serve", str(file)]))
    return sides


def requests(options: argparse.Namespace) -> dict[str, list[int]]:
    """The ids that every side sees; the time does not depend on which they are."""
    rng = random.Random(1)
    usable = SHAPES[options.model].vocabulary - UNUSED_TAIL
    ids = [rng.randrange(usable) for _ in range(options.prompt + options.tokens)]
    return {"prompt": ids[: options.prompt], "tokens": ids[options.prompt :]}


def take_turns(
    workers: dict[str, Worker], reads: ReadBandwidth, options: argparse.Namespace
) -> tuple[Rounds, list[dict[str, float]]]:
    request, names = requests(options), list(workers)
    for worker in workers.values():
        worker.ask(request)  # one round to bring every file and buffer into memory
    rounds: Rounds = []
    bandwidth = []
    for number in range(options.rounds):
        first = number % len(names)
        time.sleep(SETTLE_SECONDS)
        bandwidth.append(reads.measure())
        turns = {}
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE_SECONDS)
            turns[name] = workers[name].ask(request)
        rounds.append(turns)
        shown = ", ".join(
            f"{name} {options.tokens / sum(turns[name]['seconds']):.1f}" for name in names
        )
        say(f"round {number + 1}/{options.rounds}: {shown} tokens/s")
    return rounds, bandwidth


def measure(options: argparse.Namespace) -> dict[str, Any]:
    folder = make(options.model, options.work / "models")
    ours, peers = chalot_sides(options, folder), peer_sides(options, folder)
    if not ours + peers:
        raise SystemExit("nothing to measure: name at least one of --schemes and --peers")
    reads = ReadBandwidth(options.work / "bin", options.threads)
    context = options.prompt + options.tokens + 1  # and the token that is chosen last
    limits = ["--threads", str(options.threads), "--context", str(context)]
    workers: dict[str, Worker] = {}
    with OthersWork() as others, contextlib.ExitStack() as stack:
        for side in ours + peers:
            log = options.work / "logs" / f"serve-{options.model}-{side.name}.log"
            worker = Worker(side.name, side.command + limits, log)
            workers[side.name] = stack.enter_context(worker)
        rounds, bandwidth = take_turns(workers, reads, options)
    if others.result.get("others_cpus", 0) > 0.1:
        say(f"not a quiet machine ({others.result}): the figures are too low and spread too wide")
    ready = {name: worker.ready for name, worker in workers.items()}
    names = [side.name for side in ours], [side.name for side in peers]
    return {
        "benchmark": "decode",
        **provenance(sys.argv[1:], PATH_OPTIONS),
        "machine": {**describe_machine(), **others.result},
        "compiler": reads.compiler,
        **{key: getattr(options, key) for key in ("model", "threads", "prompt", "tokens")},
        **summarise(rounds, bandwidth, ready, *names),
        "loss": json.loads(options.loss.read_text()) if options.loss else {},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare decoding with llama.cpp, in turn, on one checkpoint of random weights."
    )
    add = parser.add_argument
    add("--model", choices=SHAPES, default="qwen2.5-0.5b",
        help="whose shapes (default: %(default)s)")  # fmt: skip
    add("--schemes", nargs="*", default=["nl4"], help="chalot's schemes (default: nl4)")
    add("--peers", nargs="*", default=["Q4_0", "Q4_K_M"], metavar="TYPE",
        help="llama.cpp's types, TYPE-pure for its --pure (default: Q4_0 Q4_K_M)")  # fmt: skip
    add("--rounds", type=int, default=10, help="turns of each side (default: %(default)s)")
    add("--threads", type=int, default=2, help="of each side (default: %(default)s)")
    add("--prompt", type=int, default=16, help="tokens before the first timed one (%(default)s)")
    add("--tokens", type=int, default=32, help="timed tokens of a turn (default: %(default)s)")
    add("--flash", choices=("auto", "on", "off"), default="auto",
        help="llama.cpp's flash attention (default: auto, its own choice)")  # fmt: skip
    add("--loss", type=Path, metavar="FILE",
        help='losses to show, as {"nl4": {"kl": 0.01, "error": 0.001}}')  # fmt: skip
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "chalot-benchmarks",
        help="folder for models, kept for the next run (default: %(default)s)")  # fmt: skip
    add("--reuse", action="store_true", help="keep chalot's converted files of the last run too")
    add("--peer-python", default=sys.executable,
        help=f"interpreter that has {PEER_PACKAGES} (default: this one)")  # fmt: skip
    add("--results", type=Path, default=HERE / "results" / "decode.jsonl")
    add("--no-save", action="store_true", help="print only")
    add("--json", action="store_true", help="print the result as JSON, not as a table")
    options = parser.parse_args()
    options.work = options.work.resolve()
    return options


def main() -> None:
    options = arguments()
    try:
        result = measure(options)
    except WorkerError as problem:
        raise SystemExit(str(problem)) from None
    line = json.dumps(result)
    print(line if options.json else table(result))
    if not options.no_save:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        with options.results.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
