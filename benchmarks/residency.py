#!/usr/bin/env python3
"""What a budget for weights costs: speed, page faults, resident memory; inside a limit, if it can.

    python benchmarks/residency.py MODEL.myai [--budgets 250MB,150MB,100MB] [--limit 250MB]

Each turn is a process of its own that reads a prompt and generates tokens. Without a budget first;
then with each, and, where this process may make a memory control group (root, v1 or v2), with the
last two again, and without a budget, in a group of `--limit` bytes, page cache and all: the system
then enforces what is said. Swapping is off in it as far as the system allows. Text must be the same
in all turns. Prints a table and appends one line to results/residency.jsonl.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from chalot.table import parse_size, size
from machine import HERE, OthersWork, describe_machine, provenance
from paging import evict, limited

INSIDE = """
import json, os, sys, time
path, budget, keep, tokens, context, group = sys.argv[1:7]
if group:
    open(group + "/cgroup.procs", "w").write(str(os.getpid()))
from importlib import import_module
load = import_module("chalot.load").load
start = time.perf_counter()
keep = [name for name in keep.split(",") if name]
with load(path, context=int(context), budget=int(budget) or None, keep=keep) as model:
    with model.session(temperature=0) as session:
        session.prefill(model.tokenizer.encode("Once upon a time"))
        text = [session.step()]
        first = time.perf_counter() - start
        start, before = time.perf_counter(), model.residence.report()
        text += [session.step() for _ in range(int(tokens))]
        seconds, found = time.perf_counter() - start, model.residence.report()
print(json.dumps({"first": first, "token": seconds / int(tokens), "text": text,
    "waited": (found.waited_seconds - before.waited_seconds) / int(tokens),
    "major": (found.major_faults - before.major_faults) / int(tokens),
    "minor": (found.minor_faults - before.minor_faults) / int(tokens),
    "read": (found.read_bytes - before.read_bytes) / int(tokens),
    "weights": found.weights_bytes, "resident": found.resident_bytes,
    "peak": found.peak_resident_bytes}))
"""


def turn(options: Any, budget: int, group: str = "") -> dict[str, Any]:
    evict(options.model)
    command = [sys.executable, "-c", INSIDE, str(options.model), str(budget), options.keep]
    command += [str(options.tokens), str(options.context), group]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr[-300:] or f"status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout)
    if group:
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if (Path(group) / name).exists():
                found["group_peak"] = int((Path(group) / name).read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", type=Path)
    add("--budgets", default="250MB,150MB,100MB")
    add("--keep", default="", help="regions that stay, of turns with a budget")
    add("--limit", type=parse_size, default="250MB", help="bytes of the control group")
    add("--tokens", type=int, default=16)
    add("--context", type=int, default=512)
    add("--no-save", action="store_true")
    options = parser.parse_args()
    budgets = [parse_size(text) for text in options.budgets.split(",")]
    turns: dict[str, dict[str, Any]] = {}
    with OthersWork() as others:
        for budget in (0, *budgets):
            turns[f"budget {size(budget)}" if budget else "no budget"] = turn(options, budget)
        for budget in (0, *budgets[-2:]):
            name = f"budget {size(budget)}" if budget else "no budget"
            with limited(options.limit) as group:
                inside = f"{name}, inside {size(options.limit)}"
                if group is None:
                    turns[inside] = {"failed": "no control group can be made here"}
                else:
                    turns[inside] = turn(options, budget, group)
    print(f"{'':38}  s first  ms/token  waited  major  minor    MB/token  weights  resident  peak")
    same = {json.dumps(t["text"]) for t in turns.values() if "text" in t}
    for name, t in turns.items():
        if "failed" in t:
            print(f"{name:38}  {t['failed'].strip().splitlines()[-1]}")
            continue
        print(
            f"{name:38}  {t['first']:7.2f}  {t['token'] * 1e3:8.1f}  {t['waited'] * 1e3:6.1f}  "
            f"{t['major']:5.0f}  {t['minor']:5.0f}  {t['read'] / 1e6:10.1f}  "
            f"{t['weights'] / 1e6:7.1f}  {t['resident'] / 1e6:8.1f}  {(t['peak'] or 0) / 1e6:.1f}"
            + (f", group {t['group_peak'] / 1e6:.1f}" if "group_peak" in t else "")
        )
        del t["text"]
    print("the same text everywhere" if len(same) == 1 else "TEXTS DIFFER")
    result = {
        "benchmark": "residency",
        **provenance([options.model.name], ()),
        "machine": {**describe_machine(), **others.result},
        "model": options.model.name,
        "file_bytes": options.model.stat().st_size,
        "keep": options.keep,
        "limit": options.limit,
        "turns": turns,
        "same_text": len(same) == 1,
    }
    if not options.no_save:
        with (HERE / "results" / "residency.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
    if len(same) != 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
