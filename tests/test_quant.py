"""Laws of quant/: packing undoes itself, names parse, errors stay within their bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chalot.errors import SchemeError
from chalot.quant import codes, grids, packing
from chalot.quant.scheme import SCHEMES, Scheme

CODED = [s for s in SCHEMES.values() if s.is_coded]
coded_schemes = pytest.mark.parametrize("scheme", CODED, ids=str)
shapes = st.tuples(st.integers(1, 40), st.integers(1, 700))


def normal(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def relative_error(w: np.ndarray, again: np.ndarray) -> float:
    return float(((again - w) ** 2).sum() / (w**2).sum())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_parse_undoes_print(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme


def test_unknown_scheme_lists_the_known() -> None:
    with pytest.raises(SchemeError, match="nl5.*nl4"):
        Scheme.parse("nl5")


@coded_schemes
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_unpack_undoes_pack(scheme: Scheme, shape: tuple[int, int], seed: int) -> None:
    before = codes.quantize(normal(shape, seed), scheme)
    data = packing.pack(before)
    assert data.size == packing.stored_bytes(scheme, *shape)
    after = packing.unpack(data, scheme, shape)
    for name in ("codes", "segments", "row_scale"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert (before.levels is None) == (after.levels is None)
    if before.levels is not None:
        np.testing.assert_array_equal(before.levels, after.levels)


# Figures computed for ideal weights when the schemes were designed, with a tenth of slack.
@pytest.mark.parametrize(
    ("name", "gaussian", "student"), [("int8", 6e-5, 2.2e-4), ("nl4", 0.0054, 0.0074)]
)
def test_error_on_ideal_weights(name: str, gaussian: float, student: float) -> None:
    scheme = Scheme.parse(name)
    w = normal((64, 1024))
    assert relative_error(w, codes.dequantize(codes.quantize(w, scheme))) < gaussian * 1.1
    t5 = np.random.default_rng(1).standard_t(5, (64, 1024)).astype(np.float32)
    assert relative_error(t5, codes.dequantize(codes.quantize(t5, scheme))) < student * 1.1


@coded_schemes
@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), exponent=st.integers(-30, 30))
def test_representable_weights_come_back(
    scheme: Scheme, shape: tuple[int, int], seed: int, exponent: int
) -> None:
    """Values that the tables hold, with a full-size one in each segment, are kept exactly."""
    rng = np.random.default_rng(seed)
    rows, groups = shape[0], -(-shape[1] // 32)
    columns = groups * 32  # a short group is scored with the zeros that fill it
    if scheme.has_levels:
        level = rng.integers(0, 4, (rows, groups, 1)) * 64 + rng.integers(40, 64, (rows, groups, 1))
        level[:, :: scheme.segment // 32] = 63  # the largest table
        code = rng.integers(0, 16, (rows, groups, 32))
        code[:, :, 0] = 0  # each group reaches its table's end
        v = grids.nl4_tables()[level, code].reshape(rows, columns).astype(np.float32)
    else:
        v = rng.integers(-127, 128, (rows, columns)).astype(np.float32)
        v[:, :: scheme.segment] = -127
    w = v * np.float32(2.0**exponent)
    again = codes.dequantize(codes.quantize(w, scheme))
    # absmax / 127 rounds once, so a value may miss by that rounding
    np.testing.assert_allclose(again, w, rtol=2**-22)


@coded_schemes
def test_zero_rows_stay_zero(scheme: Scheme) -> None:
    w = normal((20, 96))
    w[3] = 0
    w[:, 32:64] = 0
    again = codes.dequantize(codes.quantize(w, scheme))
    assert not again[3].any() and not again[:, 32:64].any()
    assert relative_error(w, again) < 0.01


@coded_schemes
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e30, 3e38])
def test_extreme_sizes_stay_finite(scheme: Scheme, size: float) -> None:
    w = normal((16, 64)) / 5 * np.float32(size)
    again = codes.dequantize(codes.quantize(w, scheme))
    assert np.isfinite(again).all()
    assert np.abs(again).max() <= np.abs(w).max() * 1.01
    if size >= 1e-38:
        assert relative_error(w.astype(np.float64), again.astype(np.float64)) < 0.02


@coded_schemes
def test_one_huge_outlier_spares_other_segments(scheme: Scheme) -> None:
    w = normal((16, 2048))
    w[:, 5] = 100
    again = codes.dequantize(codes.quantize(w, scheme))
    rest = slice(scheme.segment, None)
    bound = 1.5e-4 if scheme.name == "int8" else 0.0065
    assert relative_error(w[:, rest], again[:, rest]) < bound


def test_tables_are_what_the_format_says() -> None:
    tables = grids.nl4_tables()
    assert tables.shape == (256, 16) and tables.dtype == np.int8
    assert tuple(tables[63]) == grids.GRIDS[0] and tuple(tables[127]) == grids.GRIDS[1]
    np.testing.assert_array_equal(tables[128:], -tables[:128])
    assert tables.min() == -127  # -128 has no negative in int8


def test_dense_schemes_have_no_codes() -> None:
    with pytest.raises(SchemeError, match="stores numbers"):
        codes.quantize(normal((4, 4)), Scheme.parse("bf16"))
