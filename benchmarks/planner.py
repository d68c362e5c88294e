"""Plans at equal bytes: uniform, entropy-weighted, random, and the planner's at every depth.

    python benchmarks/planner.py [--model FOLDER ...] [--bits 3 4.25] [--random 100] [--apart]

The bundled model and its outlier twin, and further folders (tools/train_demo_model.py makes them
from other seeds and sizes) with a heldout.txt each. Plans are made from calibration.txt, and their
KL to the source measured on held-out text, of which no window of 32 tokens is in the calibration
text; error bars are standard errors over windows of 256 tokens. Appends to results/planner.jsonl;
--table prints the last run as Markdown. With --apart, only the planner with query, key and value,
gate and up each by itself, into results/planner-apart.jsonl.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chalot.charts import Point, curves
from chalot.demo import FOLDER, write_twin
from chalot.evaluate.quality import standard_error
from chalot.evaluate.report import uncut
from chalot.formats.myai import MyaiFile
from chalot.kernels.backend import Backend, open_backend
from chalot.plan import ewq
from chalot.plan.choose import Chosen, choose, improve, item_bytes
from chalot.plan.losses import DEPTHS, Table, inputs_of
from chalot.plan.swap import Item, Swaps
from chalot.quant.grids import tables_of
from chalot.quant.packing import Matrix, pack
from chalot.quant.refine import Refinement
from chalot.quant.scheme import SCHEMES, Scheme
from chalot.text.tokenizer import from_source
from machine import HERE, provenance

BITS = (2.5, 3.0, 3.5, 4.25, 5.0)
OF_NL4 = 4.25
NAMES = ("bf16", "int8", "int6", "nl4", "nl3", "nl2", "ternary")
LEVELS = {"low": "nl2", "middle": "nl4", "raw": "int8"}  # of EWQ, where budgets are this small
OVERLAP = 32  # tokens
ONE_DEPTH = (("measured", DEPTHS["measured"]),)
RESULTS = HERE / "results" / "planner.jsonl"

Matrices = dict[str, Matrix]


class Subject:
    """One model: its source, the calibration and the held-out text, and every way to store it."""

    def __init__(self, file: MyaiFile, folder: Path, backend: Backend, apart: bool = False) -> None:
        self.name = folder.name
        tokenizer = from_source(file)
        calibration = tokenizer.encode((folder / "calibration.txt").read_text("utf-8"))
        heldout = tokenizer.encode((folder / "heldout.txt").read_text("utf-8"))
        self.overlap = overlap(calibration, heldout)
        self.known = Swaps(file, backend, calibration, apart)
        self.unseen = Swaps(file, backend, heldout, apart)
        self.items = self.known.items
        self.schemes = [SCHEMES[n] for n in NAMES]
        self.stored: dict[tuple[str, str], Matrices] = {}
        self.refined: dict[tuple[str, str], Matrices] = {}
        self.refinements: dict[tuple[int, str], Refinement] = {}

    def matrices(self, plan: Mapping[str, str], refined: bool = False) -> Matrices:
        """All of a plan's."""
        out: Matrices = {}
        for item in self.items:
            out |= self.one(item, plan[item.name], refined)
        return out

    def one(self, item: Item, scheme: str, refined: bool) -> Matrices:
        kept = self.refined if refined else self.stored
        key = item.name, scheme
        if key not in kept:
            coded = SCHEMES[scheme].is_coded
            kept[key] = (
                self.refine(item, SCHEMES[scheme])
                if refined and coded
                else self.known.encoded(item, SCHEMES[scheme])
            )
        return kept[key]

    def refine(self, item: Item, scheme: Scheme) -> Matrices:
        out = {}
        for spec in item.tensors:
            key = item.layer, item.name
            if key not in self.refinements:
                x = inputs_of(self.known, item, spec.name)
                hessian = x.T @ x
                if spec.name == "embedding":  # its rows are looked up as well
                    share = np.float32(0.1 * np.trace(hessian) / len(hessian))
                    hessian = hessian + np.eye(len(hessian), dtype=np.float32) * share
                self.refinements[key] = Refinement(hessian)
            coded = self.refinements[key].quantize(self.known.floats(spec.name), scheme)
            shape = (spec.shape[0], spec.shape[1])
            out[spec.name] = Matrix(scheme, shape, pack(coded), tables_of(scheme))
        return out

    def bytes(self, plan: Mapping[str, str]) -> int:
        return sum(item_bytes(i, SCHEMES[plan[i.name]]) for i in self.items)

    def result(self, plan: Mapping[str, str], refined: bool = False) -> dict[str, Any]:
        """KL on unseen text with its error, and bytes."""
        each = self.unseen.kl_by_window(self.matrices(plan, refined))
        size = self.bytes(plan)
        weights = sum(i.weights for i in self.items)
        return {
            "kl": float(np.mean(each)),
            "kl_error": standard_error(each),
            "bytes": size,
            "bits": size * 8 / weights,
        }


