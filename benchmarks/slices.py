"""What each part of choosing slices is worth: the bundled model without one part after another.

    python benchmarks/slices.py [--windows 12] [--top 2 4]

Slices (2 shared of 8) in f32, and their KL to the source on held-out text. A part is left out, or
done otherwise, by replacing one function or constant of chalot.upcycle while the slices are chosen.
Appends a JSON line to results/slices.jsonl; --table prints the last run as Markdown.
"""

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from chalot.convert import convert
from chalot.demo import FOLDER
from chalot.evaluate import PROTOCOL, compare
from chalot.load import Model
from chalot.upcycle import Settings, choosing, slices, upcycle
from machine import HERE, OthersWork, describe_machine, provenance

RESULTS = HERE / "results" / "slices.jsonl"
SHORT = {"slices.MOST": 16}  # windows of 256 tokens


def times_marked(shares: choosing.Stored) -> Any:
    """How often each column is among a token's largest: CMoE's choice of the shared ones."""
    return choosing.marked(shares).sum(axis=0).astype(np.float64)


def in_turn(marks: choosing.Marks, groups: int) -> choosing.Indices:
    """The columns dealt out."""
    return np.arange(marks.shape[1]) % groups


def no_router(x: choosing.Floats, given: Any, _: Any) -> choosing.Floats:
    """All groups score the same, and the first are taken."""
    return np.zeros((given.shape[1], x.shape[1]), np.float32)


def shared_by_marks(x: Any, shares: choosing.Stored, shared: int, routed: int, backend: Any) -> Any:
    """`choosing.choose` where only the shared slices are chosen by marks."""
    order = np.argsort(-times_marked(shares), kind="stable")
    width = shares.shape[1] // (shared + routed)
    first = np.sort(order[: shared * width])
    rest = np.setdiff1d(np.arange(shares.shape[1]), first)
    found = choosing.choose(x, np.ascontiguousarray(shares[:, rest]), 0, routed, backend)
    return choosing.Chosen(first, tuple(rest[g] for g in found.groups), found.router)


PARTS: dict[str, dict[str, Any]] = {
    "as it is, by 4,096 tokens": SHORT,
    "by all tokens, as by default": {},
    "shared slices by how often a column is marked, as CMoE has it": SHORT
    | {"slices.choose": shared_by_marks},
    "columns dealt out in turn, no k-means": SHORT | {"choosing.balanced": in_turn},
    "the first slices always, no router": SHORT | {"choosing.router": no_router},
} | {f"{n} steps of the router, not 8, by all tokens": {"choosing.STEPS": n} for n in (2, 4, 16)}
MODULES = {"slices": slices, "choosing": choosing}


def make(changes: dict[str, Any], top: int, path: Path) -> Path:
    """Slices that are chosen with these changes."""
    with ExitStack() as patches:
        for place, by in changes.items():
            module, name = place.split(".")
            patches.enter_context(mock.patch.object(MODULES[module], name, by))
        upcycle(FOLDER, path, Settings(top=top, shared=2, slices=True), scheme="f32")
    return path


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The KL of every part for each number of slices that a token takes."""
    convert(FOLDER, folder / "base.myai", "f32")
    with Model(folder / "base.myai", context=1024, kv="f32") as base:
        ids = base.tokenizer.encode((FOLDER / "heldout.txt").read_text("utf-8"))
        rows = []
        for part, changes in PARTS.items():
            row: dict[str, Any] = {"part": part}
            for top in options.top:
                path = make(changes, top, folder / "slices.myai")
                with Model(path, context=1024, kv="f32") as model:
                    found = compare(base, [model], ids[: options.windows * PROTOCOL.window])[1]
                row[f"top {top}"] = {"kl": found.kl, "error": found.kl_error}
            rows.append(row)
            print(row, file=sys.stderr)
    return rows


def table(run: dict[str, Any]) -> str:
    """The run as Markdown."""
    tops = [name for name in run["rows"][0] if name != "part"]
    lines = [f"| KL | {' | '.join(tops)} |", "|---" + "|---:" * len(tops) + "|"]
    for row in run["rows"]:
        cells = [f"{row[top]['kl']:.3f} ± {row[top]['error']:.3f}" for top in tops]
        lines.append(f"| {row['part']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=12, help="of 512 held-out tokens")
    parser.add_argument("--top", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--table", action="store_true", help="print the last run's table")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULTS.read_text().splitlines()[-1])))
        return
    with tempfile.TemporaryDirectory() as scratch, OthersWork() as others:
        rows = measure(options, Path(scratch))
    run = provenance(sys.argv[1:], ()) | describe_machine() | others.result
    run |= {"protocol": str(PROTOCOL), "tokens": options.windows * PROTOCOL.window, "rows": rows}
    if not options.no_save:
        with RESULTS.open("a") as file:
            file.write(json.dumps(run) + "\n")
    print(table(run))


if __name__ == "__main__":
    main()
