"""Powers of two that lie between two files of one model, as converting folds them in.

model/calibration.py moves powers of two from what makes a number to what takes it, which changes no
answer. Between a norm and its readers they are the quotient of the two files' norms; where both
ends are quantised matrices, they follow from the sizes of rows and columns on both sides.
"""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from chalot.checking import RUN
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.names import hugging_face
from chalot.model.calibration import Plan
from chalot.model.config import ModelConfig
from chalot.model.layers import ffn_norm, model_tensors
from chalot.model.rope import turning_order
from chalot.quant import fold

Floats = NDArray[np.float32]
Vector = TypeVar("Vector", NDArray[np.float32], NDArray[np.float64])
MYAI = b"IAYM"


class Rows:
    """A checkpoint's tensors by chalot's names, as they are computed with, some rows at a time."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.checkpoint = checkpoint
        # what checkpoints of the family leave out of norms
        self.offsets = {s.name: np.float32(s.offset) for s in model_tensors(config) if s.offset}

    def read(self, name: str, first: int = 0, last: int | None = None) -> Floats:
        """Rows of a tensor."""
        values = self.checkpoint.float32(hugging_face(name), first, last)
        return values + self.offsets[name] if name in self.offsets else values

    def runs(self, name: str) -> Iterator[Floats]:
        """All rows of a tensor, some at a time."""
        shape = self.checkpoint.tensors[hugging_face(name)].shape
        size = max(1, RUN // shape[1]) if len(shape) == 2 else shape[0]
        for first in range(0, shape[0], size):
            yield self.read(name, first, min(first + size, shape[0]))

    def sizes(self, name: str, axis: int, plan: Plan) -> NDArray[np.float64]:
        """Sums of squares along an axis of a matrix, with the plan's factors of its columns."""
        parts = [
            (plan.apply(name, values, 0).astype(np.float64) ** 2).sum(axis=axis)
            for values in self.runs(name)
        ]
        return np.concatenate(parts) if axis == 1 else np.sum(parts, axis=0)

    def is_myai(self) -> bool:
        """Whether this is a `.myai` file, which may be folded."""
        if not self.checkpoint.path.is_file():
            return False
        with self.checkpoint.path.open("rb") as file:
            return file.read(4) == MYAI


def unfolding(config: ModelConfig, layer: int, made: Rows, source: Rows) -> Plan:
    """The factors that make a layer of `made` that of `source`, but for what quantising lost."""
    plan, p, c = Plan(), f"layers.{layer}.", config
    if not (made.is_myai() or source.is_myai()):
        return plan

    def note_rows(name: str, factor: Floats) -> None:
        plan.rows[p + name] = plan.rows[p + name + ".bias"] = factor

    norms: dict[str, tuple[str, ...]] = {}
    dense = c.experts_of(layer) is None  # experts are not folded
    if c.pre_norms:
        norms["attention_norm"] = ("query", "key", "value")
    if c.pre_norms and dense:
        norms[ffn_norm(c)] = ("gate", "up")
    if c.inner_norms:
        norms |= {"attention_inner_norm": ("output",), "ffn_inner_norm": ("down",)}
    if c.head_norms:  # balanced with each other
        norms |= {"query_norm": (), "key_norm": ()}
    for norm, readers in norms.items():
        wanted, found = (np.abs(side.read(p + norm)) for side in (source, made))
        note_rows(norm, nearest(wanted, found))
        plan.columns.update(dict.fromkeys((p + name for name in readers), nearest(found, wanted)))
    repeats = c.heads // c.kv_heads
    order = turning_order(c.head_dim, c.turning or c.head_dim)
    pairs: list[tuple[str, str, int, tuple[int, int, int, int]]] = []
    if not (c.head_norms or c.whole_norms):  # rope turns two dimensions of a head together
        pairs.append(("key", "query", 1, (c.kv_heads, repeats, 2, c.head_dim // 2)))
    if not c.inner_norms:  # query heads of a group read one value head
        pairs.append(("value", "output", 0, (c.kv_heads, repeats, 1, c.head_dim)))
    if dense and not c.inner_norms:
        pairs.append(("up", "down", 0, (1, 1, 1, c.feed_forward)))
    for giver, taker, axis, shape in pairs:
        sizes = [
            [side.sizes(p + name, along, of_side) for name, along in ((giver, 1), (taker, axis))]
            for side, of_side in ((source, Plan()), (made, plan))
        ]
        if axis == 1:
            ordered = [[in_heads(x, order) for x in side] for side in sizes]
            both = (in_heads(x, np.argsort(order)) for x in between(ordered, shape))
            for name, factor in zip((giver, taker), both, strict=True):
                note_rows(name, factor)
        else:
            given, plan.columns[p + taker] = between(sizes, shape)
            note_rows(giver, given)
    return plan


def in_heads(x: Vector, order: NDArray[np.intp]) -> Vector:
    """The numbers of each head in another order."""
    return x.reshape(-1, len(order))[:, order].reshape(-1)


def between(
    sizes: list[list[NDArray[np.float64]]], shape: tuple[int, int, int, int]
) -> tuple[Floats, Floats]:
    """Powers of two that undo what a giver lost to its taker, for the giver and for the taker.

    `sizes` are sums of squares: [source, made] of [giver, taker]. `shape` is (blocks, repeats,
    halves, channels) of the taker: the repeats and halves share a factor; the giver has one repeat.
    """
    blocks, repeats, halves, channels = shape
    (wanted, at_taker), (found, of_taker) = (
        [x.reshape(blocks, -1, halves, channels).sum((1, 2)) for x in side] for side in sizes
    )
    lost, gained = (
        np.divide(above, below, out=np.ones_like(below), where=below > 0)
        for above, below in ((wanted, found), (of_taker, at_taker))
    )
    # both are rounded, and lose of their size: the square root of the two ratios
    factor = nearest((lost * gained) ** 0.25, np.ones_like(lost))[:, None, None]

    def spread(of_block: Floats, times: int) -> Floats:
        return np.broadcast_to(of_block, (blocks, times, halves, channels)).reshape(-1)

    return spread(factor, 1), spread(np.float32(1) / factor, repeats)


def nearest(above: NDArray[np.floating], below: NDArray[np.floating]) -> Floats:
    """Powers of two nearest to the quotients; 1 where there is none."""
    fine = (above > 0) & (below > 0) & np.isfinite(above) & np.isfinite(below)
    ratio = np.divide(above, below, out=np.ones(above.shape), where=fine, dtype=np.float64)
    return np.ldexp(np.float32(1), np.clip(fold.nearest_power(ratio), -60, 60)).astype(np.float32)
