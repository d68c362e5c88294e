"""Weights to codes and back, in numpy: the truth that native code must equal on every code.

    absmax   scale = max |w| of a segment / 127 (int8) or 31 (int6), code = round(w / scale)
    levels   for each row and group of 32 columns the level whose rounded table leaves the least
             squared error, tried around the level whose end meets the group's largest weight
    others   affine, sign, ternary: quant/coarse.py

Every operation is one correctly rounded operation in a written order, so results do not depend on
the machine.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chalot.errors import SchemeError
from chalot.quant import coarse
from chalot.quant.grids import MAGNITUDES, magnitude, tables_of
from chalot.quant.scheme import GROUP, PANEL, ROW, Scheme, round_up

F32 = np.float32
# magnitudes tried around the one that meets the largest weight; four points may cut off more
SEARCH_BELOW, SEARCH_ABOVE = {"nl4": 5, "int4": 5, "nl3": 7, "nl2": 10}, 1


@dataclass(frozen=True)
class Codes:
    """A quantised matrix. Rows are padded to 16 and columns to 32, with zeros."""

    scheme: Scheme
    shape: tuple[int, int]  # rows, columns before padding
    codes: NDArray[np.uint8]  # (rows16, columns32); int8 numbers as their two's complement
    levels: NDArray[np.uint8] | None  # (rows16, columns32 / 32)
    segments: NDArray[np.float16]  # (rows16, segments); one of 1 where the row has no factors
    row_scale: NDArray[np.float32]  # (rows16,)
    row_offset: NDArray[np.float32] | None = None  # (rows16,)


def padded(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The matrix with zero rows up to a multiple of 16 and zero columns up to a multiple of 32."""
    rows, columns = weights.shape
    if rows % PANEL == 0 and columns % GROUP == 0:
        return np.ascontiguousarray(weights)
    out = np.zeros((round_up(rows, PANEL), round_up(columns, GROUP)), F32)
    out[:rows, :columns] = weights
    return out