def overlap(a: list[int], b: list[int]) -> int:
    """How many runs of OVERLAP tokens of b are in a."""
    runs = {tuple(a[i : i + OVERLAP]) for i in range(len(a) - OVERLAP + 1)}
    return sum(tuple(b[i : i + OVERLAP]) in runs for i in range(len(b) - OVERLAP + 1))


def uniform(subject: Subject, budget: int) -> dict[str, str] | None:
    """The widest scheme that fits everywhere; what is left widens items from the first on."""
    ladder = subject.schemes[::-1]
    fits = [s for s in ladder if subject.bytes({i.name: str(s) for i in subject.items}) <= budget]
    if not fits:
        return None
    plan = {i.name: str(fits[-1]) for i in subject.items}
    wider = ladder[min(len(fits), len(ladder) - 1)]
    for item in subject.items:
        trial = {**plan, item.name: str(wider)}
        if subject.bytes(trial) <= budget:
            plan = trial
    return plan


def by_entropy(subject: Subject, budget: int, variant: str) -> dict[str, str] | None:
    """EWQ over blocks; embedding and head at the middle level, or the low one where that is all."""
    specs = [t for i in subject.items for t in i.tensors]

    def read(name: str, first: int, last: int | None) -> np.ndarray:
        return subject.known.floats(name)[first:last]

    for rest in (LEVELS["middle"], LEVELS["low"]):
        ends = [i for i in subject.items if not i.name.startswith("layers.")]
        left = budget - sum(item_bytes(i, SCHEMES[rest]) for i in ends)
        try:
            blocks = ewq.analyse(read, specs, variant, 1.0, left, LEVELS)
        except ewq.LimitError:
            continue
        tensors = ewq.tensors_of(specs, blocks, LEVELS, SCHEMES[rest])
        return {i.name: tensors[i.tensors[0].name] for i in subject.items}
    return None


def random_plan(subject: Subject, budget: int, rng: np.random.Generator) -> dict[str, str]:
    """Schemes at random, then steps at random until no wider step fits the budget."""
    ladder = [
        str(s) for s in sorted(subject.schemes, key=lambda s: item_bytes(subject.items[0], s))
    ]
    at = {i.name: int(rng.integers(len(ladder))) for i in subject.items}
    names = list(at)

    def size() -> int:
        return subject.bytes({n: ladder[k] for n, k in at.items()})

    while size() > budget:
        name = names[int(rng.integers(len(names)))]
        at[name] = max(at[name] - 1, 0)
    for name in rng.permutation(names):
        while at[name] + 1 < len(ladder):
            at[name] += 1
            if size() > budget:
                at[name] -= 1
                break
    return {n: ladder[k] for n, k in at.items()}


