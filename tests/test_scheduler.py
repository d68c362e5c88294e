"""Laws of the scheduler: whatever else runs, a request gets what it would have got alone."""

import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chalot
from chalot.engine.drafting import TextDrafter
from chalot.engine.generate import Engine
from chalot.engine.pacing import StepCosts
from chalot.engine.plan import shares
from chalot.engine.sampler import Sampling, SamplingError
from chalot.engine.scheduler import OutOfPages, QueueFull, Request, Scheduler, Step, Ticket
from chalot.engine.worker import Worker
from chalot.errors import ChalotError, ContextError, KernelError
from chalot.kernels.program import PAGE
from chalot.load import Model
from chalot.model.cache import PageCache

VOCABULARY = 4096  # of the bundled model
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def demo(demo_file: Path) -> Iterator[Model]:
    with chalot.load(demo_file, threads=1) as model:
        yield model


def scheduler(model: Model, pages: int = 100, **options) -> Scheduler:
    cache = PageCache(model.engine.cache.shape, pages * PAGE)
    engine = replace(model.engine, cache=cache, costs=StepCosts())
    return Scheduler(engine, **{"slots": 8, "drafter": None, **options})


def ids(seed: int, count: int) -> list[int]:
    rng = np.random.Generator(np.random.Philox(seed))
    return rng.integers(0, VOCABULARY, count).tolist()


def drain(s: Scheduler) -> None:
    while s.run_once():
        pass


def answer(ticket: Ticket) -> list[Step]:
    return list(ticket.results(timeout=0))


def alone(model: Model, request: Request) -> list[Step]:
    """On an idle scheduler with a cache that nothing else was in."""
    s = scheduler(model, slots=1)
    ticket = s.submit(request)
    drain(s)
    return answer(ticket)


def by_session(model: Model, request: Request) -> list[int]:
    options = {f.name: getattr(request.sampling, f.name) for f in fields(Sampling)}
    with model.session(**options) as session:
        session.prefill(request.ids)
        return [session.step() for _ in range(request.max_tokens)]


class Right:
    """A drafter that knows the answers of requests by their prompts, and now and then is wrong."""

    answers: dict[tuple[int, ...], list[int]] = {}

    def __init__(self, costs: object = None) -> None:
        self.learnt: list[int] = []

    def propose(self, text, most: int) -> list[int]:
        answer = self.answers[tuple(text.tokens[: text.start])]
        at = len(text.tokens) - text.start
        draft = answer[at : at + min(most, 5)]
        if len(text.tokens) % 3 == 0 and draft:
            draft[-1] = (draft[-1] + 1) % VOCABULARY
        return draft

    def learn(self, kept: int) -> None:
        self.learnt.append(kept)

    def truncate(self, length: int) -> None: ...

    def close(self) -> None: ...


