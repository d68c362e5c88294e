"""Half-quadratic quantisation: scales and offsets that leave most weights nearly as they are.

A few large errors are cheaper than many small ones: |w - w'|^p with p = 0.7 is made small, not the
squares (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023).
In turns, with errors r = w - w' in units of the row's root mean square:

    e = sign(r) max(|r| - |r|^(p - 1) / beta, 0),   beta = 10, 1.01 times as large at each turn
    scale (and offset) by least squares of the codes to w - e,   codes by rounding again

The turn with the least sum of |r|^p is kept. For schemes whose scales follow from the largest
weights: those with levels, ternary and sign have scales of least error already. Sums are numpy's:
what is found may differ between machines.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from chalot.errors import SchemeError
from chalot.quant.codes import Codes, padded, spread, units
from chalot.quant.refine import Steps
from chalot.quant.scheme import ROW, Scheme

F32 = np.float32
Floats = NDArray[np.float32]
FITS = ("affine", "absmax")
POWER, BETA, GROWTH, TURNS = 0.7, 10.0, 1.01, 20


def applies(scheme: Scheme) -> bool:
    """Whether the scheme's scales can gain."""
    return scheme.fit in FITS


def shrink(r: Floats, beta: float) -> Floats:
    """What of each error is taken to be an outlier's."""
    size = np.abs(r)
    some = np.where(size > 0, size, F32(1))
    rest: Floats = np.maximum(size - some ** F32(POWER - 1) / F32(beta), F32(0))
    return np.copysign(rest, r)


def half_quadratic(weights: Floats, coded: Codes) -> Codes:
    """Other codes, scales and offsets of the same rows (rows, columns), begun from `coded`.

    Raises SchemeError where the scheme's scales have nothing to gain.
    """
    scheme, columns = coded.scheme, weights.shape[1]
    if not applies(scheme):
        raise SchemeError(
            f"{scheme}: its scales leave the least error already; hqq is for int8, int6, row8, ..."
        )
    w, steps = padded(weights)[:, :columns], Steps.of(scheme)
    starts = np.arange(0, columns, min(scheme.segment, columns))
    unit = units(coded.row_scale, coded.segments)[:, : len(starts)]
    offset = np.zeros(len(w), F32) if coded.row_offset is None else coded.row_offset
    size = np.sqrt(np.square(w).mean(axis=1, keepdims=True))
    size[~(size > 0)] = 1
    least, best = np.full(len(w), np.inf, F32), (coded.codes.copy(), unit.copy(), offset.copy())
    for turn in range(TURNS):
        one = spread(unit, scheme.segment, columns)
        with np.errstate(divide="ignore", invalid="ignore"):
            v = np.where(one > 0, (w - offset[:, None]) / one, F32(0))
        q = np.rint(np.clip((v + F32(steps.middle)) / F32(steps.step), steps.low, steps.high))
        value = q * F32(steps.step) - F32(steps.middle)
        r = (w - (value * one + offset[:, None])) / size
        loss = (np.abs(r) ** F32(POWER)).sum(axis=1)
        better = loss < least
        least[better] = loss[better]
        best[0][better, :columns] = q[better].astype(np.int16).astype(np.uint8)
        best[1][better], best[2][better] = unit[better], offset[better]
        target = w - shrink(r, BETA * GROWTH**turn) * size
        if scheme.has_offset:
            unit, offset = line(value, target, unit, offset)
        else:
            unit = slope(value, target, starts, unit)
    return stored(coded, *best)


def line(value: Floats, target: Floats, unit: Floats, offset: Floats) -> tuple[Floats, Floats]:
    """Units (rows, 1) and offsets (rows,) of least squares; as before where values are all one."""
    mean_v, mean_t = value.mean(axis=1, keepdims=True), target.mean(axis=1, keepdims=True)
    v = value - mean_v
    square = np.square(v).sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (v * (target - mean_t)).sum(axis=1, keepdims=True) / square
    good = (square > 0) & (found > 0)
    moved = (mean_t - found * mean_v)[:, 0]
    return np.where(good, found, unit), np.where(good[:, 0], moved, offset)


def slope(value: Floats, target: Floats, starts: NDArray[np.int64], unit: Floats) -> Floats:
    """Units (rows, segments) of least squares; as before where nothing is above zero."""
    square = np.add.reduceat(value * value, starts, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.add.reduceat(value * target, starts, axis=1) / square
    return np.where((square > 0) & (found > 0), found, unit)


def stored(coded: Codes, codes: NDArray[np.uint8], unit: Floats, offset: Floats) -> Codes:
    """Units and offsets in the numbers that a file has for them."""
    given = replace(coded, codes=codes)
    if coded.row_offset is not None:
        given = replace(given, row_offset=offset.astype(F32))
    if coded.scheme.segment == ROW:
        return replace(given, row_scale=unit[:, 0].astype(F32))
    whole = unit.max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(whole[:, None] > 0, unit / whole[:, None], F32(0))
    segments = coded.segments.copy()
    segments[:, : unit.shape[1]] = relative.astype(np.float16)
    return replace(given, row_scale=whole.astype(F32), segments=segments)
