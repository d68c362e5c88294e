"""What "one scheme for everything" is worth between two schemes' sizes, by where the rest goes.

    python benchmarks/uniform.py --model FOLDER [--model ...]

At 3 bits a weight no scheme has just these bytes: all matrices get the widest that fits, and some
the next wider one. Which? From the first matrix on (as benchmarks/planner.py has it), from the last
on, in random orders; beside the plan of the same bytes. And at the bytes of one scheme for all,
where nothing is left over: that scheme, and the plan. Appends to results/uniform.jsonl.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from chalot.evaluate.report import uncut
from chalot.formats.myai import MyaiFile
from chalot.kernels.backend import open_backend
from chalot.plan.choose import choose, improve
from chalot.plan.losses import DEPTHS
from machine import HERE, provenance
from planner import Subject

BITS = 3.0
WHOLE = ("nl3", "nl4")
ORDERS = 15
RESULTS = HERE / "results" / "uniform.jsonl"


def filled(subject: Subject, budget: int, order: Iterable[int]) -> dict[str, str]:
    """The widest scheme that fits everywhere, and the next wider one by that order of items."""
    ladder = subject.schemes[::-1]
    fits = [s for s in ladder if subject.bytes({i.name: str(s) for i in subject.items}) <= budget]
    plan = {i.name: str(fits[-1]) for i in subject.items}
    for i in order:
        trial = {**plan, subject.items[i].name: str(ladder[len(fits)])}
        plan = trial if subject.bytes(trial) <= budget else plan
    return plan


def measure(folder: Path, threads: int) -> dict[str, Any]:
    """KL on unseen text of one model's plans."""
    with uncut(folder, threads, balance="nl4") as made:
        file = MyaiFile(made)
        subject = Subject(file, folder, open_backend(threads=threads))
        count, rng = len(subject.items), np.random.default_rng(0)
        weights = sum(i.weights for i in subject.items)
        budget = int(weights * BITS / 8)
        orders = [rng.permutation(count).tolist() for _ in range(ORDERS)]
        kl = sorted(subject.result(filled(subject, budget, o))["kl"] for o in orders)
        row = DEPTHS["measured"]
        table = {i.name: row(subject.known, i, subject.schemes) for i in subject.items}

        def planned(size: int) -> dict[str, Any]:
            first = choose(subject.items, table, subject.schemes, size)
            best, _ = improve(subject.known, table, subject.schemes, first, size)
            return subject.result(best.schemes)

        whole = {}
        for scheme in WHOLE:
            same = {i.name: scheme for i in subject.items}
            whole[scheme] = subject.result(same), planned(subject.bytes(same))
        found = {
            "model": folder.name,
            "first_on": subject.result(filled(subject, budget, range(count))),
            "last_on": subject.result(filled(subject, budget, reversed(range(count)))),
            "random_orders": {"median": float(np.median(kl)), "least": kl[0], "greatest": kl[-1]},
            "planned": planned(budget),
            "whole": whole,
        }
        file.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, help="a model's folder")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for folder in map(Path, options.model):
        found = {**provenance(sys.argv[1:], ("--model",)), **measure(folder, options.threads)}
        print(json.dumps(found, indent=1), flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
