"""Laws of sampling: one token for given logits, seed, choice and position, on every machine."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chalot.engine.randomness import uniform
from chalot.engine.sampler import Sampling, SamplingError, choose, wanted
from chalot.errors import ChalotError, KernelError
from chalot.kernels.reference import best_of, exp

KNOWN_UNIFORM = [0.13870941014555427, 0.6935121390102292, 0.38630104042438296]
logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


def draw(logits: list[float], before: tuple[int, ...] = (), position: int = 0, **options) -> int:
    sampling = Sampling(**options)
    count = wanted(before, sampling, len(logits))
    ids, best = best_of(np.array([logits], np.float32), count)
    return choose(ids[0], best[0], before, sampling, position, exp)


@given(logit_lists)
def test_greedy_takes_the_first_of_the_largest(logits: list[float]) -> None:
    assert draw(logits, temperature=0) == int(np.argmax(np.array(logits, np.float32)))


@given(logit_lists, st.integers(0, 2**32), st.integers(0, 1000))
def test_one_candidate_is_greedy(logits: list[float], seed: int, position: int) -> None:
    expected = draw(logits, temperature=0)
    narrow = ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0, "top_k": 1})
    for options in narrow:
        assert draw(logits, position=position, seed=seed, **options) == expected


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 31))
def test_candidates_fall_by_logit_then_rise_by_id(logits: list[int], top_k: int) -> None:
    top_k = min(top_k, len(logits))
    ids, best = best_of(np.array([logits], np.float32), top_k)
    expected = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert list(ids[0]) == expected[:top_k]
    assert list(best[0]) == [logits[i] for i in expected[:top_k]]


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    st.lists(st.integers(0, 29), max_size=6),
    st.sampled_from([0.5, 1.0, 1.5]),
    st.integers(0, 31),
)
def test_few_candidates_are_enough(
    logits: list[int], before: list[int], penalty: float, top_k: int
) -> None:
    """The candidates that `wanted` asks for choose as all of them would."""
    for temperature in (0, 1):
        sampling = Sampling(temperature, top_k, repetition_penalty=penalty)
        count = wanted(before, sampling, len(logits))
        chosen = set()
        for kept in (count, len(logits)):
            ids, best = best_of(np.array([logits], np.float32), kept)
            chosen.add(choose(ids[0], best[0], before, sampling, 3, exp))
        assert len(chosen) == 1


def test_frequencies_follow_probabilities() -> None:
    probabilities = np.array([0.5, 0.25, 0.125, 0.125])
    logits = list(np.log(probabilities))
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3}
    drawn = [draw(logits, position=p, **options) for p in range(4000)]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, probabilities, atol=0.03)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = list(np.log([0.4, 0.3, 0.2, 0.1]))
    options = {"temperature": 1.0, "top_k": 0, "min_p": 0.0}
    for top_p, kept in ((0.35, {0}), (0.65, {0, 1}), (0.85, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        drawn = {draw(logits, position=p, top_p=top_p, **options) for p in range(300)}
        assert drawn == kept


def test_min_p_is_a_part_of_the_likeliest() -> None:
    logits = list(np.log([0.5, 0.3, 0.15, 0.05]))
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.25}
    assert {draw(logits, position=p, **options) for p in range(300)} == {0, 1, 2}


def test_repetition_is_penalised_once_however_often_seen() -> None:
    logits = [2.0, 1.5]
    options = {"temperature": 0, "repetition_penalty": 1.3}
    assert draw(logits, (0,), **options) == 0  # 2 / 1.3 = 1.54: once is not enough
    assert draw(logits, (0,) * 50, **options) == 0
    assert draw(logits, (0,), temperature=0, repetition_penalty=1.4) == 1
    assert draw(logits, (0, *(1,) * 64), temperature=0, repetition_penalty=9.0) == 0  # window


def test_seed_choice_and_position_each_change_the_draw() -> None:
    numbers = {uniform(s, c, p) for s in range(10) for c in range(10) for p in range(10)}
    assert len(numbers) == 1000
    assert all(0 <= n < 1 for n in numbers)


def test_random_numbers_are_the_committed_ones() -> None:
    assert [uniform(0, 0, 0), uniform(1, 0, 0), uniform(1, 1, 7)] == KNOWN_UNIFORM


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(KernelError, match="NaN or Inf"):
        draw([0.0, bad, 1.0])


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": float("nan")}, {"seed": "x"}],
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(SamplingError) as caught:
        Sampling(**options)
    assert isinstance(caught.value, ChalotError) and next(iter(options)) in str(caught.value)