def scales(
    weights: NDArray[np.float32], segment: int, top: int = 127
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """Row scales (rows,) and segment factors (rows, segments); their product is max |w| / top.

    The factor is relative to the row and rounded up to float16, so that no code passes `top`.
    """
    rows, columns = weights.shape
    count = -(-columns // segment)
    size = np.abs(weights)
    largest = np.zeros((rows, count), F32)
    for s in range(count):
        largest[:, s] = size[:, s * segment : (s + 1) * segment].max(axis=1)
    whole = largest.max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(whole[:, None] > 0, largest / whole[:, None], F32(0))
    factor = ratio.astype(np.float16)
    factor = np.where(factor.astype(F32) < ratio, np.nextafter(factor, np.float16(2)), factor)
    return whole / F32(top), factor


def units(row_scale: NDArray[np.float32], factor: NDArray[np.float16]) -> NDArray[np.float32]:
    """(rows, segments) float32: what an integer value of 1 is worth."""
    return row_scale[:, None] * factor.astype(F32)


def spread(unit: NDArray[np.float32], segment: int, columns: int) -> NDArray[np.float32]:
    """(rows, columns): each segment's number repeated over its columns."""
    return np.repeat(unit, min(segment, columns), axis=1)[:, :columns]


def quantize(weights: NDArray[np.float32], scheme: Scheme, unit: np.float32 | None = None) -> Codes:
    """Codes of a float32 matrix (rows, columns). Raises SchemeError for a dense scheme.

    `unit`, for `ternary` alone, is what 1 is worth in all rows (BitNet takes `coarse.absmean` of
    the tensor); without it each segment has the one that leaves the least error. Weights must be
    finite; the converter checks that and names the tensor.
    """
    if not scheme.is_coded:
        raise SchemeError(f"{scheme} stores numbers, not codes; choose int8 or nl4")
    if unit is not None and scheme.fit != "ternary":
        raise SchemeError(f"{scheme} takes no unit; only ternary does")
    w, columns = padded(weights), weights.shape[1]
    offset = levels = None
    factor = np.ones((len(w), 1), np.float16)
    if scheme.fit == "affine":
        codes, row_scale, offset = coarse.affine(w, columns, scheme)
    elif scheme.fit == "sign":
        codes, relative, row_scale = coarse.sign(w, columns, scheme)
        factor = factor if scheme.segment == ROW else relative
    elif scheme.fit == "ternary":
        codes, factor, row_scale = coarse.ternary(w, scheme, unit)
    else:
        top = scheme.middle - 1 if scheme.middle else 127
        row_scale, factor = scales(w, scheme.segment, top)
        one = spread(units(row_scale, factor), scheme.segment, w.shape[1])
        with np.errstate(divide="ignore", invalid="ignore"):
            v = np.where(one > 0, w / one, F32(0))
        np.clip(v, -top, top, out=v)
        if scheme.has_levels:
            codes, levels = nearest_levels(v, scheme)
        else:
            codes = (np.rint(v).astype(np.int8) + np.int8(scheme.middle)).view(np.uint8)
    return Codes(scheme, weights.shape, codes, levels, factor, row_scale, offset)


def values(coded: Codes, tables: NDArray[np.int8] | None = None) -> NDArray[np.int8]:
    """(rows16, columns32) int8: the integers that the product multiplies, by a file's tables."""
    scheme = coded.scheme
    if coded.levels is not None:
        rows, columns = coded.codes.shape
        grouped = coded.codes.reshape(rows, -1, GROUP)
        tables = tables_of(scheme) if tables is None else tables
        assert tables is not None
        return tables[coded.levels[:, :, None], grouped].reshape(rows, columns)
    if not scheme.step:
        return coded.codes.view(np.int8)
    return coded.codes.view(np.int8) * np.int8(scheme.step) - np.int8(scheme.middle)


def dequantize(coded: Codes, tables: NDArray[np.int8] | None = None) -> NDArray[np.float32]:
    """The matrix (rows, columns) float32 that the codes stand for, by a file's tables."""
    v = values(coded, tables).astype(F32)
    unit = units(coded.row_scale, coded.segments)
    w = v * spread(unit, coded.scheme.segment, v.shape[1])
    if coded.row_offset is not None:
        w = w + coded.row_offset[:, None]
    rows, columns = coded.shape
    return w[:rows, :columns]


def group_sum(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums of 32 numbers in the order that native code shares: eight lanes, then their tree."""
    lanes = x.reshape(*x.shape[:-1], 4, 8)
    s = ((lanes[..., 0, :] + lanes[..., 1, :]) + lanes[..., 2, :]) + lanes[..., 3, :]
    s = s[..., :4] + s[..., 4:]
    s = s[..., :2] + s[..., 2:]
    return s[..., 0] + s[..., 1]


def nearest_levels(
    v: NDArray[np.float32], scheme: Scheme
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Codes (rows, columns) and levels (rows, groups) of weights in units of their segment."""
    rows, columns = v.shape
    g = v.reshape(-1, GROUP)  # (groups, 32)
    reach = np.array([127 * magnitude(m) for m in range(MAGNITUDES)], F32)
    centre = np.searchsorted(reach, np.abs(g).max(axis=1), side="left")
    tables = tables_of(scheme)
    assert tables is not None and scheme.coding is not None
    table = tables[:, : scheme.coding.codes].astype(F32)
    best = np.full(len(g), np.inf, F32)
    level = np.zeros(len(g), np.int64)
    codes = np.zeros(g.shape, np.uint8)
    for step in range(-SEARCH_BELOW[scheme.name], SEARCH_ABOVE + 1):
        m = np.clip(centre + step, 0, MAGNITUDES - 1)
        for half in range(4):  # sign and grid
            sign = F32(-1 if half >= 2 else 1)
            side = half % 2 * MAGNITUDES + m  # the level with positive sign
            t = table[side]  # (groups, points), ascending
            middle = (t[:, 1:] + t[:, :-1]) * F32(0.5)
            x = g * sign
            code = (x[:, :, None] > middle[:, None, :]).sum(axis=2, dtype=np.uint8)
            miss = x - np.take_along_axis(t, code.astype(np.intp), axis=1)
            error = group_sum(miss * miss)
            better = error < best
            best[better] = error[better]
            level[better] = (side + (half // 2) * 2 * MAGNITUDES)[better]
            codes[better] = code[better]
    return codes.reshape(rows, columns), level.astype(np.uint8).reshape(rows, columns // GROUP)
