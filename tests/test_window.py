"""The streaming window: what a query sees, at what distance, and the same bits always."""

import numpy as np
import pytest

import tiny
from chalot.errors import ContextError
from chalot.kernels.backend import instruction_sets, open_backend
from chalot.kernels.program import PAGE, Batch, Program
from chalot.model.cache import PageCache, Sequence
from chalot.model.config import inverse_frequencies
from chalot.model.transformer import build
from chalot.model.window import Window
from test_exactness import digest, feed, ids

NATIVE = [name for name, runs in instruction_sets() if runs and name != "reference"]
SMALL = {"layers": 2, "feed_forward": 32, "vocabulary": 33}


def program(window: Window | None, cache: str = "int8", **changes: object) -> Program:
    """A tiny model with a window, or without one."""
    c = (window or Window()).of(tiny.config(**SMALL | changes))
    return build(c, tiny.weights(c, {"*": "nl4"}), inverse_frequencies(c), cache)


@pytest.mark.parametrize(
    ("size", "sinks", "length", "cache"),
    [
        (7, 2, 40, "int8"),
        (7, 2, 40, "f16"),
        (7, 2, 40, "f32"),
        (20, 4, PAGE + 4, "int8"),
        (9, 0, 40, "int8"),
    ],
)
def test_every_kernel_gives_the_bits_of_the_oracle(
    size: int, sinks: int, length: int, cache: str
) -> None:
    changes: dict[str, object] = {"layers": 1} if length > PAGE else {"head_norms": True}
    one = program(Window(size, sinks), cache, **changes)
    text = [ids(5, length) % 33]
    oracle = digest(feed(open_backend("reference"), one, text, length)[0])
    for isa in NATIVE:
        for threads, chunk in ((1, length), (3, 9)):
            assert digest(feed(open_backend(isa, threads), one, text, chunk)[0]) == oracle, isa
    everything = program(None, cache, **changes)
    assert oracle != digest(feed(open_backend(NATIVE[0]), everything, text, length)[0])


@pytest.mark.parametrize(("size", "sinks"), [(PAGE + 9, PAGE), (2 * PAGE, 4), (2 * PAGE + 1, 1)])
def test_windows_over_pages(size: int, sinks: int) -> None:
    """The oracle goes on in the pages that native code filled; pages that none needs are absent."""
    one = program(Window(size, sinks), layers=1)
    text, cache = ids(5, 4 * PAGE) % 33, PageCache(one.cache, 5 * PAGE)
    sequence = Sequence(cache)
    sequence.reserve(len(text))
    for end in (size + sinks - 1, size + sinks, size + sinks + 1, len(text)):
        at = np.arange(end - 1, end, dtype=np.int32)
        runs = [open_backend(isa, n).compile(one) for isa in NATIVE for n in (1, 3)]
        before = np.arange(sequence.length, end, dtype=np.int32)
        pages = cache.tables([sequence])
        gone = np.arange(pages.shape[1])
        gone = (gone >= -(-sinks // PAGE)) & (gone < (sequence.length + 1 - size) // PAGE)
        batch = Batch(
            text[before], before, 0 * before, np.where(gone, -1, pages), before[-1:] - before[0]
        )
        logits = [r.run(batch, cache.arena) for r in runs]
        last = Batch(text[at], at, 0 * at, pages, 0 * at)
        logits += [r.run(last, cache.arena) for r in runs]
        logits.append(open_backend("reference").compile(one).run(last, cache.arena))
        assert len({digest(x) for x in logits}) == 1, end
        sequence.length = end


@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_distances_are_those_within_the_cache(sinks: int) -> None:
    """With one layer, a query sees sinks and window as if they were the whole text (the paper)."""
    c = tiny.config(layers=1)
    w = tiny.weights(c, {"*": "f32"})

    def make(window: Window) -> Program:
        return build(window.of(c), w, inverse_frequencies(c), "f32")

    text, size, backend = ids(5, 200), 30, open_backend(None, 2)
    streamed = feed(backend, make(Window(size, sinks)), [text], 64)[0]
    for end in (20, size + sinks, size + sinks + 1, 100, 200):
        seen = (
            text[:end] if end <= size else np.r_[text[:sinks], text[max(end - size, sinks) : end]]
        )
        alone = feed(backend, make(Window()), [seen], 300)[0][-1]
        np.testing.assert_allclose(streamed[end - 1], alone, atol=2e-5)
    far = feed(backend, make(Window()), [text], 300)[0][-1]
    assert np.abs(streamed[-1] - far).max() > 1e-3


@pytest.mark.parametrize("isa", NATIVE)
def test_nothing_differs_before_the_sinks_are_left(isa: str) -> None:
    size, sinks, text = 33, 5, [ids(5, 300) % 33]
    whole = feed(open_backend(isa, 2), program(None), text, 300)[0]
    streamed = feed(open_backend(isa, 2), program(Window(size, sinks)), text, 7)[0]
    same = (whole == streamed).all(axis=1)
    assert same[: size + sinks].all() and not same[size + sinks :].any()


def test_layers_keep_a_smaller_window() -> None:
    ops = program(Window(20, 3), windows=(7, 100)).ops
    assert [(op.window, op.sinks) for op in ops if op.kind == "attend"] == [(7, 0), (20, 3)]
    text = [ids(5, 50) % 33]
    one = program(Window(20, 3), windows=(7, 0))
    oracle = digest(feed(open_backend("reference"), one, text, 50)[0])
    for isa in NATIVE:
        assert digest(feed(open_backend(isa, 2), one, text, 11)[0]) == oracle, isa


@pytest.mark.parametrize(
    ("size", "sinks", "words"),
    [
        (0, None, "--window 0: expected 1 position or more"),
        (-3, None, "--window -3"),
        (4, 4, "--sinks 4: expected 0 to 3, fewer than --window 4"),
        (1000, PAGE + 1, "--sinks 257: expected 0 to 256"),
        (9, -1, "--sinks -1"),
        (1021, None, "are more than the 1024 positions .* choose --window 1020 at most"),
        (None, 4, "only with a window; add --window 256"),
    ],
)
def test_what_is_no_window(size: int | None, sinks: int | None, words: str) -> None:
    with pytest.raises(ContextError, match=words):
        Window.parse(size, sinks, 1024)


@pytest.mark.parametrize(
    "changes",
    [
        {"sinks": (4, 4)},
        {"windows": (9, 9), "sinks": (4,)},
        {"windows": (9, 9), "sinks": (9, 9)},
        {"windows": (9, 9), "sinks": (-1, 0)},
        {"windows": (999, 999), "sinks": (257, 257)},
        {"windows": (9, 8), "sinks": (4, 4)},
    ],
)
def test_configurations_that_lie_about_sinks(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="sinks: expected one number"):
        tiny.config(**changes)
