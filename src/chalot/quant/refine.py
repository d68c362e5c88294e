"""Better rounding at the same bytes: GPTQ (Frantar et al., arXiv 2210.17323) on frozen scales.

Scales, levels and offsets are those of plain quantisation. Columns are then rounded one after
another, those that the inputs excite most first, and each one's error is made up for by the columns
that are still to come:

    H = X^T X + 0.01 mean(diag) I,   U = upper Cholesky factor of H^-1
    w[later] -= (w[j] - q[j]) / U[j, j] * U[j, later]

Native code rounds blocks of 128 columns (native/refine.cpp), by the operations of `round_columns`
here; what a block owes to the columns behind it is one product. Matrix algebra is numpy's LAPACK
and BLAS: the codes found may differ between machines, as two roundings of one sum do. A file is the
same everywhere once it is written.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from chalot.errors import WeightError
from chalot.quant.codes import Codes, padded, quantize, units
from chalot.quant.grids import MAGNITUDES, tables_of
from chalot.quant.scheme import GROUP, Scheme

F32 = np.float32
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
DAMPING = 0.01  # of the mean diagonal
COLUMNS = 128  # whose errors are carried on together
SMALL = 64  # columns of a triangle that LAPACK inverts at once


def inverse_of_upper(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of an upper triangle (n, n): halves by products, which are most of the work."""
    n = len(u)
    if n <= SMALL:
        return np.triu(np.linalg.inv(u))
    half = n // 2
    out = np.zeros_like(u)
    out[:half, :half] = inverse_of_upper(u[:half, :half])
    out[half:, half:] = inverse_of_upper(u[half:, half:])
    out[:half, half:] = -out[:half, :half] @ (u[:half, half:] @ out[half:, half:])
    return out


def factor(hessian: Floats, damping: float = DAMPING) -> Floats:
    """The upper Cholesky factor of the inverse of a damped Hessian (columns, columns).

    Raises WeightError where it has NaN, Inf, or no inverse.
    """
    # of the reversed matrix: H = V V^T with V upper, and so H^-1 = U^T U with U = V^-1
    h = hessian[::-1, ::-1].astype(np.float64)
    diagonal = np.einsum("ii->i", h)  # a view
    diagonal[diagonal == 0] = 1  # a column that nothing excites
    diagonal += damping * diagonal.mean()
    try:
        upper = np.linalg.cholesky(h)[::-1, ::-1].astype(np.float64)
        found = inverse_of_upper(upper).astype(F32)
    except np.linalg.LinAlgError:
        raise WeightError(
            "the calibration text's activations have no usable Hessian; take a longer text"
        ) from None
    if not np.isfinite(found).all():
        raise WeightError("activations are NaN or Inf on the calibration text; take another one")
    return found


@dataclass(frozen=True)
class Steps:
    """What codes stand for, in units: step * code - middle, or values of a level's table."""

    step: float = 1.0
    middle: float = 0.0
    low: float = -127.0
    high: float = 127.0
    tables: Floats | None = None  # (128, points) ascending, of levels with positive sign

    @staticmethod
    def of(scheme: Scheme) -> "Steps":
        """Those of a coded scheme."""
        assert scheme.coding is not None
        most = scheme.coding.codes
        tables = tables_of(scheme)
        if tables is not None:
            return Steps(tables=np.ascontiguousarray(tables[: 2 * MAGNITUDES, :most], F32))
        if scheme.step:
            return Steps(scheme.step, scheme.middle, 0, most - 1)
        return Steps(low=-128) if scheme.has_offset else Steps()  # row8 has all 256 codes


RoundColumns = Callable[[Steps, Floats, Floats, Floats, Floats, Bytes], Bytes]


