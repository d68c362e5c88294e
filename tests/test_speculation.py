"""Drafting changes no token: any drafter's text is that of plain decoding."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chalot
import tiny
from chalot.engine import drafting
from chalot.engine.draft_model import ModelDrafter
from chalot.engine.drafting import Drafter, Several, Text, TextDrafter
from chalot.engine.generate import Engine, Session
from chalot.engine.pacing import StepCosts
from chalot.engine.sampler import Sampling, SamplingError
from chalot.errors import ContextError, KernelError
from chalot.kernels.backend import open_backend
from chalot.kernels.program import PAGE
from chalot.load import Model
from chalot.model.cache import PageCache

VOCABULARY = tiny.config().vocabulary
BACKEND = open_backend(threads=1)
SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "sampled": Sampling(temperature=0.8, seed=3),
    "all candidates": Sampling(temperature=1.5, top_k=0, top_p=1, min_p=0, seed=4),
    "rarer": Sampling(temperature=0.5, repetition_penalty=1.3, repetition_window=9, seed=5),
    "more often": Sampling(temperature=0, repetition_penalty=0.8),
    "less often": Sampling(temperature=0.8, presence_penalty=0.5, frequency_penalty=0.7, seed=7),
    "another choice": Sampling(temperature=0.9, top_k=5, choice=2, seed=6),
}


def engine(context: int = 1024, pages: int | None = None, seed: int = 0) -> Engine:
    """A tiny random model."""
    c = tiny.config(layers=1)
    weights = tiny.weights(c, {"*": "nl4"}, seed=seed)
    program = tiny.build(c, weights, tiny.inverse_frequencies(c), "int8")
    count = -(-context // PAGE) + 1 if pages is None else pages
    cache = PageCache(program.cache, count * PAGE)
    return Engine(BACKEND.compile(program), cache, VOCABULARY, context, BACKEND.exp)


@pytest.fixture(scope="module")
def shared() -> Engine:
    return engine()


@functools.cache
def small_model(seed: int) -> Engine:
    return engine(seed=seed)


@dataclass
class Fixed:
    """Drafts that a function makes: of the text's tokens and how many are asked for."""

    make: Callable[[list[int], int], list[int]]
    kept: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    def propose(self, text: Text, most: int) -> list[int]:
        self.asked.append(most)
        return self.make(text.tokens, most)

    def learn(self, kept: int) -> None:
        self.kept.append(kept)

    def truncate(self, length: int) -> None: ...

    def close(self) -> None: ...


def oracle(answer: Sequence[int], most: int) -> Fixed:
    """Knows the whole text."""
    return Fixed(lambda tokens, room: list(answer[len(tokens) :][: min(room, most)]))


def half_right(answer: Sequence[int]) -> Fixed:
    """Every third token is another one."""

    def make(tokens: list[int], room: int) -> list[int]:
        right = answer[len(tokens) :][: min(room, 7)]
        return [(t + (n % 3 == 2)) % VOCABULARY for n, t in enumerate(right)]

    return Fixed(make)


def at_random(_: object) -> Fixed:
    rng = np.random.Generator(np.random.Philox(1))
    return Fixed(lambda tokens, most: rng.integers(0, VOCABULARY, min(most, 5)).tolist())


def known_costs() -> StepCosts:
    """A pass of many costs as one: everything is drafted that can be."""
    return StepCosts(1.0, {n: 1.0 for n in range(2, 40)})


def from_text(_: object) -> TextDrafter:
    return TextDrafter(known_costs())


def from_model(seed: int) -> Callable[[object], ModelDrafter]:
    return lambda _: ModelDrafter(small_model(seed), VOCABULARY, known_costs(), 4)


DRAFTERS: dict[str, Callable[[list[int]], Drafter]] = {
    "perfect, 1": lambda answer: oracle(answer, 1),
    "perfect, 4": lambda answer: oracle(answer, 4),
    "perfect, 16": lambda answer: oracle(answer, 16),
    "perfect, as many as fit": lambda answer: oracle(answer, 1000),
    "half right": half_right,
    "random": at_random,
    "text": from_text,
    "same model": from_model(0),
    "another model": from_model(1),
    "text, then model": lambda a: Several([from_text(a), from_model(0)(a)]),
}


def prompt_of(length: int) -> list[int]:
    """Ids with repeats in them."""
    return [n * n % 23 + n % 5 for n in range(length)]


def decode(session: Session, prompt: list[int], count: int) -> list[int]:
    """Prompt and answer."""
    session.prefill(prompt)
    for left in range(count, 0, -1):
        session.step(left)
    return list(session.tokens)


