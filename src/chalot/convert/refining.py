"""The setting `--refine` of `convert`: better codes at the same bytes, and what they gained.

    hqq    scales and offsets that few large weights do not stretch (quant/hqq.py); for int8, int6
           and schemes of whole rows. The text only measures
    gptq   that, and a column's rounding error is made up for by those behind it (quant/refine.py),
           as the source's inputs on a calibration text would have it; for every coded scheme

Hidden states go through the source's own layers, one layer at a time. The text's last windows, an
eighth of them, take no part: on them the error of the products is measured, before and after.
Memory is that of one layer's inputs and of X^T X of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.calibration_text import CalibrationText
from chalot.errors import SchemeError, WeightError
from chalot.formats.checkpoint import Checkpoint
from chalot.kernels.backend import Backend
from chalot.kernels.program import PAGE
from chalot.model.config import ModelConfig
from chalot.model.layers import TensorSpec
from chalot.model.transformer import INPUT_OF, LAYER_INPUTS
from chalot.quant import hqq, packing
from chalot.quant.codes import Codes, dequantize
from chalot.quant.refine import DAMPING, Refinement
from chalot.quant.scheme import PANEL, Scheme

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
WINDOWS = {"gptq": 32, "hqq": 4}  # of PAGE tokens, at most
LEAST = 2  # windows: one to learn from, one to measure with
HELD = 8  # of so many windows one takes no part
TOGETHER = 4  # windows whose products are summed at once
READ_AS_ROWS = 0.1  # damping of a tied embedding: what the head's inputs do not excite counts too

HEAD = "head input"


@dataclass(frozen=True)
class Refine:
    """A method, and its calibration text."""

    method: str
    text: CalibrationText

    @staticmethod
    def of(method: str, path: str | Path | None = None) -> "Refine":
        """By the text of a file, or the bundled one.

        Raises SchemeError for an unknown method, FormatError for a file that is no text.
        """
        if method not in WINDOWS:
            known = " or ".join(WINDOWS)
            hint = " (folding channels, which awq does, is done always)" if method == "awq" else ""
            raise SchemeError(f"--refine {method}: not known; choose {known}{hint}")
        return Refine(method, CalibrationText.of(path))

    def ids(self, checkpoint: Checkpoint, config: ModelConfig) -> list[int]:
        """The text's tokens, in whole windows. Raises as `CalibrationText.ids`."""
        ids = self.text.ids(checkpoint, config, LEAST * PAGE)
        return ids[: min(len(ids) // PAGE, WINDOWS[self.method]) * PAGE]

    def __str__(self) -> str:
        return f"{self.method} on {self.text}"


class Inputs:
    """X of one slot: X^T X of most windows, and the others as they are."""

    def __init__(self) -> None:
        self.hessian: Floats | None = None
        self.waiting: list[Floats] = []
        self.held: list[Floats] = []

    def add(self, x: Floats, is_held: bool) -> None:
        """A window (tokens, columns). Raises WeightError for NaN or Inf."""
        if not np.isfinite(x).all():
            raise WeightError(
                "activations are NaN or Inf on the calibration text; are the weights whole?"
            )
        (self.held if is_held else self.waiting).append(x)
        if len(self.waiting) == TOGETHER:
            self.sum()

    def sum(self) -> Floats:
        """X^T X (columns, columns) of all that came."""
        if self.waiting:
            x = np.concatenate(self.waiting)
            self.waiting = []
            some = x.T @ x
            self.hessian = some if self.hessian is None else np.add(some, self.hessian, out=some)
        assert self.hessian is not None
        return self.hessian


class Refining:
    """Better codes of a conversion's matrices, one layer after another."""

    def __init__(
        self,
        asked: Refine,
        checkpoint: Checkpoint,
        config: ModelConfig,
        schemes: Mapping[str, Scheme],
        backend: Backend,
    ) -> None:
        """Raises SchemeError where nothing can gain, and what `Refine.ids` raises."""
        coded = {s for s in schemes.values() if s.is_coded}
        if not coded or (asked.method == "hqq" and not any(map(hqq.applies, coded))):
            names = ", ".join(sorted({str(s) for s in schemes.values()}))
            expected = "a scheme with codes, as nl4"
            if asked.method == "hqq":
                expected = "int8, int6, row8, row4 or row2; others have scales of least error"
            raise SchemeError(f"--refine {asked.method}: nothing to gain in {names}; {expected}")
        self.method = asked.method
        self.schemes = schemes
        self.backend = backend
        self.ids = asked.ids(checkpoint, config)
        self.windows = len(self.ids) // PAGE
        self.first_held = self.windows - max(1, self.windows // HELD)
        self.seen = 0
        self.inputs: dict[str, Inputs] = {}
        self.made: tuple[str, Refinement] | None = None
        self.errors: dict[str, tuple[float, float, float]] = {}  # squares: exact, before, after

    def watch(self, slots: Mapping[str, Floats]) -> None:
        """Take what a window is in each slot; see `calibration.run_layer`."""
        i = self.seen % self.windows
        if i == 0:  # a new layer
            self.inputs = {slot: Inputs() for slot in LAYER_INPUTS}
            self.made = None
        for slot, inputs in self.inputs.items():
            inputs.add(slots[slot], i >= self.first_held)
        self.seen += 1

    def head(self, x: Floats) -> None:
        """Take what the head is multiplied with (tokens, hidden)."""
        self.inputs, self.made = {HEAD: Inputs()}, None
        for i in range(self.windows):
            self.inputs[HEAD].add(x[i * PAGE : (i + 1) * PAGE], i >= self.first_held)

    def encoded(
        self, spec: TensorSpec, weights: Floats, data: Bytes, columns: Floats | None
    ) -> Bytes:
        """The extent of some rows, given that of plain rounding.

        `weights` are as they are stored, multiplied by the factors `columns`. Raises WeightError
        for inputs that GPTQ cannot use.
        """
        slot, scheme = INPUT_OF.get(spec.name.rsplit(".", 1)[-1], HEAD), self.schemes[spec.name]
        inputs = self.inputs.get(slot)
        if inputs is None:  # an embedding that is no head is not multiplied with anything
            return data
        factors = np.ones(weights.shape[1], np.float32) if columns is None else columns
        one: Floats = np.float32(1) / factors
        plain = packing.unpack(data, scheme, (weights.shape[0], weights.shape[1]))
        gains = hqq.applies(scheme)
        if self.method == "hqq" and not gains:
            return data
        better = hqq.half_quadratic(weights, plain) if gains else plain
        if self.method == "gptq":
            if self.made is None or self.made[0] != slot:
                hessian = inputs.sum() * one * one[:, None]
                damping = READ_AS_ROWS if spec.kind == "embedding" else DAMPING
                self.made = slot, Refinement(hessian, damping, self.backend.round_columns)
            better = self.made[1].refined(weights, better)
        self._measure(spec.name, weights, (plain, better), np.concatenate(inputs.held) * one)
        return packing.pack(better)

    def _measure(self, name: str, weights: Floats, both: tuple[Codes, Codes], x: Floats) -> None:
        """Note the errors of some rows' products with x (tokens, columns)."""
        some = weights[:PANEL]
        found = [squares(some @ x.T)]
        found += [squares((first_rows(c) - some) @ x.T) for c in both]
        had, before, after = self.errors.get(name, (0.0, 0.0, 0.0))
        self.errors[name] = had + found[0], before + found[1], after + found[2]

    def gain(self, names: list[str]) -> tuple[float, float] | None:
        """Mean relative squared error of these matrices' products, before and after."""
        found = [self.errors[n] for n in names if n in self.errors]
        if not found:
            return None
        before, after = (float(np.mean([e[i] / max(e[0], 1e-30) for e in found])) for i in (1, 2))
        return before, after


def squares(x: NDArray[np.floating[Any]]) -> float:
    """Their sum."""
    return float(np.square(x, dtype=np.float64).sum())


def first_rows(c: Codes) -> Floats:
    """The weights that the first rows' codes stand for."""
    rows = min(PANEL, c.shape[0])
    levels = None if c.levels is None else c.levels[:PANEL]
    offset = None if c.row_offset is None else c.row_offset[:PANEL]
    few = (c.codes[:PANEL], levels, c.segments[:PANEL], c.row_scale[:PANEL], offset)
    return dequantize(Codes(c.scheme, (rows, c.shape[1]), *few))
