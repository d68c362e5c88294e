"""The verb `validate`: how far a model's weights, and what its layers answer, are from its source.

    error = |w' - w| / |w| of each tensor,   output = |W' x - W x| / |W x|

x are the inputs that the tensor meets when a short text goes through the source's own weights.
Tensors are read in runs of rows, the source's layers one at a time. A `.myai` file has powers of
two folded into it, which are undone first (chalot/unfolding.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chalot.calibration_text import few_ids
from chalot.checking import check_shapes, read_config
from chalot.errors import SchemeError, WeightError
from chalot.formats.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from chalot.formats.names import hugging_face
from chalot.kernels.backend import Backend, open_backend
from chalot.model.calibration import Calibration, Plan, dense, some_rows
from chalot.model.config import inverse_frequencies
from chalot.model.layers import TensorSpec, layer_tensors, model_tensors
from chalot.model.transformer import INPUT_OF
from chalot.quant import codes, packing
from chalot.quant.scheme import SCHEMES
from chalot.table import rows as as_table
from chalot.unfolding import Rows, unfolding

Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # what, done, of
BARS = ((7, 0.02), (4, 0.10), (2, 0.20), (0, 0.50))  # bits a weight, at least -> largest error
WIDTHS: dict[str, float] = {  # of schemes, whatever their scales take
    **{"row8": 8, "row4": 4, "row2": 2, "row1": 1, "int8": 8, "int6": 6, "int4": 4, "nl4": 4},
    **{"nl3": 3, "nl2": 2, "ternary": 1.6, "sign": 1},
}
BETTER = {8: "int8", 4: "nl4", 2: "nl2", 1: "sign"}  # what chalot has of that width
TOKENS = 32


@dataclass(frozen=True)
class TensorCheck:
    """One tensor. `better` is the error of `better_scheme`, of the same width, where `ok` is not.

    Errors are relative: |w' - w| / |w|, `output` that of the products; None where there is none.
    """

    name: str
    kind: str
    stored: str
    bits: float
    error: float
    output: float | None
    bar: float
    ok: bool
    better_scheme: str | None = None
    better: float | None = None


@dataclass(frozen=True)
class ValidateReport:
    """All tensors, in the order in which a forward pass meets them."""

    path: str
    against: str
    inputs: str
    tokens: int
    ok: bool
    tensors: tuple[TensorCheck, ...]


def check_tolerance(tolerance: float | None) -> None:
    """Raise SchemeError for what is no share."""
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise SchemeError(f"--tolerance {tolerance}: expected a share such as 0.1 for 10 %")


def validate(
    path: str | Path,
    against: str | Path,
    *,
    tolerance: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ValidateReport:
    """Compare a model with its source, both in any format that is read.

    `tolerance` is the largest relative error allowed; without it, 2 % at 8 bits a weight, 10 % at
    4, 20 % at 2 and 50 % at 1. Raises a ChalotError where the two are not the same model.
    """
    from chalot.sources import resolve

    check_tolerance(tolerance)
    with Opened(resolve(path)) as made, Opened(resolve(against)) as source:
        backend = open_backend(threads=threads)
        work = Validation(made, source, backend, tolerance, progress or (lambda *_: None))
        found = tuple(work.checks())
    inputs = "a text through the source's layers" if work.has_text else "counted ids, no text"
    ok = all(check.ok for check in found)
    return ValidateReport(str(path), str(against), inputs, len(work.ids), ok, found)


class Opened:
    """A checkpoint in a `with` block."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = open_checkpoint(path)

    def __enter__(self) -> Checkpoint:
        return self.checkpoint

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()


