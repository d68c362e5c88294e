#!/usr/bin/env python3
"""Bytes of files that leave to another one what both hold: `chalot convert --share`.

    python benchmarks/sharing.py SOURCE [--schemes attention=int8 ...]

Beside a file all in nl4, each scheme is made whole and with --share; both must give the same
logits. Appends a JSON line to results/sharing.jsonl.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import chalot
from machine import HERE, provenance

SCHEMES = ["attention=int8", "embedding=int8", "ffn=nl3", "int8"]
IDS = [i * 7 % 1000 for i in range(24)]


def main() -> None:
    """All schemes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base, whole, part = (Path(scratch) / f"{name}.myai" for name in ("nl4", "whole", "part"))
        chalot.convert(options.source, base, "nl4")
        for scheme in options.schemes:
            chalot.convert(options.source, whole, scheme)
            chalot.convert(options.source, part, scheme, share=base)
            with chalot.load(whole) as a, chalot.load(part) as b:
                assert np.array_equal(a.logits(IDS), b.logits(IDS)), scheme
            sizes = {"whole": whole.stat().st_size, "shared": part.stat().st_size}
            rows.append({"scheme": scheme, **sizes})
            print(f"{options.source.name:16} {scheme:16} {sizes['whole']:,} -> {sizes['shared']:,}")
    named = [options.source.name if word == str(options.source) else word for word in sys.argv[1:]]
    line = {**provenance(named, ()), "source": options.source.name, "rows": rows}
    with (HERE / "results" / "sharing.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
