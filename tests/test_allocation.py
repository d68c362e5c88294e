"""Laws of the planner's arithmetic: entropies against formulas, allocations against trying all."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chalot.quant.allocation import Option, allocate, hull, least
from chalot.quant.entropy import (
    Entropy,
    block_entropy,
    codes_entropy,
    decide,
    fit,
    histogram_entropy,
    softmax_entropy,
)

options = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=4, unique=True
).map(lambda pairs: [Option(str(n), b, float(loss)) for n, (b, loss) in enumerate(pairs)])


def best_of_all(items: list[list[Option]], budget: int) -> float:
    return min(
        (
            sum(o.loss for o in plan)
            for plan in itertools.product(*items)
            if sum(o.bytes for o in plan) <= budget
        ),
        default=math.inf,
    )


@settings(max_examples=150, deadline=None)
@given(items=st.lists(options, min_size=1, max_size=5), budget=st.integers(1, 200))
def test_an_allocation_fits_and_is_near_the_best(items: list[list[Option]], budget: int) -> None:
    found = allocate(items, budget)
    if found is None:
        assert least(items) > budget
        return
    assert found.bytes <= budget
    assert all(o in options for o, options in zip(found.chosen, items, strict=True))
    step = max(a.loss - b.loss for h in map(hull, items) for a in h for b in h)
    assert found.loss <= best_of_all(items, budget) + step


@settings(max_examples=60, deadline=None)
@given(items=st.lists(options, min_size=1, max_size=4))
def test_at_the_corners_it_is_the_best(items: list[list[Option]]) -> None:
    for multiplier in (0.1, 1.0, 5.0):
        plan = [min(o, key=lambda o: (o.loss + multiplier * o.bytes, o.bytes)) for o in items]
        budget = sum(o.bytes for o in plan)
        found = allocate(items, budget)
        assert found is not None
        assert found.loss == pytest.approx(sum(o.loss for o in plan), abs=1e-9)


def test_a_hull_is_convex_and_falls() -> None:
    made = hull(
        [Option("a", 1, 9.0), Option("b", 2, 8.5), Option("c", 3, 2.0), Option("d", 9, 3.0)]
    )
    assert [o.name for o in made] == ["a", "c"]


def test_softmax_entropy_of_equal_weights_is_log_n() -> None:
    w = np.full((40, 50), 0.02, np.float32)
    found = softmax_entropy(lambda: [w[:10], w[10:]])
    assert found.entropy == pytest.approx(math.log(2000)) and abs(found.deficit) < 1e-12
    with_epsilon = softmax_entropy(lambda: [w], 0.01)
    assert with_epsilon.entropy == pytest.approx(-math.log(1 / 2000 + 0.01))


def test_softmax_entropy_ranks_small_weights_by_variance() -> None:
    rng = np.random.default_rng(0)
    for scale in (0.01, 0.05):
        w = (rng.standard_normal((300, 200)) * scale).astype(np.float32)
        assert softmax_entropy(lambda w=w: [w]).deficit == pytest.approx(scale**2 / 2, rel=0.05)


def test_histogram_and_codes() -> None:
    even = np.arange(128 * 4, dtype=np.float32).reshape(4, 128)
    assert histogram_entropy(lambda: [even]).entropy == pytest.approx(7, abs=0.01)
    assert histogram_entropy(lambda: [np.zeros((2, 3), np.float32)]).entropy == 0
    four = np.array([[0, 1, 2, 3]], np.uint8)
    assert codes_entropy([four, four], 16).entropy == pytest.approx(2)


def test_blocks_and_the_rule() -> None:
    block = block_entropy([Entropy(1.0, 0, 100), Entropy(3.0, 0, 300)])
    assert block.entropy == pytest.approx(2.5)
    found = decide([1.0, 5.0, 5.0, 9.0])
    assert found.mean == 5 and found.sigma == pytest.approx(math.sqrt(8))
    assert found.levels == ("low", "middle", "middle", "raw") and not found.indistinct
    assert decide([5.0, 5.0 + 1e-8]).indistinct


def test_a_budget_demotes_the_lowest_first_and_promotes_the_highest() -> None:
    sizes = [{"low": 4, "middle": 8, "raw": 16}] * 3
    entropies = [1.0, 2.0, 3.0]
    assert fit(entropies, ["raw"] * 3, sizes, 40) == ("middle", "raw", "raw")
    assert fit(entropies, ["low"] * 3, sizes, 24) == ("low", "low", "raw")
    assert fit(entropies, ["raw"] * 3, sizes, 12) == ("low", "low", "low")
    assert fit(entropies, ["raw"] * 3, sizes, 11) is None
