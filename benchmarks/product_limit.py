#!/usr/bin/env python3
"""Prefill against the processor's own limit: products of bytes a second.

    python benchmarks/product_limit.py MODEL.myai [--tokens 512 8192] [--rounds 7] [--threads 2]

A round measures the limit (product_limit.cpp: registers only), then reads each prompt with int8
keys and values. Products are counted: each weight of a layer once a token and plane of its inputs;
of attention a query's two planes with each key that it sees, and its weights' two planes with each
value. What else prefill does (norms, softmax, unpacking, loads) is not counted, and takes time that
the limit does not know. `reachable` is what the longest prompt could keep of the shortest one's
speed if both ran at the limit. Appends a JSON line to results/product_limit.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path

import chalot
from machine import HERE, OthersWork, describe_machine, provenance
from report import shown, spread

PLANES = 2  # of queries, and of attention's weights


def products(model: chalot.Model, tokens: int) -> float:
    """A token's, in the mean over a prompt of so many."""
    config, total = model.config, 0.0
    for name, entry in model.file.manifest.tensors.items():
        if name.startswith("layers.") and len(entry.shape) == 2:
            total += prod(entry.shape) * entry.activation / 8
    for layer in range(config.layers):
        window = config.window(layer) or tokens
        seen = sum(min(i + 1, window) for i in range(tokens)) / tokens
        total += 2 * PLANES * seen * config.heads * config.head_dim
    return total


def main() -> None:
    """All rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    limits: list[float] = []
    speeds: dict[int, list[float]] = {n: [] for n in options.tokens}
    shares: dict[int, list[float]] = {n: [] for n in options.tokens}
    kept: list[float] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        chalot.load(options.model, threads=options.threads, context=max(options.tokens)) as model,
        OthersWork() as work,
    ):
        made = Path(scratch) / "product_limit"
        build = ["c++", "-O2", "-march=native", "-std=c++20", "-pthread"]
        subprocess.run([*build, HERE / "product_limit.cpp", "-o", made], check=True)
        needed = {n: products(model, n) for n in options.tokens}
        instruction = ""
        for turn in range(options.rounds + 1):  # one goes by uncounted
            ran = subprocess.run([made, str(options.threads)], capture_output=True, check=True)
            found = json.loads(ran.stdout)
            instruction, limit = found["instruction"], found["giga_products"] * 1e9
            now = {}
            for n in options.tokens:
                with model.session() as session:
                    session.prefill([i * 7 % 1000 for i in range(n)])
                    now[n] = n / session.stats.prefill_seconds
            if not turn:
                continue
            limits.append(limit / 1e9)
            kept.append(now[options.tokens[-1]] / now[options.tokens[0]])
            for n in options.tokens:
                speeds[n].append(now[n])
                shares[n].append(now[n] * needed[n] / limit)
    first, last = options.tokens[0], options.tokens[-1]
    named = [Path(word).name if word == options.model else word for word in sys.argv[1:]]
    line = {
        **provenance(named, ()), "machine": describe_machine(), **work.result,
        "model": Path(options.model).name, "kernels": model.backend.name,
        "instruction": instruction, "threads": options.threads, "products_a_token": needed,
        "limit_giga_products": spread(limits, 1), "kept": spread(kept),
        "tokens_per_second": {n: spread(speeds[n], 1) for n in speeds},
        "share_of_limit": {n: spread(shares[n]) for n in shares},
        "reachable": round(needed[first] / needed[last], 3),
    }  # fmt: skip
    print(f"{instruction}, {options.threads} threads, 10^9 a second: {shown(spread(limits))}")
    for n in options.tokens:
        print(
            f"{n:6,} tokens: {needed[n] / 1e6:.0f} million products each, "
            f"{shown(spread(speeds[n]), '{:,.0f}')} tokens/s, "
            f"{shown(spread(shares[n]), '{:.2f}')} of the limit"
        )
    print(f"kept {shown(spread(kept), '{:.2f}')}, at the limit {line['reachable']:.2f}")
    if not options.no_save:
        with (HERE / "results" / "product_limit.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
