"""chalot.quant and chalot.kernels as parts: the page's examples run, what is wrong is said."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chalot import kernels, quant
from chalot.errors import FormatError, KernelError, SchemeError

PAGE = (Path(__file__).parent.parent / "docs" / "parts.md").read_text("utf-8")
NATIVE = [name for name, runs in kernels.instruction_sets() if runs and name != "reference"]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def test_the_pages_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) > 6
    exec(compile("\n".join(blocks), "docs/parts.md", "exec"), {})


@pytest.mark.parametrize("room", [quant, kernels], ids=["quant", "kernels"])
def test_every_public_name_is_on_the_page_and_documented(room: object) -> None:
    for name in room.__all__:  # type: ignore[attr-defined]
        value = getattr(room, name)
        assert re.search(rf"\b{name}\b", PAGE), name
        if callable(value):
            assert inspect.getdoc(value), name
            assert f"{'quant' if room is quant else 'kernels'}.{name}" in PAGE, "an example"


@pytest.mark.parametrize("cache", ["int8", "f16", "f32"])
@pytest.mark.parametrize("tokens", [1, 3, 280])
def test_attention_is_the_formula(cache: str, tokens: int) -> None:
    """Over a page's end, one token, some, and all; a window; a cap; the same bits everywhere."""
    q, k, v = normal(tokens, 4, 24), normal(280, 2, 24), normal(280, 2, 24)[::-1]
    for window, cap in ((0, 0.0), (9, 0.0), (0, 2.0)):
        found = {
            isa: kernels.attention(
                q, k, v, cache=cache, scale=0.3, window=window, cap=cap,
                backend=kernels.open_backend(isa, 2),
            )
            for isa in [*NATIVE, *(["reference"] if tokens == 3 else [])]
        }  # fmt: skip
        first, *others = found.values()
        assert all(np.array_equal(first, other) for other in others)
        at, line = np.arange(280 - tokens, 280)[:, None], np.arange(280)[None]
        hidden = (line > at) | ((line <= at - window) if window else False)
        scores = np.einsum("thd,phd->htp", q, k.repeat(2, axis=1)).astype(np.float64) * 0.3
        scores = cap * np.tanh(scores / cap) if cap else scores
        weight = np.where(hidden, 0, np.exp(np.where(hidden, 0, scores)))
        weight /= weight.sum(axis=-1, keepdims=True)
        expected = np.einsum("htp,phd->thd", weight, v.repeat(2, axis=1))
        bound = {"f32": 1e-5, "f16": 2e-3, "int8": 0.03}[cache]
        assert np.abs(first - expected).max() < bound


@pytest.mark.parametrize("scheme", quant.SCHEMES)
def test_products_of_every_scheme(scheme: str) -> None:
    matrix = quant.as_matrix(normal(20, 200), quant.Scheme.parse(scheme))
    x = normal(2, 200)
    expected = kernels.product(matrix, x, backend=kernels.open_backend("reference"))
    np.testing.assert_array_equal(kernels.product(matrix, x), expected)


MATRIX = quant.as_matrix(normal(20, 64), quant.SCHEMES["int4"])
SHORT = quant.Matrix(MATRIX.scheme, MATRIX.shape, MATRIX.data[:-64], MATRIX.tables)
Q, K = normal(2, 4, 16), normal(5, 2, 16)
WRONG: dict[str, Callable[[], object]] = {
    "columns": lambda: kernels.product(MATRIX, normal(2, 65)),
    "one axis": lambda: kernels.product(MATRIX, normal(64)),
    "no tokens": lambda: kernels.product(MATRIX, normal(0, 64)),
    "no numbers": lambda: kernels.product(MATRIX, [["a"] * 64]),
    "ragged": lambda: kernels.product(MATRIX, [[1.0], [1.0, 2.0]]),
    "NaN": lambda: kernels.product(MATRIX, np.full((1, 64), np.nan)),
    "past float32": lambda: kernels.product(MATRIX, np.full((1, 64), 1e300)),
    "bits": lambda: kernels.product(MATRIX, normal(2, 64), bits=4),
    "a matrix cut short": lambda: kernels.product(SHORT, normal(2, 64)),
    "no queries": lambda: kernels.attention(Q[:0], K, K),
    "more queries than keys": lambda: kernels.attention(Q, K[:1], K[:1]),
    "values of another shape": lambda: kernels.attention(Q, K, K[:4]),
    "heads that do not share": lambda: kernels.attention(Q[:, :3], K, K),
    "head sizes": lambda: kernels.attention(Q[..., :8], K, K),
    "an odd head": lambda: kernels.attention(Q[..., :15], K[..., :15], K[..., :15]),
    "a vast head": lambda: kernels.attention(*(np.ones((1, 1, 2048)),) * 3),
    "cache": lambda: kernels.attention(Q, K, K, cache="int4"),
    "window": lambda: kernels.attention(Q, K, K, window=-1),
    "cap": lambda: kernels.attention(Q, K, K, cap=float("nan")),
    "scale": lambda: kernels.attention(Q, K, K, scale=float("inf")),
    "infinite keys": lambda: kernels.attention(Q, K * np.inf, K),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_said(name: str) -> None:
    with pytest.raises(KernelError, match="expected|matrix"):
        WRONG[name]()


def test_weights_that_are_no_matrix_are_refused() -> None:
    for w in (normal(3), normal(0, 3), np.full((2, 2), np.inf)):
        for scheme in ("nl4", "bf16"):
            with pytest.raises(SchemeError, match="expected"):
                quant.as_matrix(w, quant.SCHEMES[scheme])
    with pytest.raises(FormatError, match="expected"):
        quant.unpack(MATRIX.data[:-1], MATRIX.scheme, MATRIX.shape)