class Even:
    """A mask: even ids only, and from the third token on but a few."""

    def allowed(self, tokens: list[int]) -> np.ndarray:
        bits = np.full(VOCABULARY // 32, 0x55555555, np.uint32)
        if len(tokens) >= 3:
            bits[2:] = 0
        return bits


def mixed(count: int = 64) -> list[Request]:
    """Requests of every kind: lengths around pages, options, seeds, shared beginnings."""
    beginning = ids(99, 700)
    out = []
    for i in range(count):
        length = (1, 40, PAGE - 9, 90, PAGE, PAGE - 5, PAGE - 12, 20)[i % 8]
        shared = (0, 0, 0, 270, 0, 0, 0, 530)[i // 2 % 8]
        sampling = Sampling(
            temperature=(0.0, 0.9, 1.3)[i % 3],
            top_k=(40, 0, 700)[i // 3 % 3],
            repetition_penalty=(1.0, 1.2)[i % 5 == 1],
            presence_penalty=(0.0, 0.7, -0.4)[i % 4 % 3],
            frequency_penalty=(0.0, 0.5)[i % 7 == 3],
            seed=i,
            choice=i % 2,
        )
        out.append(
            Request(
                (beginning[:shared] + ids(i, length))[:900],
                sampling,
                max_tokens=3 + 11 * i % 30,
                logprobs=(None, 0, 4)[i % 3] if i % 2 else None,
                prompt_logprobs=i % 16 == 5,
                namespace=b"ab"[i % 2 : i % 2 + 1],
                mask=Even() if i % 8 == 7 else None,
                bias={5: 3.0, 9: -100.0} if i % 9 == 4 else {},
            )
        )
    return out


@pytest.fixture(scope="module")
def expected(demo: Model) -> list[list[Step]]:
    return [alone(demo, request) for request in mixed()]


def test_an_idle_scheduler_is_a_session(demo: Model, expected: list[list[Step]]) -> None:
    for request, steps in zip(mixed(), expected, strict=True):
        if not (request.mask or request.bias):
            assert [s.token for s in steps] == by_session(demo, request)
        assert [s.finished for s in steps] == [None] * (request.max_tokens - 1) + ["length"]


@pytest.mark.parametrize(
    ("pages", "options"),
    [
        (300, {"slots": 64}),
        (14, {"slots": 16}),
        (300, {"slots": 7, "chunk": 33, "prefix_pages": 0}),
    ],
)
def test_64_requests_get_what_they_get_alone(
    demo: Model, expected: list[list[Step]], pages: int, options: dict
) -> None:
    """To the last bit of every log-probability; with page pressure and cancellations in between."""
    s = scheduler(demo, pages, **options)
    requests = mixed()
    tickets, given_up = [], []
    for i, request in enumerate(requests):
        tickets.append(s.submit(request))
        if i % 5 == 0:
            given_up.append(s.submit(replace(request, max_tokens=200)))
        if i % 3 == 0:
            s.run_once()
        if i % 10 == 9:
            s.cancel(given_up[-1])
    for ticket in given_up:
        s.run_once()
        s.cancel(ticket)
    drain(s)
    for ticket, steps in zip(tickets, expected, strict=True):
        assert answer(ticket) == steps
    assert all(answer(t)[-1].finished == "cancelled" for t in given_up)
    stats = s.stats
    assert (stats.finished, stats.cancelled, stats.failed) == (64, len(given_up), 0)
    assert bool(stats.preemptions) == (pages == 14)
    assert bool(stats.prefix_hits) == (options.get("prefix_pages") != 0)
    s.close()
    assert sorted(s.engine.cache.free) == list(range(pages))


@pytest.mark.parametrize("pages", [300, 12])
def test_drafts_change_nothing(
    demo: Model, expected: list[list[Step]], pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right and wrong drafts, of many texts in one pass, over the ends of pages."""
    requests = mixed()
    answers = {
        tuple(r.ids): [s.token for s in steps] for r, steps in zip(requests, expected, strict=True)
    }
    monkeypatch.setattr(Right, "answers", answers)
    s = scheduler(demo, pages, slots=20, chunk=500, drafter=Right)
    monkeypatch.setattr(s.drafting, "pays", lambda: True)
    tickets = [s.submit(r) for r in requests]
    drain(s)
    for ticket, steps in zip(tickets, expected, strict=True):
        assert answer(ticket) == steps
    stats = s.stats
    assert stats.accepted > 100 and stats.drafted > stats.accepted + 10
    s.close()
    assert sorted(s.engine.cache.free) == list(range(pages))


def test_a_text_that_repeats_itself_drafts(demo: Model) -> None:
    s = scheduler(demo, drafter=TextDrafter)
    s.costs.one = 1.0  # measured times would make this test depend on the machine
    s.costs.relative = {2: 1.01, 17: 1.1}
    s.costs.note = lambda tokens, seconds: None  # type: ignore[method-assign]
    request = Request(ids(1, 7) * 9, GREEDY, 60)
    ticket = s.submit(request)
    drain(s)
    assert [x.token for x in answer(ticket)] == by_session(demo, request)
    assert s.stats.drafted >= s.stats.accepted > 0


def test_texts_that_gave_up_their_pages_go_on_as_if_nothing_was(demo: Model) -> None:
    requests = [
        Request(ids(i, PAGE - 9), Sampling(seed=i), 30, logprobs=1, prompt_logprobs=i % 2 == 0)
        for i in range(10)
    ]
    s = scheduler(demo, 11, slots=10, chunk=999)
    tickets = [s.submit(r) for r in requests]
    drain(s)
    assert s.stats.preemptions >= 5
    for ticket in tickets:
        assert answer(ticket) == alone(demo, ticket.request)


def test_log_probabilities_are_those_of_the_logits(demo: Model) -> None:
    prompt = ids(3, 60)
    (step,) = alone(demo, Request(prompt, GREEDY, 1, logprobs=5, prompt_logprobs=True))
    logits = demo.logits(prompt).astype(np.float64)
    largest = logits.max(axis=1, keepdims=True)
    truth = logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    assert step.prompt is not None and len(step.prompt) == 60
    assert step.prompt[0] == (prompt[0], None, [])
    for i, (token, logprob, top) in enumerate(step.prompt[1:]):
        assert token == prompt[i + 1] and abs(logprob - truth[i, token]) < 1e-6
        best = np.lexsort((np.arange(VOCABULARY), -logits[i]))[:5]
        assert [t for t, _ in top] == best.tolist()
    assert abs(step.logprob - truth[-1].max()) < 1e-6 and step.top[0] == step[:2]


def test_nothing_asked_for_but_the_prompt(demo: Model) -> None:
    (step,) = alone(demo, Request(ids(1, 30), GREEDY, 0, prompt_logprobs=True))
    assert (step.token, step.finished, len(step.prompt or [])) == (-1, "length", 30)


def test_an_end_id_is_reported_and_stops(demo: Model) -> None:
    request = Request(ids(2, 20), GREEDY, 30)
    tokens = [s.token for s in alone(demo, request)]
    steps = alone(demo, replace(request, ends=frozenset({tokens[4]})))
    assert [s.token for s in steps] == tokens[: tokens.index(tokens[4]) + 1]
    assert steps[-1].finished == "stop"


def test_the_context_is_the_end(demo: Model) -> None:
    steps = alone(demo, Request(ids(4, demo.context - 3), GREEDY, 100))
    assert len(steps) == 3 and steps[-1].finished == "length"


def test_a_mask_is_kept(demo: Model, expected: list[list[Step]]) -> None:
    for request, steps in zip(mixed(), expected, strict=True):
        if request.mask:
            assert all(s.token % 2 == 0 for s in steps)
            assert all(s.token < 64 for s in steps[3:])


def test_a_bias_decides(demo: Model) -> None:
    steps = alone(demo, Request(ids(4, 9), GREEDY, 4, bias={77: 100.0}))
    assert [s.token for s in steps] == [77] * 4


class Failing:
    def __init__(self, error: ChalotError) -> None:
        self.error = error

    def allowed(self, tokens: list[int]) -> np.ndarray | None:
        if len(tokens) == 2:
            raise self.error
        return None


def test_one_fails_and_the_others_go_on(demo: Model) -> None:
    s = scheduler(demo)
    request = Request(ids(5, 50), GREEDY, 6)
    bad = s.submit(replace(request, mask=Failing(ContextError("no way on"))))
    nothing = s.submit(replace(request, mask=type("None_", (), {
        "allowed": lambda self, tokens: np.zeros(3, np.uint32)})()))  # fmt: skip
    good = s.submit(request)
    drain(s)
    results = bad.results(timeout=0)
    assert [next(results).token, next(results).token] == [x.token for x in answer(good)][:2]
    with pytest.raises(ContextError, match="no way on"):
        next(results)
    with pytest.raises(SamplingError, match="allows no token"):
        answer(nothing)
    assert s.stats.failed == 2 and not s.running


def test_a_pass_that_fails_ends_those_in_it_alone(
    demo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = scheduler(demo, slots=2)
    request = Request(ids(6, 10), GREEDY, 3)
    tickets = [s.submit(request) for _ in range(3)]
    whole = Engine.best

    def broken(*_: object) -> None:
        monkeypatch.setattr(Engine, "best", whole)
        raise KernelError("cut off")

    monkeypatch.setattr(Engine, "best", broken)
    drain(s)
    for ticket in tickets[:2]:
        with pytest.raises(KernelError, match="cut off"):
            answer(ticket)
    assert len(answer(tickets[2])) == 3
    s.close()
    assert len(s.engine.cache.free) == s.engine.cache.count


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"ids": []}, ContextError, "empty"),
        ({"ids": [0, VOCABULARY]}, ContextError, "token ids must be"),
        ({"ids": [-1]}, ContextError, "token ids must be"),
        ({"ids": [1] * 1024}, ContextError, "need 1025 tokens"),
        ({"ids": [1] * 600}, OutOfPages, "3 pages of the cache, which has 2"),
        ({"max_tokens": -1}, SamplingError, "max_tokens"),
        ({"logprobs": -1}, SamplingError, "logprobs"),
        ({"bias": {VOCABULARY: 1.0}}, SamplingError, "bias"),
        ({"bias": {1: float("nan")}}, SamplingError, "bias"),
        ({"bias": {1: 1e300}}, SamplingError, "bias"),
    ],
)
def test_bad_requests_are_refused(demo: Model, changes: dict, error: type, text: str) -> None:
    s = scheduler(demo, 2)
    with pytest.raises(error, match=text):
        s.submit(replace(Request([1, 2], GREEDY, 3), **changes))
    assert not s.run_once()


def test_a_full_queue_is_said(demo: Model) -> None:
    s = scheduler(demo, slots=2, queue=3)
    request = Request(ids(7, 5), GREEDY, 20)
    tickets = [s.submit(request) for _ in range(5)]
    with pytest.raises(QueueFull, match="5 requests wait"):
        s.submit(request)
    s.run_once()
    assert (s.stats.running, s.stats.waiting) == (2, 3)
    with pytest.raises(QueueFull):
        s.submit(request)
    s.cancel(tickets[0])
    s.run_once()
    assert (s.stats.running, s.stats.waiting) == (2, 2)
    s.submit(request)


def test_running_out_of_pages_is_one_requests_error(demo: Model) -> None:
    s = scheduler(demo, 2, slots=3)
    long = s.submit(Request(ids(8, 500), GREEDY, 100))
    short = s.submit(Request(ids(9, 20), GREEDY, 5))
    drain(s)
    with pytest.raises(OutOfPages, match="--kv-budget"):
        answer(long)
    assert [x.token for x in answer(short)] == by_session(demo, short.request)
    s.close()
    assert len(s.engine.cache.free) == 2


def test_beginnings_are_found_again_within_a_namespace(demo: Model) -> None:
    s = scheduler(demo)
    request = Request(ids(10, 600), GREEDY, 2)
    found = []
    for namespace in (b"", b"", b"key", b"key", b""):
        ticket = s.submit(replace(request, namespace=namespace))
        drain(s)
        assert [x.token for x in answer(ticket)] == by_session(demo, request)
        found.append(ticket.cached_tokens)
    assert found == [0, 512, 0, 512, 512]
    whole_pages = s.submit(replace(request, ids=request.ids[:512]))
    drain(s)
    assert whole_pages.cached_tokens == 256  # the last token is read for its logits


def test_requests_that_begin_alike_read_it_once(demo: Model) -> None:
    s = scheduler(demo, chunk=128)
    beginning = ids(11, 2 * PAGE)
    requests = [Request(beginning + ids(i, 10), GREEDY, 2) for i in range(6)]
    tickets = [s.submit(r) for r in requests]
    drain(s)
    assert [t.cached_tokens for t in tickets] == [0] + [512] * 5
    assert s.stats.read_tokens == 512 + 6 * (10 + 1)
    for ticket in tickets:
        assert [x.token for x in answer(ticket)] == by_session(demo, ticket.request)


def test_least_recently_used_beginnings_leave_first(demo: Model) -> None:
    s = scheduler(demo, 5, slots=1)
    old, new = ids(12, 513), ids(13, 513)

    def cached(prompt: list[int]) -> int:
        ticket = s.submit(Request(prompt, GREEDY, 1))
        drain(s)
        return ticket.cached_tokens

    assert [cached(old), cached(new), cached(old)] == [0, 0, 512]
    assert cached(ids(14, 513)) == 0  # takes three pages: one is free, the last two of `new` go
    assert cached(old) == 512
    assert cached(new) == 0


def test_a_page_leaves_before_the_one_it_goes_on_from(demo: Model) -> None:
    s = scheduler(demo, 4, slots=1)
    prompt = ids(15, 3 * PAGE + 1)
    s.submit(Request(prompt, GREEDY, 1))
    drain(s)
    for left in (2, 1, 0):
        assert s.prefixes.evict()
        assert list(s.prefixes.pages) == [
            k for k in reversed(_keys(s, prompt)[:left]) if k in s.prefixes.pages
        ]
        assert len(s.prefixes.pages) == left
    assert not s.prefixes.evict()


def _keys(s: Scheduler, prompt: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    s.prefixes.extend(keys, prompt, b"")
    return keys


def test_a_long_prompt_leaves_room_for_others(demo: Model) -> None:
    """Those that are being answered get a token in every pass; a short prompt is read at once."""
    s = scheduler(demo, chunk=64)
    running = s.submit(Request(ids(16, 5), GREEDY, 30))
    s.run_once()
    long = s.submit(Request(ids(17, 900), GREEDY, 2))
    s.run_once()
    short = s.submit(Request(ids(18, 30), GREEDY, 2))
    for done in range(3, 8):
        before = s.stats.read_tokens
        s.run_once()
        assert running.steps.qsize() == done
        assert s.stats.read_tokens - before <= 64 + 2
    assert short.done and not long.done


@given(st.lists(st.integers(1, 900), min_size=1, max_size=20), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_shares_fill_the_chunk(lengths: list[int], chunk: int) -> None:
    class Prompt:
        scoring = False

        def __init__(self, unread: int) -> None:
            self.unread = unread

    prompts = [Prompt(n) for n in lengths]
    parts = list(shares(prompts, chunk, 100).values())  # type: ignore[arg-type]
    assert sum(parts) == min(chunk, sum(lengths))
    assert all(0 <= p <= n for p, n in zip(parts, lengths, strict=True))
    assert parts[0] >= min(lengths[0], chunk // 2)


def test_cancelling_frees_pages_before_the_next_pass(demo: Model) -> None:
    s = scheduler(demo, 4, slots=2, chunk=999, prefix_pages=0)
    tickets = [s.submit(Request(ids(i, 300), GREEDY, 50)) for i in range(3)]
    s.run_once()
    s.cancel(tickets[0])
    s.cancel(tickets[2])  # in the queue
    s.run_once()
    assert [answer(t)[-1].finished for t in (tickets[0], tickets[2])] == ["cancelled"] * 2
    assert s.stats.running == 1 and s.stats.pages_used == 2
    s.cancel(tickets[1])
    assert s.run_once() and s.stats.pages_used == 0 and not s.run_once()


def test_a_worker_answers_many_threads(demo: Model, expected: list[list[Step]]) -> None:
    got: dict[int, list[Step]] = {}
    requests = mixed()[:24]
    with Worker(scheduler(demo, slots=6)) as worker:

        def ask(i: int) -> None:
            got[i] = list(worker.scheduler.submit(requests[i]).results(timeout=60))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        assert worker.call(lambda: threading.current_thread().name).result(60).startswith("chalot")
        for thread in threads:
            thread.join()
        late = worker.scheduler.submit(Request(ids(1, 10), GREEDY, 900))
        next(late.results(timeout=60))
    assert got == dict(enumerate(expected[:24]))
    assert list(late.results(timeout=0))[-1].finished == "cancelled"
    assert len(worker.scheduler.engine.cache.free) == worker.scheduler.engine.cache.count
