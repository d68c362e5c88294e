"""A model as a flat list of fused operations over buffer slots: what every backend runs.

A slot holds one row a token: float32 numbers (planes = 0) or quantised activations, int8 codes in
one plane (8 bits) or two (16 bits: 128 * first + second) with a float32 scale a block of 128.

    embed     target <- rows of a matrix, by token id, times a number
    norm      target (+)= source / rms(source) * weight, or with a bias LayerNorm
    quantize  target <- codes of source
    linear    target[:, column:] (+)= source @ matrix.T + bias, for each of its parts; logits are
              capped where there is a cap
    rope_store  norms, where there are weights for it, and rotates q and k of [q | k | v] in place;
              puts k and v in the cache
    attend    target <- softmax(q k) v over the sequence's pages
    gate      target <- activation(first half of source) * second half
    restore   target <- the numbers that source's codes stand for, to see what coding them costs
    gather    target <- the rows whose logits are wanted; what follows runs on those alone
    route     target <- each expert's weight, of its score; -1 for those that a token does not take
    experts   target += weight * down(activation(gate x) * up x), expert after expert, for each
              token's own; `parts` are gate, up and down of each; the weights are in slot `routes`
    prefetch  asks the system for the pages of the experts that source's weights choose
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from chalot.quant.packing import Matrix
from chalot.quant.scheme import PANEL, round_up

PAGE = 256  # positions of a cache page
LOGITS = -1  # as a target: the batch's logits
KINDS = (
    *("embed", "norm", "quantize", "linear", "rope_store", "attend", "gate", "gather", "restore"),
    *("route", "experts", "prefetch"),
)
# of scores: the softmax; that of the chosen alone; 1 for each of those; of each score by itself
ROUTINGS = ("softmax", "chosen", "ones", "sigmoid")
GATES = ("silu", "gelu_tanh", "relu2")
CACHE_TYPES = ("f32", "f16", "int8")
CACHE = "int8"  # unless something else is asked for


@dataclass(frozen=True, eq=False)
class Part:
    """One matrix of a fused product and where its rows go in the target."""

    matrix: Matrix
    bias: NDArray[np.float32] | None = None  # padded to 16
    column: int = 0


@dataclass(frozen=True)
class Slot:
    """A buffer: `width` numbers a token, as float32 (planes = 0) or as codes."""

    width: int
    planes: int = 0


@dataclass(frozen=True, eq=False)
class Op:
    """One operation; which fields it reads is said in the module's docstring."""

    kind: str
    source: int = LOGITS
    target: int = LOGITS
    parts: tuple[Part, ...] = ()
    # norm: padded to 16; rope_store: q's and k's, of one head or all, each padded to 16, or None
    weight: NDArray[np.float32] | None = None
    number: float = 0.0  # embed: factor; norm, rope_store: epsilon; attend: factor of the scores
    layer: int = 0
    add: bool = False  # linear, norm: to what the target holds
    gate: str = "silu"
    window: int = 0  # attend: positions that a query sees, its own included; 0: all
    cap: float = 0.0  # attend: scores become cap * tanh(score / cap); linear: logits; 0: they stay
    # linear: gate and up, which run as one with the gate and the quantize behind them; the slots
    # between are then not written (the oracle writes them)
    fused: bool = False
    # rope_store, attend: first positions that a query sees besides (at most a page, fewer than the
    # window), as if nothing lay between them and the window; rope_store then needs the window too,
    # and puts queries turned for that behind v, as [q | k | v | q for the sinks]
    sinks: int = 0
    routing: str = "softmax"  # route: of ROUTINGS
    top: int = 0  # route, experts: experts that a token takes
    routes: int = LOGITS  # experts: the slot that route wrote
    planes: int = 0  # experts: of what down is multiplied with; 0: numbers
    rope: int = 0  # rope_store: which of the program's sets of frequencies
    bias: NDArray[np.float32] | None = None  # norm: padded to 16; the mean is then taken out first


@dataclass(frozen=True)
class CacheShape:
    """What a page of 256 positions holds: a layer's keys, then its values, of each head.

    Numbers lie in rows of `stride`. Codes (int8) lie as tiles: keys (16, stride / 4, 16, 4) with
    sixteen positions side by side, values (stride / 16, 64, 16, 4) with sixteen channels; behind
    them the float32 scales of the 256 positions.
    """

    kind: str  # of CACHE_TYPES
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def stride(self) -> int:
        """Numbers of one key: the head size padded to 16."""
        return round_up(self.head_dim, PANEL)

    @property
    def position_bytes(self) -> int:
        """Cache bytes of one token; codes have a float32 scale a head."""
        head = {"f32": 4 * self.stride, "f16": 2 * self.stride, "int8": self.stride + 4}[self.kind]
        return self.layers * 2 * self.kv_heads * head

    @property
    def rotation(self) -> int:
        """Block of the Hadamard rotation of keys and queries: what divides the head; 1: none."""
        return self.head_dim & -self.head_dim if self.kind == "int8" else 1

    @property
    def page_bytes(self) -> int:
        """Cache bytes of one page."""
        return self.position_bytes * PAGE


@dataclass(frozen=True, eq=False)
class Program:
    """Operations over slots, with what they need to know of heads, cache and positions."""

    slots: tuple[Slot, ...]
    ops: tuple[Op, ...]
    cache: CacheShape
    heads: int
    # (sets, pairs): of a head's first numbers i and i + pairs turn together, the rest stay
    inverse_frequency: NDArray[np.float32]
    vocabulary: int
    rope_factor: float = 1.0  # of sines and cosines

    def written(self) -> list[Slot]:
        """The slots that hold something: those between fused operations only do not."""
        inside: set[int] = set()
        outside: set[int] = set()
        skip = 0
        for op in self.ops:
            (inside if op.fused or skip == 2 else outside).add(op.target)
            outside.update({op.source} if op.kind == "rope_store" else ())
            skip = 2 if op.fused else skip - 1
        return [s for i, s in enumerate(self.slots) if i in outside or i not in inside]


@dataclass(frozen=True, eq=False)
class Batch:
    """A ragged list of tokens: ids, absolute positions and each one's sequence, all int32."""

    tokens: NDArray[np.int32]  # (tokens,)
    positions: NDArray[np.int32]  # (tokens,)
    sequences: NDArray[np.int32]  # (tokens,), rows of `pages`
    pages: NDArray[np.int32]  # (sequences, pages): page numbers, -1 where there is none
    wanted: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))  # tokens


def padded_vector(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vector with zeros up to a multiple of 16, as operations want it."""
    out = np.zeros(round_up(len(values), PANEL), np.float32)
    out[: len(values)] = values
    return out
