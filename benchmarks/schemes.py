"""What each scheme costs and gives: errors on ideal weights, KL, tokens a second.

    python benchmarks/schemes.py [--parts errors quality products]
    python benchmarks/schemes.py --table docs/schemes.md
    python benchmarks/schemes.py --parts speed --model qwen2.5-1.5b --envs FOLDER

errors   |w' - w|^2 / |w|^2 on N(0, 1) and Student-t5 weights, beside the figures that the schemes
         were designed by; int4 with groups of 16 beside its 32; ternary by BitNet's one scale
quality  every scheme on the bundled model and its outlier twin, as quality.py measures
products one matrix, in the cache, times one token, by one thread, with each instruction set: the
         best of many passes, so that a machine with other work does
speed    decoding of every scheme beside llama.cpp's small types, in turn, as peers.py measures;
         only where it is asked for: it wants a machine that does nothing else

Each part appends a line to results/schemes.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

import quality
from chalot.evaluate import PROTOCOL
from chalot.kernels.backend import Backend, instruction_sets, open_backend
from chalot.quant import coarse, codes
from chalot.quant.grids import tables_of
from chalot.quant.packing import Layout, Matrix, aligned, stored_bytes
from chalot.quant.scheme import SCHEMES, Scheme
from machine import HERE, describe_machine, provenance
from make_models import SHAPES
from report import into, table
from sides import LOW

RESULTS = HERE / "results" / "schemes.jsonl"
CODED = [name for name, scheme in SCHEMES.items() if scheme.is_coded]
ROWS, COLUMNS = 512, 4096
IN_CACHE, PASSES = (2048, 1536), 400  # of products
DESIGNED = {  # computed on ideal weights when the schemes were designed
    "int8": (6e-5, 2.2e-4), "nl4": (.0054, .0071), "int4": (.00653, .0107), "nl2": (.09, .12),
    "ternary": (.190, .274), "ternary, one scale": (.264, .364), "sign": (.364, .459),
}  # fmt: skip
BARS = {"ternary": ("TQ2_0", 2.5), "nl2": ("Q2_K", 2.0)}  # times as fast, on 1.5B


# ---- errors


def relative(w: NDArray[np.float32], again: NDArray[np.float32]) -> float:
    """|w' - w|^2 / |w|^2."""
    lost = again.astype(np.float64) - w
    return float((lost**2).sum() / (w.astype(np.float64) ** 2).sum())