def state(session: Session) -> tuple[int, list[float]]:
    """What the cache holds of a text: how much, and what would follow one more token."""
    session.prefill([7])
    assert session.next is not None
    return session.sequence.length, session.next[1].tolist()


@pytest.mark.parametrize("options", SAMPLINGS)
@pytest.mark.parametrize("kind", DRAFTERS)
def test_drafted_text_is_the_plain_text(shared: Engine, kind: str, options: str) -> None:
    sampling, free = SAMPLINGS[options], len(shared.cache.free)
    plain = Session(shared, sampling)
    expected = decode(plain, prompt_of(40), 60)
    drafter = DRAFTERS[kind](expected)
    drafted = Session(shared, sampling, drafter)
    assert decode(drafted, prompt_of(40), 60) == expected
    assert drafted.stats.new_tokens == plain.stats.new_tokens == 60
    assert drafted.stats.passes + drafted.stats.accepted == 59  # the first one is the prompt's
    assert state(drafted) == state(plain)
    if kind.startswith("perfect"):
        assert drafted.stats.acceptance == 1 and drafted.stats.passes < 31
    if kind == "random":
        assert drafted.stats.drafted > 200 and drafted.stats.accepted < 10
    plain.close()
    drafted.close()
    assert len(shared.cache.free) == free


def test_a_small_model_with_the_same_weights_is_always_right(shared: Engine) -> None:
    """Sampled too: it draws with the same random numbers."""
    for sampling in SAMPLINGS.values():
        session = Session(shared, sampling, from_model(0)(None))
        decode(session, prompt_of(30), 40)
        assert session.stats.acceptance == 1 and session.stats.tokens_per_pass > 2
        session.close()


@pytest.mark.parametrize("length", range(PAGE - 9, PAGE + 2, 2))
def test_across_a_page_border(shared: Engine, length: int) -> None:
    sampling = SAMPLINGS["sampled"]
    plain = Session(shared, sampling)
    expected = decode(plain, prompt_of(length), 20)
    for make in (half_right, at_random, lambda a: oracle(a, 16)):
        session = Session(shared, sampling, make(expected))
        assert decode(session, prompt_of(length), 20) == expected
        assert len(session.sequence.pages) == -(-session.sequence.length // PAGE)
        session.close()
    plain.close()


def until_refused(session: Session, prompt: list[int]) -> tuple[list[int], str]:
    session.prefill(prompt)
    with pytest.raises(ContextError) as refused:
        while True:
            session.step()
    return list(session.tokens), str(refused.value)


@pytest.mark.parametrize(("context", "pages"), [(48, 1), (PAGE + 20, 2), (1024, 1), (2048, 2)])
def test_to_the_end_of_context_and_cache(context: int, pages: int) -> None:
    """As many tokens as plain decoding, then its very error; with other texts in the cache too."""
    small = engine(context, pages)
    prompt = prompt_of(min(context, pages * PAGE) - 13)
    expected = until_refused(plain := Session(small, SAMPLINGS["greedy"]), prompt)
    plain.close()
    for make in DRAFTERS.values():
        drafted = Session(small, SAMPLINGS["greedy"], make([*expected[0], *range(20)]))
        assert until_refused(drafted, prompt) == expected
        drafted.close()
        assert len(small.cache.free) == pages


@pytest.mark.parametrize(("at", "pages"), [(PAGE - 6, 4), (PAGE - 13, 2), (PAGE + 1, 3)])
def test_no_page_is_free_but_those_that_plain_decoding_needs(at: int, pages: int) -> None:
    """A fork in a full cache: the copy that it needs is not taken by a draft."""
    small = engine(1024, pages)
    first = Session(small, SAMPLINGS["sampled"])
    expected = decode(first, prompt_of(at), 12)
    first.rewind(at)
    second = Session(small, SAMPLINGS["sampled"], half_right([*expected, *range(300)]))
    second.sequence = first.sequence.fork()
    second.tokens = list(first.tokens)
    assert [second.step() for _ in range(12)] == expected[at:]
    assert [first.step() for _ in range(12)] == expected[at:]
    first.close()
    second.close()
    assert len(small.cache.free) == pages


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("step"), st.integers(1, 12)),
            st.tuples(st.just("prefill"), st.lists(st.integers(0, 40), min_size=1, max_size=5)),
            st.tuples(st.just("rewind"), st.integers(1, 30)),
            st.tuples(st.just("sampling"), st.sampled_from(list(SAMPLINGS))),
            st.tuples(st.just("seed"), st.integers(0, 3)),
        ),
        max_size=8,
    ),
    st.sampled_from(["half right", "text", "same model", "random"]),
)
@settings(max_examples=40, deadline=None)
def test_whatever_a_session_goes_through(
    shared: Engine, changes: list[tuple[str, object]], kind: str
) -> None:
    """Steps, more prompt, rewinding and other sampling in any order: always the plain text."""
    guess = prompt_of(200)
    both = (
        Session(shared, SAMPLINGS["greedy"]),
        Session(shared, SAMPLINGS["greedy"], DRAFTERS[kind](guess)),
    )
    for session in both:
        session.prefill(prompt_of(12))
    for name, value in [*changes, ("step", 5)]:
        got = []
        for session in both:
            if name == "step":
                got.append([session.step() for _ in range(value)])  # type: ignore[call-overload]
            elif name == "prefill":
                session.prefill(value)  # type: ignore[arg-type]
            elif name == "rewind":
                session.rewind(value)  # type: ignore[arg-type]
            elif name == "sampling":
                session.sampling = SAMPLINGS[value]  # type: ignore[index]
            else:
                session.with_sampling(seed=value)  # type: ignore[arg-type]
        assert not got or got[0] == got[1]
    assert both[0].tokens == both[1].tokens
    assert state(both[0]) == state(both[1])
    for session in both:
        session.close()
    assert len(shared.cache.free) == shared.cache.count


