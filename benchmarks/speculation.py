#!/usr/bin/env python3
"""What drafting from the text so far gains: acceptance, tokens a pass, speed over plain decoding.

    python benchmarks/speculation.py [--model MODEL.myai] [--tasks editing prose] [--cases 4]
                                     [--tokens 256] [--rounds 5] [--threads N]
                                     [--out benchmarks/results/speculation.jsonl]

A trace is the ids of a prompt and of its answer. Those of prose, code, editing and extraction are
written out (speculation_texts.py); "own" ones are what the bundled model says after the same
prompts, with its default sampling, and greedily. Without --model they run on the bundled model in
nl4. With it they are replayed: the model computes every pass, and every candidate is ranked, but
the token that is then chosen is the trace's. So a model of random weights in the shapes of a real
one shows what passes cost there, and the trace what is accepted. The bundled tokenizer makes
shorter tokens of prose and JSON than one of 150,000 would.

Plain and drafted decoding take turns, case by case; a figure is the median of the rounds, each the
seconds of all cases plainly over those with drafts, with its range. "Expected" is by what passes of
each size usually cost, whatever else the machine did meanwhile. These costs are learnt from nothing
in the first round, as on a first use. Nothing here checks quality: drafting changes no
token, which is checked on the way where the model that runs is the one that speaks.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import chalot
from chalot.demo import FOLDER
from chalot.engine import sampler
from chalot.load import Model
from machine import OthersWork, describe_machine, provenance
from speculation_texts import cases

CONTEXT = 1024  # the bundled model's
BARS = {"editing": 1.8, "prose": 0.97}


@dataclass(frozen=True)
class Trace:
    """Ids of a prompt and its answer; `options` are those of the bundled model's own answers."""

    task: str
    prompt: list[int]
    answer: list[int]
    options: dict[str, Any] | None = None


@dataclass
class Task:
    """Sums over the cases of a task; seconds by round."""

    plain: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)
    tokens: int = 0
    passes: int = 0
    tried: int = 0
    kept: int = 0
    cost: float = 0.0

    def row(self) -> dict[str, Any]:
        """As it is kept."""
        ratios = [p / d for p, d in zip(self.plain, self.drafted, strict=True)]
        return {
            "tokens": self.tokens,
            "acceptance": self.kept / max(self.tried, 1),
            "tokens_per_pass": 1 + self.kept / max(self.passes, 1),
            "speed": median(ratios),
            "expected": (self.passes + self.kept) / self.cost,
            "rounds": ratios,
            "plain_seconds": self.plain,
            "drafted_seconds": self.drafted,
        }


