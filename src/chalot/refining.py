"""The setting `--refine` of `convert`: better rounding at the same bytes, and what it gained.

    gptq   columns make up for the errors of those before them (quant/refine.py), by a calibration
           text: the source's hidden states on it, a layer at a time

The text's last windows, an eighth of them, take no part: on them the gain is measured. Memory is
that of one layer's inputs and of X^T X of each.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, SchemeError, TokenizerError, WeightError
from chalot.formats.checkpoint import Checkpoint
from chalot.kernels.backend import Backend
from chalot.kernels.program import PAGE
from chalot.model.calibration import Plan
from chalot.model.config import ModelConfig
from chalot.model.layers import TensorSpec
from chalot.quant import codes, packing
from chalot.quant.refine import DAMPING, Refinement
from chalot.quant.scheme import PANEL, Scheme

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
METHODS = ("gptq", "hqq", "awq")
TEXT = ("demo", "model", "calibration.txt")  # disjoint from the held-out text
WINDOWS = 32  # of PAGE tokens, at most
HELD = 8  # of so many windows one takes no part
TOGETHER = 4  # windows whose products are summed at once
READ_AS_ROWS = 0.1  # damping of a tied embedding: what the head's inputs do not excite counts too

HEAD = "head input"
# what a matrix of a layer is multiplied with
SLOTS = {
    **dict.fromkeys(("query", "key", "value"), "attention input"),
    "output": "attention output",
    **dict.fromkeys(("gate", "up"), "feed-forward input"),
    "down": "feed-forward inner",
}


class Inputs:
    """X of one slot: X^T X of most windows, and the others as they are."""

    def __init__(self) -> None:
        self.hessian: Floats | None = None
        self.waiting: list[Floats] = []
        self.held: list[Floats] = []

    def add(self, x: Floats, is_held: bool) -> None:
        """A window (tokens, columns)."""
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


@dataclass(frozen=True)
class Refine:
    """How to refine, and by which text."""

    method: str
    text: str
    name: str = "bundled"


class Refining:
    """GPTQ of a conversion's matrices, one layer after another."""

    def __init__(
        self,
        asked: Refine,
        checkpoint: Checkpoint,
        config: ModelConfig,
        schemes: Mapping[str, Scheme],
        backend: Backend,
    ) -> None:
        self.asked = asked
        self.schemes = schemes
        self.backend = backend
        self.ids = token_ids(asked, checkpoint, config)
        self.windows = len(self.ids) // PAGE
        self.first_held = self.windows - max(1, self.windows // HELD)
        self.seen = 0
        self.inputs: dict[str, Inputs] = {}
        self.made: tuple[str, Refinement] | None = None
        self.errors: dict[str, tuple[float, float, float]] = {}

    def watch(self, slots: Mapping[str, Floats]) -> None:
        """Take what a window is in each slot; see `calibration.run_layer`."""
        i = self.seen % self.windows
        if i == 0:  # a new layer
            self.inputs = {slot: Inputs() for slot in set(SLOTS.values())}
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

        `weights` are as they are stored, multiplied by the factors `columns`.
        """
        slot = SLOTS.get(spec.name.rsplit(".", 1)[-1], HEAD)
        inputs = self.inputs.get(slot)
        if inputs is None:  # an embedding that is no head is not multiplied with anything
            return data
        one = np.ones(weights.shape[1], np.float32) if columns is None else 1 / columns
        if self.made is None or self.made[0] != slot:
            hessian = inputs.sum() * one * one[:, None]
            damping = READ_AS_ROWS if spec.kind == "embedding" else DAMPING
            self.made = slot, Refinement(hessian, damping, self.backend.round_columns)
        scheme = self.schemes[spec.name]
        plain = packing.unpack(data, scheme, (weights.shape[0], weights.shape[1]))
        better = self.made[1].refined(weights, plain)
        x = np.concatenate(inputs.held) * one
        found = [squares(weights[:PANEL] @ x.T)]
        for coded in (plain, better):
            found.append(squares((codes.dequantize(coded)[:PANEL] - weights[:PANEL]) @ x.T))
        had, lost, left = self.errors.get(spec.name, (0.0, 0.0, 0.0))
        self.errors[spec.name] = had + found[0], lost + found[1], left + found[2]
        return packing.pack(better)


def squares(x: Floats) -> float:
    """Their sum."""
    return float(np.square(x, dtype=np.float64).sum())


def token_ids(asked: Refine, checkpoint: Checkpoint, config: ModelConfig) -> list[int]:
    """The text's tokens, in whole windows."""
    from chalot.text.tokenizer import Tokenizer

    raw = checkpoint.document("tokenizer.json")
    assert raw is not None
    ids = Tokenizer.from_documents(raw, None, None, None).encode(asked.text)
    count = min(len(ids) // PAGE, WINDOWS)
    return ids[: count * PAGE]
