"""Codes of few values by formula: affine rows, signs, ternary. Formulas, not searches.

    affine   s = (max - min) / (2^b - 1), z = round(-min / s), q = round(w / s + z), w' = (q - z) s
             stored as (q - 2^(b-1)) s + offset, offset = (2^(b-1) - z) s
    sign     w' = s sign(w), s = mean |w|; sign(0) = 1
    ternary  w' = s t, t in -1, 0, 1: |w| > s / 2 is not 0, and s the mean of those |w|, iterated
             (least error, Lloyd 1982); or one s for all, BitNet's mean |w| (arXiv 2402.17764)

Means are float64 sums in sixteen lanes and their tree: equal on every machine, and exact where
weights are equal, so a matrix that is ternary already stays as it is.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from chalot.quant.scheme import PANEL, Scheme

F32 = np.float32
Floats = NDArray[np.float32]
ROUNDS = 64  # of the ternary scale; it has settled after some ten


def lane_sum(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows,) sums over the columns, a multiple of 16: sixteen lanes, then 8, 4, 2, 1 apart."""
    lanes = np.zeros((len(x), PANEL))
    for k in range(0, x.shape[1], PANEL):
        lanes += x[:, k : k + PANEL]
    for width in (8, 4, 2, 1):
        lanes = lanes[:, :width] + lanes[:, width : 2 * width]
    return lanes[:, 0]


def mean(total: NDArray[np.float64], count: NDArray[np.int64]) -> Floats:
    """total / count as float32; 0 where there is nothing."""
    out: Floats = (total / np.maximum(count, 1)).astype(F32)
    return out


def affine(w: Floats, columns: int, scheme: Scheme) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Codes (rows, columns32), row scales and row offsets (rows,). `columns` are not padding."""
    top = F32(scheme.coding.codes - 1)  # type: ignore[union-attr]
    low, high = w[:, :columns].min(axis=1), w[:, :columns].max(axis=1)
    with np.errstate(all="ignore"):
        scale = (high - low) / top
        scale = np.where(np.isfinite(scale), scale, high / top - low / top)
        zero = np.rint(-low / scale)
        flat = ~np.isfinite(zero)  # no range: the offset is all there is
        scale, zero = np.where(flat, F32(0), scale), np.where(flat, F32(0), zero)
        q = np.where(flat[:, None], F32(0), np.rint(w / scale[:, None] + zero[:, None]))
    q = np.clip(q, 0, top).astype(np.uint8)
    q[:, columns:] = 0
    coded = from_affine(q, scale, zero, scheme)
    return coded[0], scale, np.where(flat, low, coded[1])


def from_affine(
    q: NDArray[np.uint8], scale: Floats, zero: Floats, scheme: Scheme
) -> tuple[NDArray[np.uint8], Floats]:
    """Stored codes and row offsets (rows,) of q, (rows, columns), where w = (q - zero) scale."""
    half = scheme.coding.codes // 2  # type: ignore[union-attr]
    codes = q if scheme.step else q ^ np.uint8(128)  # q - 128 as an int8 number
    with np.errstate(over="ignore"):
        return codes, (F32(half) - zero) * scale


def relative(one: Floats) -> tuple[NDArray[np.float16], Floats]:
    """Segment factors (rows, segments) and row scales (rows,) of units (rows, segments)."""
    whole = one.max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(whole[:, None] > 0, one / whole[:, None], F32(0))
    return ratio.astype(np.float16), whole


def sign(
    w: Floats, columns: int, scheme: Scheme
) -> tuple[NDArray[np.uint8], NDArray[np.float16], Floats]:
    """Codes (1: not negative), segment factors and row scales."""
    ones = []
    for first in range(0, w.shape[1], scheme.segment):
        size = np.abs(w[:, first : first + scheme.segment].astype(np.float64))
        count = min(columns - first, scheme.segment)
        ones.append(mean(lane_sum(size), np.full(len(w), count)))
    factor, row_scale = relative(np.stack(ones, axis=1))
    return (w >= 0).astype(np.uint8), factor, row_scale


def absmean(runs: Iterable[Floats]) -> np.float32:
    """mean |w| of a matrix in runs of rows (rows, columns), one row's sum after another."""
    total, count = 0.0, 0
    for w in runs:
        extra = -w.shape[1] % PANEL
        rows = lane_sum(np.abs(np.pad(w, [(0, 0), (0, extra)]).astype(np.float64)))
        total = float(np.add.accumulate(np.concatenate([[total], rows]))[-1])
        count += w.size
    return F32(total / count)


def least_error(size: NDArray[np.float64]) -> Floats:
    """(rows,) ternary scales of |w| (rows, columns): s = mean of |w| over |w| > s / 2."""
    s = mean(lane_sum(size), (size > 0).sum(axis=1))
    for _ in range(ROUNDS):
        kept = size > s[:, None] * F32(0.5)
        after = mean(lane_sum(np.where(kept, size, 0.0)), kept.sum(axis=1))
        if np.array_equal(after, s):
            break
        s = after
    return s


def ternary(
    w: Floats, scheme: Scheme, unit: np.float32 | None
) -> tuple[NDArray[np.uint8], NDArray[np.float16], Floats]:
    """Codes (t + 1), segment factors and row scales; `unit` is the one scale of all weights."""
    starts = range(0, w.shape[1], scheme.segment)
    if unit is not None:
        row_scale = np.full(len(w), unit, F32)
        factor = np.ones((len(w), len(starts)), np.float16)
    else:
        parts = [np.abs(w[:, s : s + scheme.segment]).astype(np.float64) for s in starts]
        factor, row_scale = relative(np.stack([least_error(p) for p in parts], axis=1))
    codes = np.ones(w.shape, np.uint8)
    for i, first in enumerate(starts):
        half = row_scale[:, None] * factor[:, i : i + 1].astype(F32) * F32(0.5)
        part = w[:, first : first + scheme.segment]
        codes[:, first : first + scheme.segment] += (part > half).view(np.uint8)
        codes[:, first : first + scheme.segment] -= (part < -half).view(np.uint8)
    return codes, factor, row_scale
