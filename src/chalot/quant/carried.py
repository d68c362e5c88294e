"""Codes of rows, as other tools store them, as this package's own: the codes stay what they are.

Numbers that were decoded and quantised again may come out a code off, where a row does not reach
the end of its range (docs/npz.md); carried over, nothing is lost but the rounding of the offset.
"""

import numpy as np
from numpy.typing import NDArray

from chalot.quant import coarse
from chalot.quant.codes import Codes
from chalot.quant.rows import Rows
from chalot.quant.scheme import GROUP, PANEL, Scheme, round_up


def carried(rows: Rows, scheme: Scheme) -> Codes | None:
    """`rows` in the scheme of the same form, "row4" for 4 bits; None if they do not fit it."""
    if scheme.name != f"row{rows.bits}" or rows.codes.max(initial=0) >= 1 << rows.bits:
        return None
    shape = (rows.codes.shape[0], rows.codes.shape[1])
    wide = (round_up(shape[0], PANEL), round_up(shape[1], GROUP))
    q = np.full(wide, 1 if rows.bits == 1 else 0, np.uint8)  # of padding: what zeros are given
    q[: shape[0], : shape[1]] = rows.codes
    scale, zero = (_padded(x, wide[0]) for x in (rows.scale, rows.zero))
    factor, offset = np.ones((wide[0], 1), np.float16), None
    if rows.bits == 1:
        factor[scale == 0] = 0
    else:
        q, offset = coarse.from_affine(q, scale, zero, scheme)
        if not np.isfinite(offset).all():
            return None
    return Codes(scheme, shape, q, None, factor, scale, offset)


def _padded(x: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    out = np.zeros(count, np.float32)
    out[: len(x)] = x
    return out
