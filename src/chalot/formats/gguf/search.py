"""The scales that serve a group of weights best: least squares over some twenty candidates.

As llama.cpp's quantisers do it, in units of a group's largest weight, so that nothing overflows.
Single float32 operations in a written order: a file does not depend on the machine. Inside, a group
is a column: (size, groups), so that numpy's inner loops run over groups.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.formats.gguf.blocks import IQ4_GRID

Bytes = NDArray[Any]  # uint8
Floats = NDArray[np.float32]
F32 = np.float32


def _columns(x: Floats, size: int) -> Floats:
    """(size, groups): groups of `size` weights beside each other."""
    return np.ascontiguousarray(x.reshape(-1, size).T)


def _sum(x: Floats) -> Floats:
    """(groups,): sums of columns, a power of two long, as a tree of halves."""
    while len(x) > 1:
        half = len(x) // 2
        x = x[:half] + x[half:]
    total: Floats = x[0]
    return total


def _peak(columns: Floats) -> Floats:
    """(groups,): the number of largest magnitude, its sign kept; of equal ones the first."""
    at = np.abs(columns).argmax(axis=0)[None]
    found: Floats = np.take_along_axis(columns, at, axis=0)[0]
    return found


def over(a: Any, b: Floats) -> Floats:
    """a / b, and 0 where b is 0 or too small to divide by."""
    small = np.abs(b) < F32(2.0**-126)
    return np.where(small, F32(0), a / np.where(small, F32(1), b)).astype(F32)


def peak(x: Floats) -> Floats:
    """(..., 1): the number of largest magnitude, its sign kept; of equal ones the first."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)


class Search:
    """The scale s that makes sum(w (x - s g)^2) least, for candidates of grid values g."""

    def __init__(self, x: Floats, weights: Floats) -> None:
        """`x` (size, groups), and how much each number's error counts."""
        self.weights = weights
        self.weighted = weights * x
        self.gain = np.zeros(x.shape[1], F32)  # how far the error sinks below that of s = 0
        self.scale = np.zeros(x.shape[1], F32)

    def offer(self, grid: Floats) -> None:
        """Keep the scale that fits these values, where it is better than all before."""
        product = _sum(self.weighted * grid)
        scale = over(product, _sum(self.weights * grid * grid))
        gain = scale * product
        better = gain > self.gain
        self.gain = np.where(better, gain, self.gain)
        self.scale = np.where(better, scale, self.scale)


def signed_scales(x: Floats, reach: int, size: int) -> Floats:
    """(blocks, groups) scales of codes -reach .. reach - 1, of groups of `size` weights."""
    columns = _columns(x, size)
    largest = _peak(columns)
    unit = over(columns, largest)  # the largest weight is 1
    search = Search(unit, np.abs(unit))
    for step in range(-9, 10):
        grid = unit * F32(-(reach + 0.1 * step))
        np.rint(grid, out=grid)
        search.offer(np.clip(grid, -reach, reach - 1, out=grid))
    return (search.scale * largest).reshape(len(x), -1)


def scales_and_minimums(
    x: Floats, most: int, size: int, first: float, steps: int
) -> tuple[Floats, Floats]:
    """(blocks, groups) scales and minimums m >= 0 of codes 0 .. most: w = scale * code - m."""
    columns = _columns(x, size)
    largest = np.abs(columns).max(axis=0)
    unit = over(columns, largest)
    high = unit.max(axis=0)
    low = np.minimum(unit.min(axis=0), F32(0))
    mean = np.sqrt(_sum(unit * unit) / F32(size))
    weights = mean + np.abs(unit)
    weighted = weights * unit
    sum_w, sum_x = _sum(weights), _sum(weighted)
    scale = (high - low) / F32(most)
    best = np.full(largest.shape, np.inf, F32)
    # the first candidate is plain rounding; a better one's minimum is where the next starts from
    for step in range(-1, steps + 1):
        reach = most if step < 0 else most + first + 0.1 * step
        codes = unit - low
        codes *= over(F32(reach), high - low)
        np.rint(codes, out=codes)
        np.clip(codes, 0, most, out=codes)
        slope, offset = scale, low
        if step >= 0:
            wl = weights * codes
            sum_c, sum_cc, sum_xc = _sum(wl), _sum(wl * codes), _sum(weighted * codes)
            slope, offset = _fit(sum_w, sum_x, sum_c, sum_cc, sum_xc)
        codes *= slope
        codes += offset
        codes -= unit
        np.square(codes, out=codes)
        codes *= weights
        error = _sum(codes)
        better = (error < best) & (slope > 0)
        best = np.where(better, error, best)
        scale = np.where(better, slope, scale)
        low = np.where(better, offset, low)
    shape = (len(x), -1)
    return (scale * largest).reshape(shape), (-low * largest).reshape(shape)


def _fit(w: Floats, x: Floats, c: Floats, cc: Floats, xc: Floats) -> tuple[Floats, Floats]:
    """Slope and offset <= 0 of the weighted line through codes c and numbers x, from their sums."""
    spread = w * cc - c * c
    slope, offset = over(w * xc - x * c, spread), over(cc * x - c * xc, spread)
    positive = offset > 0  # only what is subtracted can be stored
    return np.where(positive, over(xc, cc), slope), np.where(positive, F32(0), offset)


def ternary_scales(x: Floats) -> Floats:
    """(blocks, 1) scales of codes -1, 0 and 1; of weights that are ternary already their own."""
    columns = np.abs(_columns(x, x.shape[1]))
    largest = columns.max(axis=0)
    unit = over(columns, largest)
    search = Search(unit, np.ones_like(unit))
    for step in range(1, 20):
        search.offer((unit > F32(step / 20)).astype(F32))
    scale: Floats = (search.scale * largest)[:, None]
    return scale


GRID = np.array(IQ4_GRID, F32)
# middles between grid points are halves: floor(2 v) tells on which side of each a number lies
NEAREST = np.searchsorted((GRID[1:] + GRID[:-1]).astype(int), np.arange(-256, 257), "right")
NEAREST = NEAREST.astype(np.uint8)
VALUES = GRID[NEAREST]


def _side(v: Floats) -> NDArray[np.intp]:
    """Where in NEAREST a number is."""
    at = np.clip(v, -128, 128)
    at *= F32(2)
    np.floor(at, out=at)
    at += F32(256)
    return at.astype(np.intp)


def nearest(v: Floats) -> Bytes:
    """Codes of the nearest grid points; of two the higher."""
    return np.take(NEAREST, _side(v))


def grid_scales(x: Floats) -> Floats:
    """(blocks, groups) scales of the grid, of groups of 32 weights."""
    columns = _columns(x, 32)
    largest = _peak(columns)
    unit = over(columns, largest)
    search = Search(unit, np.abs(unit))
    # the grid leans to one side: the largest weight may meet its lower end, or pass its upper one
    for end in (-IQ4_GRID[0], *range(IQ4_GRID[0] - 7, IQ4_GRID[0] + 8)):
        search.offer(np.take(VALUES, _side(unit * F32(end))))
    return (search.scale * largest).reshape(len(x), -1)
