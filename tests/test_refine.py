"""Laws of refinement: a smaller output error at the same scales, on inputs that are related."""

import numpy as np
import pytest

from chalot.errors import WeightError
from chalot.kernels.backend import open_backend
from chalot.quant import codes
from chalot.quant.refine import Refinement, factor, output_error, round_columns
from chalot.quant.scheme import SCHEMES

RNG = np.random.default_rng(0)
MIX = RNG.standard_normal((96, 96)).astype(np.float32)
X = (RNG.standard_normal((400, 96)).astype(np.float32) @ MIX / 10).astype(np.float32)
HESSIAN = X.T @ X
WEIGHTS = RNG.standard_normal((40, 96)).astype(np.float32)


def test_the_factor_is_that_of_the_inverse() -> None:
    u = factor(HESSIAN, 0.01).astype(np.float64)
    h = HESSIAN.astype(np.float64) + 0.01 * np.diag(HESSIAN).mean() * np.eye(96)
    assert np.array_equal(u, np.triu(u))
    np.testing.assert_allclose(u.T @ u @ h, np.eye(96), atol=2e-3)


@pytest.mark.parametrize("name", [n for n, s in SCHEMES.items() if s.is_coded])
def test_errors_of_outputs_fall(name: str) -> None:
    scheme = SCHEMES[name]
    plain = codes.quantize(WEIGHTS, scheme)
    better = Refinement(HESSIAN).quantize(WEIGHTS, scheme)
    assert better.scheme == scheme and np.array_equal(better.row_scale, plain.row_scale)
    before, after = (output_error(WEIGHTS, codes.dequantize(c), HESSIAN) for c in (plain, better))
    assert after < 0.8 * before


def test_unrelated_inputs_change_nothing() -> None:
    """With H = I there is nothing to make up for: plain rounding comes out."""
    for name in ("nl4", "int8", "row4"):
        plain = codes.quantize(WEIGHTS, SCHEMES[name])
        again = Refinement(np.eye(96, dtype=np.float32)).quantize(WEIGHTS, SCHEMES[name])
        assert (plain.codes != again.codes).mean() < 1e-3  # ties


def test_columns_that_nothing_excites() -> None:
    hessian = HESSIAN.copy()
    hessian[5], hessian[:, 5] = 0, 0
    assert np.isfinite(
        codes.dequantize(Refinement(hessian).quantize(WEIGHTS, SCHEMES["nl4"]))
    ).all()


def test_activations_that_are_no_numbers() -> None:
    hessian = HESSIAN.copy()
    hessian[3, 3] = np.nan
    with pytest.raises(WeightError):
        Refinement(hessian)


@pytest.mark.parametrize("name", [n for n, s in SCHEMES.items() if s.is_coded])
def test_native_code_finds_what_numpy_finds(name: str) -> None:
    native = open_backend(threads=2)
    weights = np.concatenate([WEIGHTS, np.zeros((1, 96), np.float32), WEIGHTS[:1] * 1e-30])
    found, oracle = (
        Refinement(HESSIAN, kernel=kernel).quantize(weights, SCHEMES[name])
        for kernel in (native.round_columns, round_columns)
    )
    assert np.array_equal(found.codes, oracle.codes)
