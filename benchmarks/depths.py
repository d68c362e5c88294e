#!/usr/bin/env python3
"""What the first layers know, and what leaving early costs: agreement by depth, KL by margin.

    python benchmarks/depths.py [--tokens 8192] [--scheme nl4] [--picture ../docs/depths.svg]
    python benchmarks/depths.py --shapes speed-0.5b-nl4.myai

The bundled model is converted and calibrated on its held-out text (`chalot calibrate`), whose first
part, of `--tokens`, is then read at each margin against full depth; calibration itself looks at the
second half. With --shapes a file of random weights gives the bounds of speed: every token leaves at
the first border (margin 0), or none does. Prints tables and appends a line to results/depths.jsonl.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

import chalot
from chalot.calibrate import calibrate, picture, render
from chalot.calibrated import MOST_MARGIN, beside
from chalot.convert import convert
from chalot.evaluate.exits import exits
from chalot.evaluate.exits import render as render_exits
from machine import HERE, OthersWork, describe_machine, provenance

DEMO = Path(chalot.__file__).parent / "demo" / "model"
MARGINS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, MOST_MARGIN)


def bundled(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path, text = folder / "demo.myai", DEMO / "heldout.txt"
    convert(DEMO, path, options.scheme)
    found = calibrate(path, text, tokens=options.tokens)
    print(render(found) + "\n")
    if options.picture:
        options.picture.write_text(picture(found.found))
    curve = exits(path, text, MARGINS, tokens=options.tokens)
    print(render_exits(curve))
    said = msgspec.to_builtins(found.found)
    said["short"]["tokens"] = len(said["short"]["tokens"])
    if said["supervisor"]:
        said["supervisor"].pop("weights")
    return {"model": "bundled", "scheme": options.scheme, "calibration": said, **asdict(curve)}


def shapes(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path, text = folder / options.shapes.name, DEMO / "heldout.txt"
    path.symlink_to(options.shapes.resolve())
    found = calibrate(path, text, tokens=256)
    curve = exits(path, text, (0.0, MOST_MARGIN), tokens=64)
    print(render_exits(curve))
    seconds, draft = found.found.seconds, msgspec.to_builtins(found.found.draft)
    beside(path).unlink()
    margins = [{"margin": m.margin, "left": m.left, "speed": m.speed} for m in curve.margins]
    return {"model": path.name, "seconds": seconds, "draft": draft, "margins": margins}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=int, default=8192)
    add("--scheme", default="nl4")
    add("--picture", type=Path)
    add("--shapes", type=Path, help="a file of random weights, for speed alone")
    add("--no-save", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        with OthersWork() as others:
            found = shapes(options, folder) if options.shapes else bundled(options, folder)
    finally:
        shutil.rmtree(folder)
    named = ["--scheme", options.scheme, "--tokens", str(options.tokens)]
    result = {
        "benchmark": "depths",
        **provenance([options.shapes.name] if options.shapes else named, ()),
        "machine": {**describe_machine(), **others.result},
        **found,
    }
    if not options.no_save:
        with (HERE / "results" / "depths.jsonl").open("a") as file:
            file.write(json.dumps(result, default=str) + "\n")


if __name__ == "__main__":
    main()