def record(model: Model, most: int, tokens: int) -> list[Trace]:
    """All traces: `most` of each task, answers of at most `tokens`."""
    found: dict[str, list[Trace]] = {}
    encode = model.tokenizer.encode
    for case in cases():
        prompt = encode(case.prompt)[-(CONTEXT - tokens) :]
        written = Trace(case.task, prompt, encode(case.answer)[:tokens])
        found.setdefault(case.task, []).append(written)
    for task in ("prose", "code"):
        for trace in found[task][:most]:
            for way, options in (("sampled", {"seed": 1}), ("greedy", {"temperature": 0})):
                with model.session(draft=False, **options) as session:
                    session.prefill(trace.prompt)
                    answer = [session.step() for _ in range(tokens)]
                name = f"own {task}, {way}"
                found.setdefault(name, []).append(Trace(name, trace.prompt, answer, options))
    spread = {task: all_[:: max(1, len(all_) // most)][:most] for task, all_ in found.items()}
    return [trace for traces in spread.values() for trace in traces]


@contextmanager
def replayed(trace: Trace) -> Iterator[None]:
    """Every token is drawn, and then the trace's is taken."""
    text = trace.prompt + trace.answer

    def choose(*given: Any) -> int:
        sampler.choose(*given)
        return text[given[4]]  # the position

    with ExitStack() as patches:
        for module in ("drafting", "generate"):
            patches.enter_context(mock.patch(f"chalot.engine.{module}.choose", choose))
        yield


def decode(model: Model, trace: Trace, speaks: bool, draft: bool) -> Any:
    """The stats of answering `trace`; the model that `speaks` says it by itself."""
    own = speaks and trace.options is not None
    options = (trace.options if own else None) or {"seed": 1}
    with ExitStack() as stack:
        if not own:
            stack.enter_context(replayed(trace))
        session = stack.enter_context(model.session(draft=draft, **options))
        session.prefill(trace.prompt)
        answer = [session.step(left) for left in range(len(trace.answer), 0, -1)]
        assert answer == trace.answer, "drafting has changed a token"
        return session.stats


def measure(model: Model, traces: list[Trace], rounds: int, speaks: bool) -> dict[str, Task]:
    """Both ways in turn, the first of them another one in each round."""
    tasks: dict[str, Task] = {}
    for n in range(rounds):
        for task in {t.task: None for t in traces}:
            tasks.setdefault(task, Task())
            seconds = {False: 0.0, True: 0.0}
            for trace in (t for t in traces if t.task == task):
                for draft in (bool(n % 2), not n % 2):
                    stats = decode(model, trace, speaks, draft)
                    seconds[draft] += stats.decode_seconds
                    if draft:
                        tasks[task].tokens += stats.new_tokens
                        tasks[task].passes += stats.passes
                        tasks[task].tried += stats.drafted
                        tasks[task].kept += stats.accepted
                        tasks[task].cost += stats.cost
            tasks[task].plain.append(seconds[False])
            tasks[task].drafted.append(seconds[True])
        print(f"round {n + 1} of {rounds}", file=sys.stderr, flush=True)
    return tasks


def main() -> None:
    """Print the table, say whether the bars are held, and append a line to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a .myai file that traces are replayed on")
    parser.add_argument("--tasks", nargs="+", help="only these (default: all)")
    parser.add_argument("--cases", type=int, default=4, help="of each task")
    parser.add_argument("--tokens", type=int, default=256, help="most of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", help="a .jsonl file to append to")
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(mock.patch.dict(os.environ, CHALOT_HOME=str(folder / "home")))
        chalot.convert(FOLDER, folder / "bundled.myai", "nl4")
        with chalot.load(folder / "bundled.myai") as bundled:
            traces = record(bundled, given.cases, given.tokens)
        traces = [t for t in traces if not given.tasks or t.task in given.tasks]
        path = given.model or folder / "bundled.myai"
        model = stack.enter_context(chalot.load(path, context=CONTEXT, threads=given.threads))
        others = stack.enter_context(OthersWork())
        found = measure(model, traces, given.rounds, given.model is None)
        name = f"{model.backend.name} on {model.backend.threads} threads"
        costs = {n: round(ratio, 3) for n, ratio in sorted(model.engine.costs.relative.items())}
    rows = {task: figures.row() for task, figures in found.items()}
    print(f"{path.stem}, {name}; passes of several tokens, in passes of one: {costs}")
    print(f"{'task':20} {'kept':>6} {'tokens/pass':>11} {'speed over plain':>24} {'expected':>9}")
    for task, row in rows.items():
        spread = f"{row['speed']:.2f} ({min(row['rounds']):.2f}-{max(row['rounds']):.2f})"
        kept, each = f"{row['acceptance']:6.0%}", f"{row['tokens_per_pass']:11.2f}"
        print(f"{task:20} {kept} {each} {spread:>24} {row['expected']:9.2f}")
    for task, bar in ((t, b) for t, b in BARS.items() if t in rows):
        held = "holds" if rows[task]["speed"] >= bar else "FAILS"
        print(f"{task}: {held} the bar of {bar}")
    if others.result:
        print(f"meanwhile others had {others.result['others_cpus']} of the processors")
    if given.out:
        made = provenance(sys.argv[1:], ("--out", "--model"))
        line = {"what": "speculation", **made, "machine": describe_machine(), **others.result}
        line |= {"model": path.stem, "kernels": name, "costs": costs, "tasks": rows}
        with Path(given.out).open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
