"""What refinement gains: KL to the source of each scheme, plain and refined, at equal bytes.

    python benchmarks/refine.py [--model NAME=FOLDER]... [--schemes nl4 int4] [--windows 40]

The bundled model, its outlier twin, and further folders (tools/train_demo_model.py makes them from
other seeds and sizes) with a heldout.txt each. Calibrated on the bundled text; KL on held-out text;
the runs of 32 tokens that both share are counted. Error bars are standard errors over windows.
Appends a JSON line to results/refine.jsonl.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chalot.calibration_text import CalibrationText
from chalot.convert import convert
from chalot.convert.refining import Refine
from chalot.demo import FOLDER, write_twin
from chalot.errors import SchemeError
from chalot.evaluate import PROTOCOL, compare
from chalot.load import Model
from machine import OthersWork, provenance

METHODS = ("plain", "gptq", "hqq")
SCHEMES = ("nl4", "int4", "nl2", "ternary", "int6", "row4", "row2")
RUN = 32  # tokens that may not be in both texts


def overlap(a: list[int], b: list[int]) -> int:
    """Runs of RUN tokens of b that are in a too."""
    known = {tuple(a[i : i + RUN]) for i in range(len(a) - RUN + 1)}
    return sum(tuple(b[i : i + RUN]) in known for i in range(len(b) - RUN + 1))


def rows(
    name: str, source: Path, held_out: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each scheme and method that applies."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        convert(source, folder / "base.myai", "bf16")
        base = Model(folder / "base.myai", context=1024, kv="f32")
        ids = base.tokenizer.encode(held_out.read_text("utf-8"))[: options.windows * 512]
        shared = overlap(base.tokenizer.encode(CalibrationText.of().words), ids)
        models = []
        for scheme in options.schemes:
            for method in options.methods:
                path, start = folder / f"{scheme}-{method}.myai", time.perf_counter()
                try:
                    convert(
                        source, path, scheme,
                        refine=None if method == "plain" else Refine.of(method),
                    )  # fmt: skip
                except SchemeError:
                    continue  # the method has nothing to gain there
                seconds = round(time.perf_counter() - start, 1)
                row = {"model": name, "scheme": scheme, "method": method, "seconds": seconds}
                found.append(row | {"bytes": path.stat().st_size, "overlap": shared})
                models.append(Model(path, context=1024))
        for row, q in zip(found, compare(base, models, ids)[1:], strict=True):
            row |= {"kl": q.kl, "kl_error": q.kl_error, "same_top": q.same_top}
            plain = next(r for r in found if r["scheme"] == row["scheme"])
            print(
                f"{name:8} {row['scheme']:8} {row['method']:6} {row['bytes']:>11,} bytes  "
                f"KL {q.kl:.5f} +- {q.kl_error:.5f}  {q.kl / plain['kl']:.1%} of plain  "
                f"same top {q.same_top:.2%}  shared runs {shared}  {row['seconds']} s",
                flush=True,
            )
        for model in (base, *models):
            model.close()
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--windows", type=int, default=40, help="of 512 held-out tokens")
    parser.add_argument("--no-save", action="store_true", help="print only")
    return parser.parse_args()


def main() -> None:
    """Every model, scheme and method."""
    options = arguments()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, OthersWork() as others:
        twin = Path(scratch) / "twin"
        write_twin(FOLDER, twin)
        models = [("bundled", FOLDER), ("twin", twin)]
        models += [(n, Path(p)) for n, _, p in (m.partition("=") for m in options.model)]
        for name, source in models:
            held_out = source / "heldout.txt"
            found += rows(
                name, source, held_out if held_out.exists() else FOLDER / "heldout.txt", options
            )
    line = provenance(sys.argv[1:], ("--model",)) | others.result
    line |= {"protocol": str(PROTOCOL), "tokens": options.windows * 512, "rows": found}
    if not options.no_save:
        path = Path(__file__).parent / "results" / "refine.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
