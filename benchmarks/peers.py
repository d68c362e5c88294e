#!/usr/bin/env python3
"""chalot beside other engines: one checkpoint, the same threads and depths, in turn.

    python benchmarks/peers.py --envs FOLDER [--model qwen2.5-1.5b]
    python benchmarks/peers.py --quick --envs FOLDER         # does every side run here?
    python benchmarks/peers.py --table results/peers.jsonl [--into ../docs/performance.md]

Each side is a process of its own. A round measures the machine's read loops, then asks every side
for the same work; the next round starts with the next side. On all sides the clock runs around the
forward pass alone, as far as the engine lets it. The checkpoint has random weights in a known
model's shape (make_models.py), so losses are measured elsewhere (quality.py) and shown beside.

Prints a table and appends one line to results/peers.jsonl.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from machine import HERE, OthersWork, ReadBandwidth, describe_machine, provenance
from make_models import SHAPES, UNUSED_TAIL
from report import Rounds, into, summarise, table
from sides import ENGINES, PATH_OPTIONS, SETS, Prepared, prepare, say
from worker import Worker, WorkerError

SETTLE_SECONDS = 0.3  # OpenMP's threads spin for 0.2 s after their last work
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Part:
    """Work that a side does in one request."""

    prompt: int  # tokens before the first timed one
    tokens: int = 0  # decoded after it
    step: int = 1  # of them in one forward pass
    fresh: bool = False  # the prompt is read from empty, and that is what is timed
    neighbours: int = 0  # processes that want a core meanwhile


# task -> its parts. What is compared is in one task: its sides take turns within each round.
TASKS = {
    "decode": {"decode": Part(32, 32)},
    "depth": {"decode at depth": Part(4096, 16)},
    "prefill": {"prefill": Part(512, fresh=True)},
    "long": {"short prefill": Part(512, fresh=True), "long prefill": Part(8192, fresh=True)},
    "verify": {"one a step": Part(32, 16), "four a step": Part(32, 64, step=4)},
    "neighbour": {"decode alone": Part(32, 32), "with a neighbour": Part(32, 32, neighbours=1)},
}


def serve_command(side: Prepared, options: argparse.Namespace, context: int) -> list[str]:
    command = [side.python, "-m", ENGINES[side.engine].module, "serve", str(side.file)]
    command += ["--threads", str(options.threads), "--context", str(context)]
    for name, value in side.side.settings:
        command += ["--set", name, value]
    return command


def scaled(part: Part, options: argparse.Namespace) -> Part:
    """Depths of --quick are an eighth."""
    if not options.quick or part.prompt < 256:
        return part
    return replace(part, prompt=part.prompt // 8)


def request(part: Part, model: str, seed: int) -> dict[str, Any]:
    """What every side is asked; the time does not depend on which ids they are."""
    rng = random.Random(seed)
    usable = SHAPES[model].vocabulary - UNUSED_TAIL
    ids = [rng.randrange(usable) for _ in range(part.prompt + part.tokens)]
    prompt, tokens = ids[: part.prompt], ids[part.prompt :]
    return {"prompt": prompt, "tokens": tokens, "step": part.step, "fresh": part.fresh}


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """That many processes spin."""
    spinning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        time.sleep(SETTLE_SECONDS if spinning else 0)
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def ask(worker: Worker, part: Part, model: str, number: int) -> dict[str, Any]:
    """One part of a round; a prompt that is to be read from empty is another one in each."""
    with busy(part.neighbours):
        return worker.ask(request(part, model, number if part.fresh else 0))


def take_turns(
    workers: dict[str, Worker], parts: dict[str, Part], reads: ReadBandwidth,
    options: argparse.Namespace,
) -> tuple[Rounds, list[dict[str, float]], dict[str, str]]:  # fmt: skip
    """Rounds of all parts by every side, the read loops of each, and the sides that failed.

    The first round, which fills memory and caches, is not kept; nor is a side that fails in any.
    """
    rounds, bandwidth, failed = [], [], {}
    for number in range(options.rounds + 1):
        names = [name for name in workers if name not in failed]
        first = number % max(1, len(names))
        time.sleep(SETTLE_SECONDS)
        bandwidth.append(reads.measure())
        turns: dict[str, dict[str, Any]] = {}
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE_SECONDS)
            try:
                turns[name] = {
                    part: ask(workers[name], what, options.model, number)
                    for part, what in parts.items()
                }
            except WorkerError as problem:
                failed[name] = str(problem)
                say(f"left out: {problem}")
        rounds.append(turns)
        say(f"round {number}/{options.rounds}")
    kept = [{name: turn[name] for name in workers if name not in failed} for turn in rounds[1:]]
    return kept, bandwidth[1:], failed


def measure_task(
    task: str, sides: list[Prepared], reads: ReadBandwidth, options: argparse.Namespace
) -> dict[str, Any]:
    """One task: start its sides, take turns, end them."""
    parts = {name: scaled(part, options) for name, part in TASKS[task].items()}
    context = max(part.prompt + part.tokens for part in parts.values()) + 8
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for side in sides:
            log = options.work / "logs" / f"serve-{options.model}-{task}-{side.name}.log"
            try:
                worker = Worker(side.name, serve_command(side, options, context), log)
            except WorkerError as problem:
                failed[side.name] = str(problem)
                say(f"left out of {task}: {problem}")
                continue
            workers[side.name] = stack.enter_context(worker)
        rounds, bandwidth, fell = take_turns(workers, parts, reads, options)
        failed |= fell
        resident = {name: worker.resident_bytes() for name, worker in workers.items()}
    ready = {name: worker.ready for name, worker in workers.items() if name not in failed}
    ours = [s.name for s in sides if s.engine == "chalot" and s.name in ready]
    found = summarise(rounds, bandwidth, {n: vars(p) for n, p in parts.items()}, ready, ours)
    for name, summary in found["sides"].items():
        summary["resident_bytes"] = resident[name]
    return {**found, "failed": failed, "ready": ready}


def measured_losses() -> dict[str, dict[str, Any]]:
    """form -> model -> its row of the last quality.py run."""
    file = RESULTS / "quality.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    losses: dict[str, dict[str, Any]] = {}
    for line in lines:  # later runs replace earlier ones, form by form
        run = json.loads(line)
        for row in run["rows"]:
            kept = {key: row[key] for key in ("kl", "kl_error")} | {"date": run["date"]}
            losses.setdefault(row["form"], {})[row["model"]] = kept
    return losses


def measure(options: argparse.Namespace) -> dict[str, Any]:
    began = provenance(sys.argv[1:], PATH_OPTIONS)
    sides, missing = prepare(options)
    if not sides:
        raise SystemExit("nothing to measure: no side of --peers can run here")
    reads = ReadBandwidth(options.work / "bin", options.threads)
    tasks: dict[str, Any] = {}
    with OthersWork() as others:
        for task in options.tasks:
            those = [side for side in sides if task in side.side.tasks]
            if those:
                say(f"{task}: {', '.join(side.name for side in those)}")
                tasks[task] = measure_task(task, those, reads, options)
    if others.result.get("others_cpus", 0) > 0.1:
        say(f"not a quiet machine ({others.result}): the figures are too low and spread too wide")
    ready: dict[str, Any] = {}
    for task in tasks.values():
        for name, found in task.pop("ready").items():
            ready.setdefault(name, found)
    losses = measured_losses()
    return {
        "benchmark": "peers",
        **began,
        "machine": {**describe_machine(), **others.result},
        "compiler": reads.compiler,
        "model": options.model,
        "threads": options.threads,
        "sides": {
            side.name: {
                "engine": side.engine, "form": side.side.form,
                "settings": dict(side.side.settings), **ready.get(side.name, {}),
            }
            for side in sides
        },
        "tasks": tasks,
        "missing": missing,
        "loss": {side.name: losses[side.name] for side in sides if side.name in losses},
    }  # fmt: skip


def tabulate(file: Path, page: Path | None) -> str:
    """The tables of the last line of every model, into the page too if there is one."""
    last = {}
    for line in file.read_text().splitlines():
        result = json.loads(line)
        losses = measured_losses()  # those measured since too
        result["loss"] = {side: losses[side] for side in result["sides"] if side in losses}
        last[result["model"]] = result
    text = "\n\n".join(table(result) for result in last.values())
    if page:
        into(page, "table", text)
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=SHAPES, help="whose shapes (default: qwen2.5-0.5b)")
    add("--envs", type=Path, default=Path("envs"),
        help="folder of the other engines' environments: "
        + ", ".join(e.env for e in ENGINES.values() if e.env))  # fmt: skip
    add(
        "--sides",
        choices=SETS,
        default="forms",
        help="forms that people use (default), or every scheme of chalot beside small types",
    )
    add("--peers", nargs="+", default=list(ENGINES), metavar="NAME",
        help=f"engines or single sides (default: all; engines: {', '.join(ENGINES)})")  # fmt: skip
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    add("--rounds", type=int, help="turns of each side (default: 10)")
    add("--threads", type=int, default=2, help="of each side (default: %(default)s)")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "chalot-benchmarks",
        help="folder for models, kept for the next run (default: %(default)s)")  # fmt: skip
    add("--reuse", action="store_true", help="keep chalot's converted files of the last run too")
    add("--quick", action="store_true",
        help="the tiny model, two rounds, an eighth of the depths, nothing saved")  # fmt: skip
    add("--results", type=Path, default=RESULTS / "peers.jsonl")
    add("--no-save", action="store_true", help="print only")
    add("--json", action="store_true", help="print the result as JSON, not as a table")
    add("--table", type=Path, metavar="FILE", help="only print the tables of results")
    add("--into", type=Path, metavar="PAGE", help="with --table: write them into that page")
    options = parser.parse_args()
    engines = SETS[options.sides]
    known = {*ENGINES, *(side for engine in engines.values() for side in engine.sides)}
    for name in options.peers:
        if name not in known:
            parser.error(f"no side is called {name!r}; there are: {', '.join(sorted(known))}")
    options.model = options.model or ("tiny" if options.quick else "qwen2.5-0.5b")
    options.rounds = options.rounds or (2 if options.quick else 10)
    options.work, options.envs = options.work.resolve(), options.envs.absolute()
    return options


def main() -> None:
    options = arguments()
    if options.table:
        print(tabulate(options.table, options.into))
        return
    try:
        result = measure(options)
    except WorkerError as problem:
        raise SystemExit(str(problem)) from None
    line = json.dumps(result)
    print(line if options.json else table(result))
    if not (options.no_save or options.quick):
        options.results.parent.mkdir(parents=True, exist_ok=True)
        with options.results.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