def round_columns(
    steps: Steps, w: Floats, upper: Floats, unit: Floats, offset: Floats, levels: Bytes
) -> Bytes:
    """Codes (rows, n) of weights w (rows, n), which become errors / upper's diagonal.

    A value of 1 is worth `unit` (rows, n), and `offset` (rows,) is added; `levels` (rows, n) name
    the tables, if there are any. `upper` is (n, n).
    """
    codes = np.zeros(w.shape, np.uint8)
    for i in range(w.shape[1]):
        one = unit[:, i]
        with np.errstate(divide="ignore", invalid="ignore"):
            v = np.where(one > 0, (w[:, i] - offset) / one, F32(0))
        if steps.tables is not None:
            side, sign = levels[:, i] & 127, np.where(levels[:, i] > 127, F32(-1), F32(1))
            table = steps.tables[side]  # (rows, points)
            middle = (table[:, 1:] + table[:, :-1]) * F32(0.5)
            code = ((v * sign)[:, None] > middle).sum(axis=1, dtype=np.uint8)
            value = np.take_along_axis(table, code[:, None].astype(np.intp), axis=1)[:, 0] * sign
        else:
            exact = (v + F32(steps.middle)) / F32(steps.step)
            whole = np.rint(np.clip(exact, F32(steps.low), F32(steps.high)))
            code = whole.astype(np.int16).astype(np.uint8)
            value = whole * F32(steps.step) - F32(steps.middle)
        codes[:, i] = code
        error = (w[:, i] - (value * one + offset)) / upper[i, i]
        w[:, i] = error
        w[:, i + 1 :] -= upper[i, i + 1 :] * error[:, None]
    return codes


class Refinement:
    """GPTQ for all matrices that multiply the same inputs X (tokens, columns)."""

    def __init__(
        self, hessian: Floats, damping: float = DAMPING, kernel: RoundColumns = round_columns
    ) -> None:
        """`hessian` is X^T X (columns, columns). Raises WeightError where it has NaN or Inf."""
        self.order = np.argsort(-np.einsum("ii->i", hessian), kind="stable")
        self.upper = factor(hessian[np.ix_(self.order, self.order)], damping)
        self.kernel = kernel

    def quantize(self, weights: Floats, scheme: Scheme) -> Codes:
        """Codes of rows (rows, columns); rows do not know of each other.

        Raises SchemeError for a dense scheme.
        """
        return self.refined(weights, quantize(weights, scheme))

    def refined(self, weights: Floats, coded: Codes) -> Codes:
        """Other codes of the same rows, by the scales and levels that `coded` has.

        Raises WeightError where errors grow past float32.
        """
        columns, scheme, upper = weights.shape[1], coded.scheme, self.upper
        w = padded(weights)[:, self.order]
        codes, steps = coded.codes.copy(), Steps.of(scheme)
        unit = units(coded.row_scale, coded.segments)
        offset = np.zeros(len(w), F32) if coded.row_offset is None else coded.row_offset
        levels = np.zeros((len(w), 1), np.uint8) if coded.levels is None else coded.levels
        for first in range(0, columns, COLUMNS):
            last = min(first + COLUMNS, columns)
            at = self.order[first:last]
            block = np.ascontiguousarray(w[:, first:last])
            codes[:, at] = self.kernel(
                steps,
                block,
                np.ascontiguousarray(upper[first:last, first:last]),
                unit[:, at // scheme.segment],
                offset,
                levels[:, at // GROUP if coded.levels is not None else at * 0],
            )
            if not np.isfinite(block).all():
                raise WeightError("weights or activations are too large to be refined")
            w[:, last:] -= block @ upper[first:last, last:]
        codes[coded.shape[0] :] = coded.codes[coded.shape[0] :]  # rows of padding stay
        return replace(coded, codes=codes)


def output_error(weights: Floats, stored: Floats, hessian: Floats) -> float:
    """|(stored - weights) X^T|^2 / |weights X^T|^2."""
    miss = stored - weights
    lost = np.einsum("ij,ij->", miss @ hessian, miss, dtype=np.float64)
    return float(lost / max(np.einsum("ij,ij->", weights @ hessian, weights), 1e-30))
