"""The paged cache and its budget: sizes, what a full one says, what a context becomes."""

from pathlib import Path

import pytest

import chalot
from chalot import cli
from chalot.errors import ContextError
from chalot.kernels.program import PAGE, CacheShape
from chalot.load import Model
from chalot.model.cache import PageCache, Sequence
from chalot.table import parse_size

SHAPE = CacheShape("int8", 2, 2, 24)


def test_bytes_of_a_position() -> None:
    """Codes padded to 16 with a scale a head: less than a third of float32."""
    assert SHAPE.position_bytes == 2 * 2 * 2 * (32 + 4)
    for kind, number in (("f16", 2), ("f32", 4)):
        assert CacheShape(kind, 2, 2, 24).position_bytes == 2 * 2 * 2 * 32 * number
    assert SHAPE.page_bytes == PAGE * SHAPE.position_bytes
    qwen = CacheShape("int8", 24, 2, 64)  # Qwen2.5-0.5B
    assert qwen.position_bytes * 4096 < 28e6


def test_pages_go_round() -> None:
    cache = PageCache(SHAPE, 3 * PAGE)
    a, b = Sequence(cache), Sequence(cache)
    a.reserve(PAGE + 1)
    b.reserve(1)
    assert len({*a.pages, *b.pages}) == 3
    assert cache.tables([a, b]).tolist() == [a.pages, [*b.pages, -1]]
    a.length = PAGE + 1
    a.truncate(PAGE)
    assert len(a.pages) == 1
    b.reserve(2 * PAGE)
    with pytest.raises(ContextError, match="all 768 positions.*--kv-budget"):
        b.reserve(2 * PAGE + 1)
    a.close(), b.close()
    assert sorted(cache.free) == [0, 1, 2]


@pytest.mark.parametrize("pages", [1, 2])
def test_a_budget_is_rounded_down_to_pages(pages: int) -> None:
    for extra in (0, SHAPE.page_bytes - 1):
        cache = PageCache(SHAPE, 10 * PAGE, pages * SHAPE.page_bytes + extra)
        assert cache.count == pages and cache.arena.nbytes == pages * SHAPE.page_bytes


def test_a_budget_of_no_page_is_refused() -> None:
    with pytest.raises(ContextError, match=f"holds nothing: 256 .* {SHAPE.page_bytes}; .*budget"):
        PageCache(SHAPE, PAGE, SHAPE.page_bytes - 1)


def test_default_context_is_what_the_budget_holds(demo_file: Path, model: Model) -> None:
    page = model.engine.cache.shape.page_bytes
    for pages, expected in ((1, PAGE), (2, 2 * PAGE), (3, 3 * PAGE), (99, model.config.context)):
        with chalot.load(demo_file, kv_budget=pages * page + 1) as small:
            assert small.context == expected
            assert small.engine.cache.arena.nbytes <= pages * page
    with chalot.load(demo_file, kv="f32", kv_budget=4 * page) as wide:
        assert wide.context == PAGE  # 4 numbers of float32 where int8 has 16 codes and a scale
    with pytest.raises(ContextError, match="--kv-budget"):
        chalot.load(demo_file, kv_budget=page - 1)


def test_a_full_cache_names_what_helps(demo_file: Path, model: Model) -> None:
    """Below the context, at the budget: an error, and what was read goes on."""
    page = model.engine.cache.shape.page_bytes
    with chalot.load(demo_file, context=1024, kv_budget=page) as small:
        session = small.session(temperature=0)
        session.prefill([5] * (PAGE - 1))
        first = session.step()
        with pytest.raises(ContextError, match="all 256 positions.*--context or --kv-budget"):
            for _ in range(3):
                session.step()
        session.close()
        with small.session(temperature=0) as again:
            again.prefill([5] * (PAGE - 1))
            assert again.step() == first


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("268435456", 268_435_456),
        ("512MB", 512_000_000),
        ("512M", 512_000_000),
        ("1.5 GB", 1_500_000_000),
        (" 7kB ", 7_000),
        ("10B", 10),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e9", "512mb", "512 MiB", "1,5GB", "5 G B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="no size; expected bytes"):
        parse_size(text)


def test_the_option(demo_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["run", str(demo_file), "def f", "--max-tokens", "3", "--seed", "1", "-q"]
    assert cli.main(run) == 0
    plain = capsys.readouterr().out
    assert cli.main([*run, "--kv-budget", "1MB"]) == 0
    assert capsys.readouterr().out == plain
    assert cli.main([*run, "--kv-budget", "5kB"]) == 1
    assert "5000 bytes holds nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main([*run, "--kv-budget", "lots"])
    assert ended.value.code == 2 and "'lots' is no size" in capsys.readouterr().err


@pytest.mark.parametrize("at", [PAGE - 1, PAGE, PAGE + 1])
def test_a_fork_shares_pages_until_it_writes(at: int) -> None:
    """What one writes, the other does not see; a copy is taken of the page in hand alone."""
    cache = PageCache(SHAPE, 6 * PAGE)
    pages = cache.arena.reshape(cache.count, -1)
    first = Sequence(cache)
    first.reserve(2 * PAGE)
    first.length = 2 * PAGE
    pages[first.pages[0]], pages[first.pages[1]] = 1, 2
    second = first.fork(at)
    assert second.pages == first.pages[: -(-at // PAGE)] and len(cache.free) == 4
    second.reserve(at + 1)
    second.length = at + 1
    written = second.pages[at // PAGE]
    assert written not in first.pages
    if at % PAGE:  # the positions before are there still
        assert (pages[written] == 1 + at // PAGE).all()
    pages[written] = 9
    assert (pages[first.pages] == [[1], [2]]).all()
    first.close()
    second.reserve(2 * PAGE)  # nobody else holds what it has now: no copies
    assert second.pages[at // PAGE] == written
    second.close()
    assert sorted(cache.free) == list(range(6)) and not any(cache.users)