def test_no_more_is_drafted_than_will_be_asked_for(shared: Engine) -> None:
    plain = Session(shared, SAMPLINGS["greedy"])
    expected = decode(plain, prompt_of(20), 30)
    drafter = oracle(expected, 100)
    session = Session(shared, SAMPLINGS["greedy"], drafter)
    assert decode(session, prompt_of(20), 10) == expected[:30]
    assert drafter.asked == [8]  # of ten, the prompt gave one, and a pass gives one anyhow
    assert session.sequence.length == 29 and not session.confirmed
    plain.close()
    session.close()


def test_an_interrupted_pass_leaves_a_session_that_goes_on(
    shared: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the pass, before the draft was looked at."""
    plain = Session(shared, SAMPLINGS["sampled"])
    expected = decode(plain, prompt_of(20), 20)
    session = Session(shared, SAMPLINGS["sampled"], at_random(None))
    session.prefill(prompt_of(20))
    session.step()

    def interrupted(*_: object) -> list[int]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("chalot.engine.generate.verified", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.step()
    assert [session.step() for _ in range(19)] == expected[21:]
    plain.close()
    session.close()


def test_what_is_not_finite_is_an_error_when_its_token_is_due(shared: Engine) -> None:
    """Drafted tokens before it are given first, as plain decoding gives them."""
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)[:, ::-1]
    ids = np.array([[5, 1], [6, 1], [-1, 1], [7, 1]], np.int32)
    session = Session(shared, SAMPLINGS["greedy"])
    session.tokens = [1, 2]
    found = drafting.verified(session, [5, 6, 7], lambda n: (ids[n], rows[n]), shared.exp)
    assert found == [5, 6]
    with pytest.raises(KernelError, match="NaN or Inf"):
        drafting.verified(session, [5], lambda n: (ids[2], rows[2]), shared.exp)


# ---- drafting from the text


token_lists = st.lists(st.integers(0, 3), max_size=60)


@given(token_lists, token_lists, st.integers(0, 60))
def test_reading_is_undone_exactly(first: list[int], second: list[int], length: int) -> None:
    read = from_text(None)
    read.read(first + second)
    read.truncate(length)
    fresh = from_text(None)
    fresh.read((first + second)[:length])
    assert (read.tokens, read.last, read.earlier) == (fresh.tokens, fresh.last, fresh.earlier)
    assert read.alone.items() <= fresh.alone.items()
    read.close()
    assert not (read.tokens or read.last or read.earlier or read.alone)


@given(token_lists)
def test_a_match_is_one_and_the_longest_of_the_latest(tokens: list[int]) -> None:
    drafter = from_text(None)
    drafter.read(tokens)
    place, same = drafter.match()
    endings = {
        at: next(
            n for n in range(at + 1) if n == at or tokens[at - 1 - n] != tokens[len(tokens) - 1 - n]
        )
        for at in range(1, len(tokens))
    }
    best = min(max(endings.values(), default=0), drafting.LONGEST)
    assert (same >= 2) == (best >= 2)
    if same:
        assert same == min(endings[place], drafting.LONGEST)
    if best >= 2 and len(tokens) <= drafting.LOOKED_AT:
        assert same == best
    if best == 1:  # the latest place behind this token
        assert place == max(at for at, n in endings.items() if n) and same == 1


def test_a_repeating_text_is_drafted_round(shared: Engine) -> None:
    session = Session(shared, SAMPLINGS["greedy"])
    session.tokens = [1, 2, 3, 1, 2, 3, 1]
    assert from_text(None).propose(session, 8) == [2, 3, 1, 2, 3, 1, 2, 3]
    session.tokens = [1, 2, 3, 4, 5]
    assert from_text(None).propose(session, 8) == []
    session.tokens = [1, 2, 3, 4, 2]
    assert from_text(None).propose(session, 2) == [3, 4]


def test_looks_in_vain_get_rarer_and_a_draft_ends_that() -> None:
    def rests(one: float, texts: list[list[int]]) -> list[int]:
        costs = StepCosts(one)
        drafter, found = TextDrafter(costs), []
        for tokens in texts:
            drafter.resting = 0
            drafter.propose(SimpleNamespace(tokens=tokens), 8)  # type: ignore[arg-type]
            found.append(drafter.resting)
        return found

    new = [list(range(n)) for n in range(1, 12)]
    found = rests(9e-5, [*new, [*range(11), 3], [*range(11), 3, 99]])
    assert found == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 0]
    assert rests(1e-2, new) == [0] * 11


def test_reading_a_long_prompt_takes_microseconds_a_token() -> None:
    import time

    tokens = [n * n % 997 for n in range(30_000)]
    start = time.perf_counter()
    from_text(None).read(tokens)
    assert time.perf_counter() - start < 3  # 0.05 s on an idle machine


# ---- the package's own doors


@pytest.fixture(scope="module")
def drafted(demo_file: Path) -> Model:
    return chalot.load(demo_file, context=512)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_k": 0}])
def test_generate(drafted: Model, demo_files: dict[str, Path], options: dict[str, float]) -> None:
    """Without drafting, with it, by the same weights in another scheme; short drafts, long ones."""
    prompt = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef "
    ask = {"max_tokens": 60, **options}
    plain = drafted.generate(prompt, draft=False, **ask)
    assert drafted.last_stats.drafted == 0 and drafted.last_stats.speed_up == 1
    for draft in ({}, {"draft_tokens": 1}, {"draft": demo_files["int8"], "draft_tokens": 5}):
        assert drafted.generate(prompt, **ask, **draft) == plain
        stats = drafted.last_stats
        assert stats.new_tokens <= 60 and stats.accepted <= stats.drafted
        assert 0 <= stats.acceptance <= 1 <= stats.tokens_per_pass <= 17
    stop = plain[20:24]
    assert drafted.generate(prompt, stop=[stop], **ask) == plain[: plain.index(stop)]
    assert len(drafted.engine.cache.free) == drafted.engine.cache.count


def test_chat_with_other_drafting_in_every_turn(drafted: Model, demo_file: Path) -> None:
    messages = [{"role": "user", "content": "What does os.getcwd do?"}]
    answers = []
    with chalot.load(demo_file, context=512, draft=False) as plain:
        for draft in (True, False, demo_file, True):
            expected = plain.chat(messages, seed=1, max_tokens=20)
            answers.append(drafted.chat(messages, seed=1, max_tokens=20, draft=draft))
            assert answers[-1] == expected
            messages += [
                {"role": "assistant", "content": expected},
                {"role": "user", "content": "What does os.getcwd do?"},
            ]


@pytest.mark.parametrize("count", [-1, 256, 1.5, 10**30])
def test_a_length_that_is_none_is_refused(drafted: Model, count: float) -> None:
    with pytest.raises(SamplingError, match="draft_tokens is .*; expected 0 to 255"):
        drafted.generate("a", draft_tokens=count)


def test_with_a_window(demo_file: Path) -> None:
    """Pages that leave the window behind a draft are still there when it was wrong."""
    with chalot.load(demo_file, window=64, sinks=4) as model:
        plain = model.session(seed=1, draft=False)
        expected = decode(plain, prompt_of(PAGE * 2 - 30), 60)
        for make in (half_right, at_random, from_text):
            session = model.session(seed=1)
            session.use(make(expected))
            assert decode(session, prompt_of(PAGE * 2 - 30), 60) == expected
            session.close()
        plain.close()
        assert len(model.engine.cache.free) == model.engine.cache.count
