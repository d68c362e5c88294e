"""The scheduler against a model that is none: a position holds a hash of its token and of what the
position before it holds, and logits are a hash of all positions. So a page that is wrong, stale, or
was read behind another text changes the answer. Random requests, cancellations,
drafts, few pages; every answer is what the tokens say, and every page comes back."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chalot.engine.generate import Engine
from chalot.engine.sampler import Sampling
from chalot.engine.scheduler import OutOfPages, Request, Scheduler
from chalot.kernels.program import PAGE, Batch, CacheShape
from chalot.kernels.reference import best_of, exp
from chalot.model.cache import PageCache

SHAPE = CacheShape("f32", 1, 1, 1)
VOCABULARY, CONTEXT = 32, 1200
NEVER = -7  # what an unwritten position holds


def held_after(before: int, token: int) -> int:
    """What a position holds, by the one before it: 31 bits."""
    return zlib.crc32(int(token).to_bytes(4, "little"), before) >> 1


def logits_after(held: np.ndarray) -> np.ndarray:
    """(vocabulary,) float32, by what all positions hold."""
    number = zlib.crc32(held.astype("<i4").tobytes())
    # three tokens are far likelier than others: texts repeat themselves
    spread = (np.arange(VOCABULARY) * 2654435761 + number) % 1009 / 300
    spread[number % 3] += 4
    return spread.astype(np.float32)


class Hashing:
    """A Runnable that keeps hashes in the pages."""

    def run(self, batch: Batch, arena: np.ndarray) -> np.ndarray:
        pages = arena.view(np.int32).reshape(-1, SHAPE.page_bytes // 4)
        for token, position, row in zip(
            batch.tokens, batch.positions, batch.sequences, strict=True
        ):
            before = 0
            if position:
                page = batch.pages[row, (position - 1) // PAGE]
                before = int(pages[page, (position - 1) % PAGE])
                assert before != NEVER, "a position was left out"
            page = batch.pages[row, position // PAGE]
            pages[page, position % PAGE] = held_after(before, token)
        rows = []
        for at in batch.wanted:
            end = int(batch.positions[at]) + 1
            table = batch.pages[batch.sequences[at], : -(-end // PAGE)]
            read = pages[table, :PAGE].reshape(-1)[:end]
            assert (read >= 0).all(), "a position was read that nobody had written"
            rows.append(logits_after(read))
        return np.array(rows, np.float32).reshape(-1, VOCABULARY)

    def best(self, batch: Batch, arena: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        return best_of(self.run(batch, arena), count)


class Cache(PageCache):
    """A page that is handed out holds nothing."""

    def take(self) -> int:
        page = super().take()
        self.arena.view(np.int32).reshape(self.count, -1)[page] = NEVER
        return page


def greedy(ids: list[int], count: int, ends: frozenset[int] = frozenset()) -> list[int]:
    """The greedy answer, from the tokens themselves."""
    held: list[int] = []
    for token in ids:
        held.append(held_after(held[-1] if held else 0, token))
    answer: list[int] = []
    while len(answer) < count and not (answer and answer[-1] in ends):
        answer.append(int(np.argmax(logits_after(np.array(held)))))
        held.append(held_after(held[-1], answer[-1]))
    return answer


def alone(request: Request) -> list[int]:
    return greedy(request.ids, min(request.max_tokens, CONTEXT - len(request.ids)), request.ends)


@dataclass
class Guessing:
    """A drafter whose guesses are now right, now wrong."""

    number: int = 0
    learnt: list[int] = field(default_factory=list)

    def propose(self, text, most: int) -> list[int]:
        self.number += 1
        draft = greedy(text.tokens, min(most, self.number % 6))
        if draft and self.number % 4 == 0:
            draft[self.number % len(draft)] = 31
        return draft

    def learn(self, kept: int) -> None:
        self.learnt.append(kept)

    def truncate(self, length: int) -> None: ...

    def close(self) -> None: ...


def scheduler(pages: int, drafts: bool, **options) -> Scheduler:
    engine = Engine(Hashing(), Cache(SHAPE, pages * PAGE), VOCABULARY, CONTEXT, exp)  # type: ignore[arg-type]
    made: Callable[..., Guessing] | None = (lambda costs: Guessing()) if drafts else None
    s = Scheduler(engine, drafter=made, **options)
    s.drafting.pays = lambda: True  # type: ignore[method-assign]
    return s


def check_pages(s: Scheduler) -> None:
    """Each page is free, or held as often as texts and the prefix cache say."""
    held = np.zeros(s.engine.cache.count, int)
    for text in [*s.running, *s.waiting]:
        np.add.at(held, text.sequence.pages, 1)
    np.add.at(held, list(s.prefixes.pages.values()), 1)
    assert held.tolist() == s.engine.cache.users
    assert sorted(s.engine.cache.free) == np.flatnonzero(held == 0).tolist()


requests = st.builds(
    lambda beginning, shared, seed, own, most, ends, space: Request(
        ([beginning] * PAGE + [7] * PAGE)[:shared]
        + np.random.Generator(np.random.Philox(seed))
        .integers(0, VOCABULARY, own if shared else max(own, 1))
        .tolist(),
        Sampling(temperature=0),
        most,
        frozenset(ends),
        namespace=space,
    ),
    st.integers(0, 1),
    st.sampled_from([0, 0, PAGE, 300, 2 * PAGE]),
    st.integers(0, 99),
    st.sampled_from([0, 1, 3, 90, PAGE - 1, PAGE, PAGE + 1]),
    st.sampled_from([1, 2, 9, 40, 300]),
    st.sampled_from([(), (5,)]),
    st.sampled_from([b"", b"key"]),
)


@given(
    st.lists(st.tuples(requests, st.integers(0, 4), st.booleans()), min_size=1, max_size=14),
    st.integers(4, 16),
    st.integers(1, 8),
    st.sampled_from([1, 40, 256, 700]),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_every_answer_is_its_own(todo, pages, slots, chunk, prefix_pages, drafts) -> None:
    s = scheduler(pages, drafts, slots=slots, chunk=max(chunk, 40), prefix_pages=prefix_pages)
    tickets = []
    for request, passes, cancel in todo:
        tickets.append((s.submit(request), cancel))
        for _ in range(passes):
            s.run_once()
            check_pages(s)
        if cancel:
            s.cancel(tickets[-1][0])
    bound = 20 + sum(len(r.ids) + r.max_tokens for r, _, _ in todo) * 4
    while s.run_once():
        check_pages(s)
        bound -= 1
        assert bound > 0, "no end"
    for ticket, cancelled in tickets:
        expected = alone(ticket.request)
        got = []
        try:
            for step in ticket.results(timeout=0):
                got += [step.token] if step.token >= 0 else []
                last = step.finished
        except OutOfPages:
            assert len(ticket.request.ids) + ticket.request.max_tokens > pages * PAGE
            continue
        assert got == expected[: len(got)]
        assert last == "cancelled" if len(got) < len(expected) else last in ("length", "stop")
        assert cancelled or last != "cancelled"
    assert not s.running and not s.waiting
    s.close()
    assert sorted(s.engine.cache.free) == list(range(pages)) and not any(s.engine.cache.users)


def test_a_wrong_page_is_seen() -> None:
    """The hash does see what it must: a page whose content changes changes the answer."""
    s = scheduler(8, False, slots=1)
    request = Request([3] * 300, Sampling(temperature=0), 5)
    for spoil in (False, True):
        ticket = s.submit(request)
        if spoil:
            s.engine.cache.arena.view(np.int32)[
                next(iter(s.prefixes.pages.values())) * SHAPE.page_bytes // 4
            ] = 4
        while s.run_once():
            pass
        assert ([x.token for x in ticket.results(timeout=0)] == alone(request)) != spoil


@pytest.mark.parametrize("first", [[1] * PAGE, [2] * (PAGE - 1) + [3]])
def test_a_page_belongs_to_what_stands_before_it(first: list[int]) -> None:
    """Equal second pages behind different first ones; and prompts that end with a page."""
    s = scheduler(12, False, slots=3)
    for beginning in ([2] * PAGE, first, [2] * PAGE):
        for rest in ([7] * PAGE, [7] * PAGE + [8]):
            request = Request(beginning + rest, Sampling(temperature=0), 4)
            ticket = s.submit(request)
            while s.run_once():
                pass
            assert [x.token for x in ticket.results(timeout=0)] == alone(request)
    assert ticket.cached_tokens == 2 * PAGE


def test_a_callback_that_fails_ends_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    s = scheduler(8, True, slots=4)
    request = Request([3] * 30, Sampling(temperature=0), 9)

    def broken(step: object) -> None:
        raise RuntimeError("no")

    bad, good = s.submit(request, on_step=broken), s.submit(request)
    while s.run_once():
        pass
    assert [x.token for x in good.results(timeout=0)] == alone(request)
    assert bad.done and "on_step failed" in caplog.text and s.stats.cancelled == 1
    s.close()
    assert len(s.engine.cache.free) == 8