class Validation:
    """A model beside its source."""

    def __init__(
        self,
        made: Checkpoint,
        source: Checkpoint,
        backend: Backend,
        tolerance: float | None,
        progress: Progress,
    ) -> None:
        self.backend, self.tolerance, self.progress = backend, tolerance, progress
        self.config = read_config(source)
        self.ids = few_ids(source, self.config)[:TOKENS]
        check_shapes(self.config, source)
        check_shapes(self.config, made)
        self.made, self.source = Rows(made, self.config), Rows(source, self.config)
        self.has_text = source.document("tokenizer.json") is not None
        self.specs = model_tensors(self.config)
        self.total = sum(int(np.prod(s.shape)) for s in self.specs)
        self.done = 0

    def checks(self) -> Iterator[TensorCheck]:
        """Every tensor, each with the inputs that it meets."""
        c = self.config
        embedding = self.specs[0]
        hidden = np.concatenate([self.read(embedding.name, i, i + 1) for i in self.ids])
        hidden = hidden * np.float32(c.embedding_scale)
        exact = {s.name: SCHEMES["f32"] for s in self.specs}
        states = Calibration(c, exact, self.backend, inverse_frequencies(c), hidden)
        none = Plan()
        if not c.tied:
            yield self.check(embedding, None, none)
        for i in range(c.layers):
            inputs = states.layer(i, self.read, SCHEMES["f32"])
            plan = unfolding(c, i, self.made, self.source)
            for spec in layer_tensors(c, i):
                slot = INPUT_OF.get(spec.name.split(".", 2)[2])
                yield self.check(spec, inputs[slot] if slot else None, plan)
        for spec in self.specs:
            if spec.name.startswith("final_norm"):
                yield self.check(spec, None, none)
        head = embedding if c.tied else self.specs[-1]
        yield self.check(head, states.head_inputs(self.read), none)

    def read(self, name: str, first: int = 0, last: int | None = None) -> Floats:
        """Rows of the source, as computed with. Raises WeightError for NaN or Inf."""
        values = self.source.read(name, first, last)
        if not np.isfinite(values).all():
            where = f"{self.source.checkpoint.path}: tensor {name}"
            raise WeightError(f"{where} has NaN or Inf; of no use here")
        return values

    def check(self, spec: TensorSpec, x: Floats | None, plan: Plan) -> TensorCheck:
        """One tensor, with the inputs `x` (tokens, columns) that it meets, if it is a matrix."""
        lost = had = missed = answered = 0.0
        at = 0
        runs = (side.runs(spec.name) for side in (self.source, self.made))
        for wanted, stored in zip(*runs, strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                off = plan.apply(spec.name, stored, at) - wanted
            lost += squares(off)
            had += squares(wanted)
            if x is not None:
                missed += squares(self.backend.product(dense(off), x, 1))
                answered += squares(self.backend.product(dense(wanted), x, 1))
            at += len(wanted)
            self.done += wanted.size
            self.progress(spec.name, self.done, self.total)
        info = self.made.checkpoint.tensors[hugging_face(spec.name)]
        bits = width(info)
        bar = next(b for least, b in BARS if bits >= least)
        bar = bar if self.tolerance is None else self.tolerance
        error, output = relative(lost, had), relative(missed, answered) if x is not None else None
        ok = error <= bar and (output is None or output <= bar)
        better = (None, None) if ok or len(spec.shape) == 1 else self.better(spec, bits)
        name, label = hugging_face(spec.name), info.dtype
        return TensorCheck(name, spec.kind, label, bits, error, output, bar, ok, *better)

    def better(self, spec: TensorSpec, bits: float) -> tuple[str | None, float | None]:
        """chalot's own scheme of that width, and its error on some rows of the source."""
        name = BETTER[max((b for b in BETTER if b <= bits), default=1)]
        if name not in SCHEMES:
            return None, None
        scheme = SCHEMES[name]
        few = np.concatenate(
            [self.read(spec.name, int(i), int(i) + 1) for i in some_rows(spec.shape[0])]
        )
        stored = packing.unpack(self.backend.encode(few, scheme), scheme, few.shape)
        return name, relative(squares(codes.dequantize(stored) - few), squares(few))


def squares(x: Floats) -> float:
    """Sum of squares in float64: of a report, in no file."""
    flat = x.reshape(-1).astype(np.float64)
    return float(np.vdot(flat, flat))


def relative(lost: float, had: float) -> float:
    """The square root of a quotient; 0 of nothing, and infinite where nothing was to be kept."""
    if lost == 0:
        return 0.0
    return float((lost / had) ** 0.5) if had else float("inf")


def width(info: TensorInfo) -> float:
    """Bits a weight: of its scheme, else what is stored for each."""
    found = WIDTHS.get(info.scheme or info.dtype)
    return info.nbytes * 8 / int(np.prod(info.shape)) if found is None else found


# ---- as text


def percent(share: float | None) -> str:
    """0.0712 -> "7.1 %"."""
    return "-" if share is None else f"{share:.2%}".replace("%", " %")


def render(report: ValidateReport, verbose: bool = False) -> str:
    """The report as text: a line for each kind of tensor, or for each tensor; then the verdict."""
    head = ["", "stored", "error", "output", "bar", "of its width"]
    table = [[("tensor" if verbose else "kind, worst"), *head[1:], "ok"]]
    if verbose:
        for t in report.tensors:
            better = "" if t.better is None else f"{t.better_scheme} {percent(t.better)}"
            shown = [t.name, t.stored, *map(percent, (t.error, t.output, t.bar)), better]
            table.append([*shown, "yes" if t.ok else "no"])
    else:
        for kind, stored in dict.fromkeys((t.kind, t.stored) for t in report.tensors):
            same = [t for t in report.tensors if (t.kind, t.stored) == (kind, stored)]
            table.append([kind, stored, *worst(same)])
    lines = [as_table(table), "", "error: |w' - w| / |w|; output: |W'x - Wx| / |Wx|, x: "]
    lines[-1] += f"{report.tokens} tokens, {report.inputs}"
    failed = [t for t in report.tensors if not t.ok]
    if not failed:
        return "\n".join([*lines, f"{report.path}: {len(report.tensors)} tensors within the bar"])
    lines += list(advice(failed))
    lines.append(f"{report.path}: {len(failed)} of {len(report.tensors)} tensors over the bar")
    return "\n".join(lines)


def worst(same: list[TensorCheck]) -> list[str]:
    """The cells of several tensors: the largest of each number."""
    outputs = [t.output for t in same if t.output is not None]
    better = [t.better for t in same if t.better is not None]
    name = next((t.better_scheme for t in same if t.better is not None), "")
    numbers = (max(t.error for t in same), max(outputs, default=None), max(t.bar for t in same))
    fine = sum(t.ok for t in same)
    return [
        *map(percent, numbers),
        f"{name} {percent(max(better))}" if better else "",
        f"{fine} of {len(same)}",
    ]


def advice(failed: list[TensorCheck]) -> Iterator[str]:
    """Why, and what helps, for each width that failed."""
    for stored in dict.fromkeys(
        t.stored for t in failed if t.better_scheme not in (None, t.stored)
    ):
        t = max((t for t in failed if t.stored == stored), key=lambda t: t.error)
        how = f"{t.bits:g} bits a weight"
        if stored.startswith(("q", "row")):
            how = "each weight's sign times its row's mean size"
            if t.bits > 1:
                how = (
                    f"{t.bits:g} bits a weight in even steps over a row's whole range; real "
                    "weights have a few far from the rest"
                )
        helps = f"chalot convert SOURCE --scheme {t.better_scheme} -o model.myai"
        if t.better is None or t.better > t.bar:
            helps = "over the bar too; so few bits are for models that were trained for them"
        yield (
            f"{t.name}: {percent(t.error)}, over the bar of {percent(t.bar)}: {how}; "
            f"{t.better_scheme} of the same rows gives {percent(t.better)}: {helps}"
        )