def plans(
    subject: Subject, tables: Mapping[str, Table], bits: float, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(method, result) at one size."""
    weights = sum(i.weights for i in subject.items)
    budget = int(weights * bits / 8)
    if bits == OF_NL4:  # with what a narrow model's rows take beside
        budget = subject.bytes({i.name: "nl4" for i in subject.items})
    if options.apart:
        best = choose(subject.items, tables["measured"], subject.schemes, budget)
        yield "planner measured", subject.result(best.schemes)
        yield from exchanged(subject, tables["measured"], best, budget, options.exchanges)
        return
    found = uniform(subject, budget)
    if found:
        yield "uniform", subject.result(found)
    for variant in ewq.VARIANTS:
        found = by_entropy(subject, budget, variant)
        if found:
            yield f"ewq {variant}", subject.result(found)
    best: Chosen | None = None
    for depth in DEPTHS:
        best = choose(subject.items, tables[depth], subject.schemes, budget)
        yield f"planner {depth}", subject.result(best.schemes)
    assert best is not None
    size = 0
    for method, result in exchanged(subject, tables["measured"], best, budget, options.exchanges):
        size = result["bytes"]
        yield method, result
    found = uniform(subject, budget)
    if found:
        yield "uniform, gptq", subject.result(found, refined=True)
    rng = np.random.default_rng(0)
    random = [subject.result(random_plan(subject, size, rng)) for _ in range(options.random)]
    if random:
        kl = sorted(r["kl"] for r in random)
        yield (
            "random",
            {
                "kl": float(np.median(kl)),
                "kl_least": kl[0],
                "kl_greatest": kl[-1],
                "count": len(kl),
                "bytes": int(np.median([r["bytes"] for r in random])),
                "bits": float(np.median([r["bits"] for r in random])),
            },
        )


def exchanged(
    subject: Subject, table: Table, first: Chosen, budget: int, tries: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What exchanges make of a plan, and refinement of that."""
    better, _ = improve(subject.known, table, subject.schemes, first, budget, tries)
    yield "planner measured, exchanges", subject.result(better.schemes)
    yield "planner measured, exchanges, gptq", subject.result(better.schemes, refined=True)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All plans of a model."""
    backend = open_backend()
    with uncut(folder, None, balance="nl4") as made:
        file = MyaiFile(made)
        subject = Subject(file, folder, backend, options.apart)
        tables: dict[str, Table] = {}
        seconds = {}
        for depth, row in DEPTHS.items() if not options.apart else ONE_DEPTH:
            start = time.perf_counter()
            tables[depth] = {i.name: row(subject.known, i, subject.schemes) for i in subject.items}
            seconds[depth] = time.perf_counter() - start
        rows = []
        for bits in options.bits:
            for method, result in plans(subject, tables, bits, options):
                rows.append({"bits_asked": bits, "method": method, **result})
                print(f"{folder.name:8} {bits:5} {method:36} KL {result['kl']:.5f} "
                      f"bits {result['bits']:.3f}", flush=True)  # fmt: skip
        file.close()
    return {
        "model": folder.name,
        "weights": sum(i.weights for i in subject.items),
        "calibration_tokens": len(subject.known.ids),
        "heldout_tokens": len(subject.unseen.ids),
        "overlap": subject.overlap,
        "seconds": seconds,
        "rows": rows,
    }


def table(run: Mapping[str, Any], sizes: Sequence[float]) -> str:
    """Methods by models at each size, as Markdown."""
    out = []
    for size in sizes:
        found = {
            (r["method"], m["model"]): r
            for m in run["models"]
            for r in m["rows"]
            if r["bits_asked"] == size
        }
        names = [m["model"] for m in run["models"]]
        out.append(f"\n| KL at {size:g} bits a weight | {' | '.join(names)} |")
        out.append("|---" + "|---:" * len(names) + "|")
        for method in dict.fromkeys(method for method, _ in found):
            cells = [cell(found.get((method, name))) for name in names]
            out.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def cell(row: Mapping[str, Any] | None) -> str:
    """KL and its error; of random plans the median, least and greatest."""
    if row is None:
        return "-"
    if "kl_least" in row:
        return f"{row['kl']:.3f} ({row['kl_least']:.3f}-{row['kl_greatest']:.3f})"
    return f"{row['kl']:.4f} ± {row['kl_error']:.4f}"


DRAWN = {
    "uniform": "uniform",
    "ewq softmax": "EWQ, softmax",
    "planner linear": "planner, linear",
    "planner measured, exchanges": "planner, measured",
    "planner measured, exchanges, gptq": "planner, gptq",
}


def picture(model: Mapping[str, Any]) -> str:
    """KL by bits a weight, a curve for each of some methods."""
    series = {
        label: [
            Point(label, r["bits"], r["kl"], r["kl_error"])
            for r in model["rows"]
            if r["method"] == method
        ]
        for method, label in DRAWN.items()
    }
    return curves(series, "bits a weight", f"KL to the source, nats a token: {model['model']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", default=[], help="a further model's folder")
    parser.add_argument("--only", nargs="+", help="these models only, by name")
    parser.add_argument("--bits", nargs="+", type=float, default=list(BITS))
    parser.add_argument("--random", type=int, default=100, help="random plans of each size")
    parser.add_argument("--exchanges", type=int, default=40)
    parser.add_argument("--apart", action="store_true", help="no matrices together: see above")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the last run, measure nothing")
    parser.add_argument("--picture", metavar="SVG", help="draw the last run's first model")
    options = parser.parse_args()
    place = RESULTS.with_stem("planner-apart") if options.apart else RESULTS
    if options.table or options.picture:
        last = json.loads(place.read_text().splitlines()[-1])
        if options.picture:
            Path(options.picture).write_text(picture(last["models"][0]) + "\n")
        print(table(last, options.bits))
        return
    with tempfile.TemporaryDirectory() as scratch:
        twin = Path(scratch) / "twin"
        write_twin(FOLDER, twin)
        for name in ("calibration.txt", "heldout.txt"):
            (twin / name).write_bytes((FOLDER / name).read_bytes())
        folders = [FOLDER, twin, *map(Path, options.model)]
        chosen = [f for f in folders if not options.only or f.name in options.only]
        run = {
            **provenance(sys.argv[1:], ("--model",)),
            "models": [measure(f, options) for f in chosen],
        }
    if not options.no_save:
        with place.open("a") as file:
            file.write(json.dumps(run) + "\n")
    print(table(run, options.bits))


if __name__ == "__main__":
    main()
