"""Tokens that leave early: whose best token stands out at a region's border, by a short head.

A token leaves where the logit of its best token is ahead of the second by `margin`; leads at
borders in a row count together while the best token stays the same (saturation). It takes the full
head from there. The layers that it skips get keys and values made from the state that it left with,
so later tokens see a whole cache. Only tokens whose logits are wanted leave: prompts go through all
layers.

This changes texts: it is outside of the exactness contract. Which tokens leave depends on single
float32 subtractions and additions, so it is the same on every machine and in any batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from chalot.kernels.program import Batch
from chalot.model.pieces import Handover, Maker, handed, parts
from chalot.model.transformer import head_name

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
NEVER = float("inf")


@dataclass
class Leaving:
    """How many tokens left at each border, of those that could."""

    tokens: int = 0
    left: list[int] = field(default_factory=list)


class EarlyExit:
    """A model's layers in pieces, with a test at each border: a `Runnable`."""

    def __init__(
        self, maker: Maker, borders: Sequence[int], short_head: str, short_size: int, margin: float
    ) -> None:
        """`borders`: layers that pieces end before; the short head is one of the maker's matrices.

        `margin` is in logits; it may be changed between passes.
        """
        self.vocabulary, self.margin = maker.config.vocabulary, margin
        self.borders = tuple(borders)
        self.given = Handover(maker.config.hidden)
        ends = [*borders, maker.config.layers]
        spans = [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self.pieces = [maker.piece(s, self.given if s.start else None) for s in spans]
        self.test = maker.piece(range(0), self.given, short_head, short_size)
        self.fills = [maker.fill(range(b, maker.config.layers), self.given) for b in borders]
        self.head = maker.piece(range(0), self.given, head_name(maker.config))
        self.leaving = Leaving(left=[0] * len(self.borders))
        self.shallow: Floats = np.zeros(maker.config.hidden, np.float32)

    def run(self, batch: Batch, arena: NDArray[np.uint8]) -> Floats:
        """See Runnable."""
        found = [self.head.runnable.run(self._finals(part, arena), arena) for part in parts(batch)]
        return np.concatenate([np.zeros((0, self.vocabulary), np.float32), *found])

    def best(self, batch: Batch, arena: NDArray[np.uint8], count: int) -> tuple[Ints, Floats]:
        """See Runnable."""
        ids, logits = [np.zeros((0, count), np.int32)], [np.zeros((0, count), np.float32)]
        for part in parts(batch):
            found = self.head.runnable.best(self._finals(part, arena), arena, count)
            ids.append(found[0])
            logits.append(found[1])
        return np.concatenate(ids), np.concatenate(logits)

    def slot(self, index: int, tokens: int) -> Floats:
        """Of the head's program."""
        return self.head.runnable.slot(index, tokens)

    def _finals(self, batch: Batch, arena: NDArray[np.uint8]) -> Batch:
        """Hand over the states that tokens leave with, early or not; the batch for the head."""
        count = len(batch.tokens)
        final = np.zeros((count, self.given.rows.shape[1]), np.float32)
        may_leave = np.zeros(count, bool)
        may_leave[batch.wanted] = True
        self.leaving.tokens += int(may_leave.sum())
        lead, top = np.zeros(count, np.float32), np.full(count, -1, np.int32)
        inside = np.arange(count)  # rows of the batch that have not left
        states = self.pieces[0].states(batch, arena)
        if len(batch.wanted):
            self.shallow = states[batch.wanted[-1]].copy()
        for number, piece in enumerate(self.pieces[1:]):
            asked = np.flatnonzero(may_leave[inside])
            if asked.size and self.margin < NEVER:
                rows = inside[asked]
                lead[rows], top[rows] = self._leads(states[asked], lead[rows], top[rows], arena)
                gone = asked[lead[rows] >= np.float32(self.margin)]
                if gone.size:
                    self._leave(number, states[gone], some(batch, inside[gone]), arena)
                    final[inside[gone]] = states[gone]
                    self.leaving.left[number] += gone.size
                    inside, states = np.delete(inside, gone), np.delete(states, gone, axis=0)
            if not inside.size:
                break
            self.given.rows[: len(states)] = states
            states = piece.states(handed(some(batch, inside)), arena)
        final[inside] = states
        self.given.rows[:count] = final
        return handed(batch)

    def _leads(
        self, states: Floats, before: Floats, top_before: Ints, arena: NDArray[np.uint8]
    ) -> tuple[Floats, Ints]:
        """(tokens,) leads of the best token over the second, and the best tokens."""
        count = np.arange(len(states), dtype=np.int32)
        self.given.rows[: len(states)] = states
        # positions and pages say nothing to a head
        batch = Batch(count, np.zeros_like(count), count, np.zeros((len(states), 1), "i4"), count)
        ids, logits = self.test.runnable.best(batch, arena, 2)
        lead = logits[:, 0] - logits[:, 1]
        lead = np.where(ids[:, 0] == top_before, lead + before, lead)
        lead[(ids[:, 0] < 0) | ~np.isfinite(lead)] = -np.inf  # never leaves
        return lead, ids[:, 0]

    def _leave(self, number: int, states: Floats, batch: Batch, arena: NDArray[np.uint8]) -> None:
        """Fill in keys and values of the layers behind a border."""
        self.given.rows[: len(states)] = states
        self.fills[number].states(handed(batch), arena)


def some(batch: Batch, rows: NDArray[np.int64]) -> Batch:
    """Some tokens of a batch, none of them wanted."""
    return replace(
        batch,
        tokens=batch.tokens[rows],
        positions=batch.positions[rows],
        sequences=batch.sequences[rows],
        wanted=np.zeros(0, np.int32),
    )
