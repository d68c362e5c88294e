"""Better rounding at the same bytes: GPTQ (Frantar et al., arXiv 2210.17323) on frozen scales.

Scales, levels and offsets are those of plain quantisation. Columns are then rounded one after
another, those that the inputs excite most first, and each one's error is made up for by the columns
that are still to come:

    H = X^T X + 0.01 mean(diag) I,   U = upper Cholesky factor of H^-1
    w[later] -= (w[j] - q[j]) / U[j, j] * U[j, later]

Matrix algebra is numpy's LAPACK and BLAS: the codes found may differ between machines, as two
roundings of one sum do. A file is the same everywhere once it is written.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from chalot.errors import WeightError
from chalot.quant.codes import Codes, padded, quantize, spread, units
from chalot.quant.grids import MAGNITUDES, tables_of
from chalot.quant.scheme import GROUP, Scheme

F32 = np.float32
DAMPING = 0.01  # of the mean diagonal
COLUMNS = 128  # whose errors are carried on together


def factor(hessian: NDArray[np.float32], damping: float = DAMPING) -> NDArray[np.float32]:
    """The upper Cholesky factor of the inverse of a damped Hessian (columns, columns).

    Raises WeightError where it has NaN, Inf, or no inverse.
    """
    h = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", h)  # a view
    diagonal[diagonal == 0] = 1  # a column that nothing excites
    diagonal += damping * diagonal.mean()
    try:
        # of the reversed matrix: H = V V^T with V upper, and so H^-1 = U^T U with U = V^-1
        upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
        found = np.triu(np.linalg.inv(upper)).astype(F32)
    except np.linalg.LinAlgError:
        raise WeightError(
            "the calibration text's activations have no usable Hessian; take a longer text"
        ) from None
    if not np.isfinite(found).all():
        raise WeightError("activations are NaN or Inf on the calibration text; take another one")
    return found


class Rounding:
    """Rounds columns in units of their segment, by the levels that a matrix was given."""

    def __init__(self, coded: Codes) -> None:
        self.scheme = coded.scheme
        self.levels = coded.levels
        columns = coded.codes.shape[1]
        self.unit = spread(units(coded.row_scale, coded.segments), coded.scheme.segment, columns)
        self.offset = F32(0) if coded.row_offset is None else coded.row_offset
        tables = tables_of(coded.scheme)
        if tables is not None:
            assert coded.scheme.coding is not None
            half = tables[: 2 * MAGNITUDES, : coded.scheme.coding.codes].astype(F32)
            self.table, self.middle = half, (half[:, 1:] + half[:, :-1]) * F32(0.5)

    def column(
        self, w: NDArray[np.float32], j: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Codes (rows,) of column j, and the weights that they stand for."""
        unit = self.unit[:, j]
        with np.errstate(divide="ignore", invalid="ignore"):
            v = np.where(unit > 0, (w - self.offset) / unit, F32(0))
        if self.levels is not None:
            level = self.levels[:, j // GROUP]
            side, sign = level & 127, np.where(level > 127, F32(-1), F32(1))
            code = ((v * sign)[:, None] > self.middle[side]).sum(axis=1, dtype=np.uint8)
            value = self.table[side, code] * sign
        elif self.scheme.step:
            s = self.scheme
            assert s.coding is not None
            exact = (v + F32(s.middle)) / F32(s.step)
            code = np.clip(np.rint(exact), 0, s.coding.codes - 1).astype(np.uint8)
            value = code.astype(F32) * F32(s.step) - F32(s.middle)
        else:
            whole = np.clip(np.rint(v), -127, 127).astype(np.int8)
            code, value = whole.view(np.uint8), whole.astype(F32)
        return code, value * unit + self.offset


class Refinement:
    """GPTQ for all matrices that multiply the same inputs X (tokens, columns)."""

    def __init__(self, hessian: NDArray[np.float32]) -> None:
        """`hessian` is X^T X (columns, columns). Raises WeightError where it has NaN or Inf."""
        self.order = np.argsort(-np.einsum("ii->i", hessian), kind="stable")
        self.upper = factor(hessian[np.ix_(self.order, self.order)])

    def quantize(self, weights: NDArray[np.float32], scheme: Scheme) -> Codes:
        """Codes of rows (rows, columns); rows do not know of each other.

        Raises SchemeError for a dense scheme.
        """
        coded = quantize(weights, scheme)
        rows, columns = weights.shape
        w = np.ascontiguousarray(padded(weights)[:, self.order])
        codes, rounding, upper = coded.codes.copy(), Rounding(coded), self.upper
        for first in range(0, columns, COLUMNS):
            last = min(first + COLUMNS, columns)
            block = np.ascontiguousarray(w[:, first:last].T)  # a column is a row here
            errors = np.zeros_like(block)
            for i in range(last - first):
                j = self.order[first + i]
                code, stored = rounding.column(block[i], j)
                codes[:rows, j] = code[:rows]
                errors[i] = (block[i] - stored) / upper[first + i, first + i]
                block[i + 1 :] -= upper[first + i, first + i + 1 : last, None] * errors[i]
            w[:, last:] -= errors.T @ upper[first:last, last:]
        return replace(coded, codes=codes)


def output_error(
    weights: NDArray[np.float32], stored: NDArray[np.float32], hessian: NDArray[np.float32]
) -> float:
    """|(stored - weights) X^T|^2 / |weights X^T|^2."""
    miss = stored - weights
    lost = np.einsum("ij,ij->", miss @ hessian, miss, dtype=np.float64)
    return float(lost / max(np.einsum("ij,ij->", weights @ hessian, weights), 1e-30))
