"""Which columns of a feed-forward go together, by what they do on a text (CMoE, arXiv 2502.04416).

A column's share in the answer to a token is |h| * |down's column|. The columns with the largest
sum of squared shares are the shared slices, always on (CMoE counts how often a column is among the
largest; docs/upcycling.md has both). The others are grouped by the tokens that mark them as large:
balanced k-means on marks, by cosine. The router is linear, as those of all families are: a few
steps of conjugate gradients towards what each group gives.

Shares come from the kernels, marks are whole numbers, and all other sums have a written order: the
choice is the same on every machine.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chalot.formats.floats import widened
from chalot.kernels.backend import Backend
from chalot.model.calibration import dense
from chalot.quant.fold import column_sums

Floats = NDArray[np.float32]
Marks = NDArray[np.bool_]  # (tokens, columns)
Indices = NDArray[np.int64]
Stored = NDArray[np.uint16]  # bfloat16's bits
MARKED = 0.1  # of the columns, by each token; CMoE has 10 of 11,008: docs/upcycling.md
ROUNDS = 8  # of k-means
STEPS = 8  # of conjugate gradients; twice as many give nothing (docs/upcycling.md)
AT_ONCE = 512  # columns, as float64


@dataclass(frozen=True)
class Chosen:
    """A layer's slices: columns, ascending in each, and the router (groups, hidden)."""

    shared: Indices
    groups: tuple[Indices, ...]
    router: Floats


def choose(x: Floats, shares: Stored, shared: int, routed: int, backend: Backend) -> Chosen:
    """Slices by a text's inputs x (tokens, hidden) and its columns' shares (tokens, columns).

    Shares are bfloat16's bits: there are many. `shared` and `routed` are numbers of slices, all of
    one width, which are all columns.
    """
    columns = shares.shape[1]
    width = columns // (shared + routed)
    marks = marked(shares)
    order = np.argsort(-summed_squares(shares), kind="stable")
    rest = np.sort(order[shared * width :])
    of = balanced(marks[:, rest], routed)
    groups = tuple(rest[of == g] for g in range(routed))
    given = np.stack([np.sqrt(summed_squares(shares[:, g].T)) for g in groups], axis=1)
    return Chosen(np.sort(order[: shared * width]), groups, router(x, given, backend))


def summed_squares(x: Stored) -> NDArray[np.float64]:
    """Sums over the rows (columns,), one row after another: no machine's own order."""
    total = np.zeros(x.shape[1])
    for row in x:
        wide = widened(row).astype(np.float64)
        total += wide * wide
    return total


def marked(shares: Stored) -> Marks:
    """The largest shares of each token: no fewer than MARKED, more where some are equal."""
    count = max(1, int(shares.shape[1] * MARKED))
    marks = np.empty(shares.shape, np.bool_)
    for some, marked_here in zip(shares, marks, strict=True):
        # the bits of numbers that are not negative are in the numbers' order
        np.greater_equal(some, np.partition(some, -count)[-count], out=marked_here)
    return marks


def balanced(marks: Marks, groups: int) -> Indices:
    """The group (columns,) of each column; all groups have as many."""
    columns = marks.shape[1]
    counts = marks.sum(axis=0, dtype=np.int64)
    length = np.sqrt(np.maximum(counts, 1).astype(np.float64))
    centres = marks[:, seeds(marks, counts, groups)].astype(np.float64)
    of = np.zeros(columns, np.int64)
    for _ in range(ROUNDS):
        size = np.sqrt(np.maximum(column_sums(centres * centres), 1))
        before, of = of, assigned(products(marks, centres) / length[:, None] / size)
        if np.array_equal(before, of):
            break
        centres = np.stack(
            [marks[:, of == g].sum(axis=1, dtype=np.int64) for g in range(groups)], axis=1
        ).astype(np.float64)
    return of


def products(marks: Marks, centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """(columns, groups): sums of whole numbers far below 2^53, exact in any order."""
    return np.concatenate(
        [
            marks[:, at : at + AT_ONCE].T.astype(np.float64) @ centres
            for at in range(0, marks.shape[1], AT_ONCE)
        ]
    )


def seeds(marks: Marks, counts: Indices, groups: int) -> list[int]:
    """The most active column, then one after another the active one that is least like those."""
    order = np.argsort(-counts, kind="stable")
    active = np.sort(order[: max(groups, len(order) // 2)])
    length = np.sqrt(np.maximum(counts[active], 1).astype(np.float64))
    found = [int(order[0])]
    nearest = np.zeros(len(active))
    while len(found) < groups:
        last = marks[:, found[-1:]].astype(np.float64)
        like = products(marks[:, active], last)[:, 0] / length / np.sqrt(max(last.sum(), 1))
        nearest = np.maximum(nearest, like)
        nearest[np.isin(active, found)] = np.inf
        found.append(int(active[int(np.argmin(nearest))]))
    return found


def assigned(likeness: NDArray[np.float64]) -> Indices:
    """The group of each column: its best one with room, first the columns with most to lose."""
    columns, groups = likeness.shape
    wishes = np.argsort(-likeness, axis=1, kind="stable")
    best = np.sort(likeness, axis=1)[:, ::-1]
    most_to_lose = np.argsort(best[:, min(1, groups - 1)] - best[:, 0], kind="stable")
    room = [columns // groups] * groups
    of = np.empty(columns, np.int64)
    for column in most_to_lose.tolist():
        for group in wishes[column].tolist():
            if room[group]:
                room[group] -= 1
                of[column] = group
                break
    return of


def router(x: Floats, given: NDArray[np.float64], backend: Backend) -> Floats:
    """(groups, hidden): scores x W^T near what groups give (tokens, groups), by least squares.

    Conjugate gradients on the normal equations, stopped early (Hestenes and Stiefel, 1952).
    """

    def times(matrix: NDArray[np.float64], inputs: Floats) -> NDArray[np.float64]:
        """inputs (n, k) times matrix (k, groups), by the kernels."""
        rows = dense(np.ascontiguousarray(matrix.T, np.float32))
        return backend.product(rows, inputs, 1).astype(np.float64)

    turned = np.ascontiguousarray(x.T)
    scale = max(float(given.max(initial=0)), 1e-30)
    left = given / scale
    slope = times(left, turned)  # (hidden, groups)
    found, step = np.zeros_like(slope), slope
    size = column_sums(slope * slope)
    for _ in range(STEPS):
        moved = times(step, x)
        along = column_sums(moved * moved)
        length = np.divide(size, along, out=np.zeros_like(size), where=along > 0)
        found = found + length * step
        left = left - length * moved
        slope = times(left, turned)
        before, size = size, column_sums(slope * slope)
        step = slope + step * np.divide(size, before, out=np.zeros_like(size), where=before > 0)
    return np.ascontiguousarray(found.T, np.float32)
