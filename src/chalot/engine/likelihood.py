"""Log-probabilities and choices from whole rows of logits, with the same bits on every machine.

log p(i) = (l[i] - max l) - log(sum_j exp(l[j] - max l)): the project's own exponential in float32,
summed one after another by ascending id in float64, and a logarithm of float64 operations alone.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from chalot.engine.sampler import NOT_FINITE, Exp, SamplingError, in_order
from chalot.errors import KernelError

LN2 = 0.6931471805599453
BLOCK = 64  # logits whose largest is found first
TERMS = [2.0 / (2 * n + 1) for n in range(13)]

Floats = NDArray[np.float32]
Candidates = tuple[NDArray[np.int32], Floats]


def log(x: float) -> float:
    """The natural logarithm of a positive number: 2 artanh((m - 1) / (m + 1)) + e ln 2."""
    m, e = math.frexp(x)
    if m < 0.7071067811865476:
        m, e = m * 2, e - 1
    s = (m - 1) / (m + 1)
    z = s * s
    total = 0.0
    for term in reversed(TERMS):
        total = total * z + term
    return e * LN2 + s * total


class Likelihood:
    """The distribution that a row of logits stands for. Raises KernelError if one is not finite."""

    def __init__(self, row: Floats, exp: Exp) -> None:
        if not np.isfinite(row).all():
            raise KernelError(NOT_FINITE)
        largest = row.max()
        weight = exp(row - largest)
        self.row = row
        self.largest = float(largest)
        self.log_sum = log(float(np.add.accumulate(weight, dtype=np.float64)[-1]))

    def of(self, token: int) -> float:
        """A token's log-probability."""
        return (float(self.row[token]) - self.largest) - self.log_sum

    def top(self, count: int) -> list[tuple[int, float]]:
        """The most likely ids with their log-probabilities."""
        ids, _ = best_among(None, self.row, count)
        return [(int(i), self.of(int(i))) for i in ids]


def best_among(ids: NDArray[np.int32] | None, logits: Floats, count: int) -> Candidates:
    """The `count` best by descending logit, then ascending id; `ids` ascend, None: all."""
    if count < len(logits):
        whole = len(logits) // BLOCK
        # the count-th largest of the blocks' largest: so many logits at least are not below it
        least = logits if whole < count else logits[: whole * BLOCK].reshape(-1, BLOCK).max(axis=1)
        floor = np.partition(least, len(least) - count)[len(least) - count] if count else np.inf
        found = np.flatnonzero(logits >= floor)
        logits = logits[found]
        ids = found.astype(np.int32) if ids is None else ids[found]
    elif ids is None:
        ids = np.arange(len(logits), dtype=np.int32)
    ids, logits = in_order(ids, logits)
    return ids[:count], logits[:count]


def candidates(
    row: Floats, count: int, bits: NDArray[np.uint32] | None, bias: Mapping[int, float]
) -> Candidates:
    """The best of a row after a bias, among those that a mask allows.

    Raises KernelError if a logit is not finite, SamplingError if the mask allows nothing.
    """
    if not np.isfinite(row).all():
        raise KernelError(NOT_FINITE)
    if bias:
        row = row.copy()
        for token, number in bias.items():
            row[token] += np.float32(number)
    if bits is None:
        return best_among(None, row, count)
    allowed = np.unpackbits(bits.astype("<u4", copy=False).view(np.uint8), bitorder="little")
    allowed = allowed[: len(row)].view(bool)
    many = int(np.count_nonzero(allowed))
    if not many:
        raise SamplingError("the mask allows no token here; its grammar does not fit the model")
    if many > len(row) // 2 and len(allowed) == len(row):  # half the time of gathering them
        return best_among(None, np.where(allowed, row, np.float32(-np.inf)), min(count, many))
    ids = np.flatnonzero(allowed).astype(np.int32)
    return best_among(ids, row[ids], count)