def of_sixteen(w: NDArray[np.float32]) -> NDArray[np.float32]:
    """int4 as it would be with a level for each 16 columns: 4.5 bits instead of 4.25.

    Each 16 columns stand twice in a group of 32, so that its level is theirs alone.
    """
    rows, columns = w.shape
    twice = np.repeat(w.reshape(rows, columns // 16, 1, 16), 2, axis=2).reshape(rows, -1)
    scheme = replace(SCHEMES["int4"], segment=1024)  # of what stands twice: 512 columns
    again = codes.dequantize(codes.quantize(twice, scheme))
    return np.ascontiguousarray(again.reshape(rows, -1, 2, 16)[:, :, 0]).reshape(w.shape)


def again(form: str, w: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is left of weights in a form of `error_rows`."""
    if form == "int4, group 16":
        return of_sixteen(w)
    if form == "ternary, one scale":
        return codes.dequantize(codes.quantize(w, SCHEMES["ternary"], coarse.absmean([w])))
    return codes.dequantize(codes.quantize(w, SCHEMES[form]))


def bits(scheme: Scheme, rows: int, columns: int) -> float:
    """Bits a weight, with all that rows, segments and groups share."""
    return stored_bytes(scheme, rows, columns) * 8 / (rows * columns)


def error_rows() -> Iterator[dict[str, Any]]:
    """A row for each scheme, and for two forms beside them."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    student = rng.standard_t(5, (ROWS, COLUMNS)).astype(np.float32)
    for form in (*CODED, "int4, group 16", "ternary, one scale"):
        size = bits(SCHEMES[form.split(",")[0]], ROWS, COLUMNS)
        size += 0.25 if form == "int4, group 16" else 0
        found = [relative(w, again(form, w)) for w in (normal, student)]
        yield {"form": form, "bits": size, "normal": found[0], "student": found[1],
               "designed": DESIGNED.get(form)}  # fmt: skip


def errors(_: argparse.Namespace) -> dict[str, Any]:
    rows = []
    print(f"{'':20} {'bits':>6}   N(0, 1)  designed  Student t5  designed")
    for row in error_rows():
        first, second = row["designed"] or (None, None)
        cells = [f"{x:.3g}" if x is not None else "-"
                 for x in (row["normal"], first, row["student"], second)]  # fmt: skip
        print("{:20} {:6.3f} {:>9} {:>9} {:>11} {:>9}".format(row["form"], row["bits"], *cells))
        rows.append(row)
    return {"weights": [ROWS, COLUMNS], "rows": rows}


# ---- quality


def kl(options: argparse.Namespace) -> dict[str, Any]:
    forms = {name: quality.Form(name) for name in CODED}
    with mock.patch.dict(quality.FORMS, {**quality.FORMS, **forms}):
        rows, tokens = quality.measure(options.windows, ["bf16", *options.schemes])
    return {"protocol": str(PROTOCOL), "tokens": tokens, "rows": rows}


# ---- products


def random_matrix(scheme: Scheme, rows: int, columns: int) -> Matrix:
    """Codes of all kinds under scales that are ordinary numbers."""
    rng, layout = np.random.default_rng(0), Layout(scheme, rows, columns)
    data = aligned(layout.nbytes)
    codes_end = layout.parts[0].stop
    data[:codes_end] = rng.integers(0, 256, codes_end, np.uint8)
    data[layout.parts[1]].view("<f2")[:] = 1
    for of_rows in layout.parts[2:]:
        data[of_rows].view("<f4")[:] = 1e-4
    return Matrix(scheme, (rows, columns), data, tables_of(scheme))


def fastest(backend: Backend, matrix: Matrix, x: NDArray[np.float32]) -> float:
    """Seconds of the best pass, with its call and the rounding of x."""
    best = np.inf
    for _ in range(PASSES):
        start = time.perf_counter()
        backend.product(matrix, x, 1)
        best = min(best, time.perf_counter() - start)
    return best


def products(options: argparse.Namespace) -> dict[str, Any]:
    rows, (height, width) = [], IN_CACHE
    x = np.random.default_rng(1).standard_normal((1, width), dtype=np.float32)
    for isa in (name for name, runs in instruction_sets() if runs and name != "reference"):
        backend = open_backend(isa, 1)
        for name in options.schemes:
            matrix = random_matrix(SCHEMES[name], height, width)
            seconds = fastest(backend, matrix, x)
            row = {"isa": isa, "scheme": name, "weights_per_second": height * width / seconds,
                   "bytes_per_second": matrix.data.size / seconds}  # fmt: skip
            print(f"{isa:12} {name:8} {row['weights_per_second'] / 1e9:6.1f} billion weights/s "
                  f"{row['bytes_per_second'] / 1e9:6.1f} GB/s", flush=True)  # fmt: skip
            rows.append(row)
    return {"machine": describe_machine(), "matrix": IN_CACHE, "passes": PASSES, "rows": rows}


# ---- speed


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """peers.py with every scheme, and how the bars are met."""
    command = [sys.executable, str(HERE / "peers.py"), "--sides", "schemes", "--tasks", "decode"]
    command += ["--peers", *options.schemes, *options.beside, "--no-save", "--json"]
    for name in ("model", "envs", "rounds", "threads", "work"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--reuse"] if options.reuse else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: failed, see above")
    result: dict[str, Any] = json.loads(done.stdout)
    print(table(result))
    rounds = {name: side["decode"]["tokens_per_second"]["rounds"]
              for name, side in result["tasks"]["decode"]["sides"].items()}  # fmt: skip
    bars = {}
    for ours, (theirs, times) in BARS.items():
        if ours in rounds and theirs in rounds:
            found = median(a / b for a, b in zip(rounds[ours], rounds[theirs], strict=True))
            bars[ours] = {"against": theirs, "least": times, "median": found}
            print(f"{ours} / {theirs}: {found:.2f}, expected {times} on 1.5B")
    return {**result, "bars": bars}


# ---- the table of docs/schemes.md

GRIDS = {
    "int8": "-127 ... 127", "nl4": "16 points, curved, in 256 tables", "int6": "-31 ... 31",
    "int4": "16 even steps, in 256 tables", "nl3": "8 points, in 256 tables",
    "nl2": "4 points, in 256 tables",
    "ternary": "-1 0 1", "sign": "-1 1", "row8": "256 steps a row", "row4": "16 steps a row",
    "row2": "4 steps a row", "row1": "-1 1",
}  # fmt: skip
HEAD = ("scheme", "bits a weight", "values", "error, N(0, 1)", "error, t5", "KL, model", "KL, twin",
        "weights/s, AVX-512", "AVX2", "tokens/s")  # fmt: skip


def tabulate(file: Path) -> str:
    """The newest line of each part as one table; "-" for what nobody has measured."""
    cells: dict[tuple[str, str], str] = {}
    for line in file.read_text().splitlines():
        run = json.loads(line)
        part = run["benchmark"].removeprefix("schemes, ")
        for row in run.get("rows", ()):
            if part == "errors":
                cells[row["form"], "bits"] = f"{row['bits']:.2f}"
                cells[row["form"], "normal"] = f"{row['normal']:.3g}"
                cells[row["form"], "student"] = f"{row['student']:.3g}"
            elif part == "quality":
                cells[row["form"], row["model"]] = f"{row['kl']:.2g}"
            elif part == "products":
                cells[row["scheme"], row["isa"]] = f"{row['weights_per_second'] / 1e9:.0f}"
        if part == "speed" and run["model"] == "qwen2.5-1.5b":
            for name, side in run["tasks"]["decode"]["sides"].items():
                cells[name, "speed"] = f"{side['decode']['tokens_per_second']['median']:.0f}"
    columns = ("normal", "student", "demo", "twin", "avx512vnni", "avx2", "speed")
    rows = [HEAD, ["---", "---:", "---", *["---:"] * len(columns)]]
    for name in CODED:
        found = [cells.get((name, column), "-") for column in columns]
        rows.append([f"`{name}`", cells.get((name, "bits"), "-"), GRIDS[name], *found])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


PARTS = {"errors": errors, "quality": kl, "products": products, "speed": speed}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=["errors", "quality", "products"])
    add("--schemes", nargs="+", choices=CODED, default=CODED, metavar="SCHEME")
    add("--windows", type=int, default=60, help="quality: of 512 held-out tokens")
    add("--model", choices=SHAPES, default="qwen2.5-1.5b", help="speed: whose shapes")
    add("--beside", nargs="*", choices=LOW, default=list(LOW), metavar="TYPE",
        help=f"speed: of llama.cpp (default: all of {', '.join(LOW)})")  # fmt: skip
    add("--envs", type=Path, default=Path("envs"), help="speed: folder of peers/, as of peers.py")
    add("--rounds", type=int, default=10, help="speed: turns of each side")
    add("--threads", type=int, default=2, help="speed: of each side")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "chalot-benchmarks",
        help="speed: folder for models, kept for the next run")  # fmt: skip
    add("--reuse", action="store_true", help="speed: keep chalot's files of the last run too")
    add("--table", type=Path, metavar="PAGE", help="only write the results' table into that page")
    add("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    options.work, options.envs = options.work.resolve(), options.envs.absolute()
    return options


def main() -> None:
    options = arguments()
    if options.table:
        into(options.table, "table", tabulate(RESULTS))
        return
    for part in options.parts:
        found = PARTS[part](options)
        made = provenance(sys.argv[1:], ("--envs", "--work"))
        if not options.no_save:
            with RESULTS.open("a") as file:
                file.write(json.dumps({**made, **found, "benchmark": f"schemes, {part}"}) + "\n")


if __name__ == "__main__":
    main()
