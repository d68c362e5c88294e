"""Sessions kept in files, forks, answers that share a prompt, and text beyond the context."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

import chalot
from chalot import cli
from chalot.errors import ContextError, FormatError, WrongTypeError
from chalot.formats.session_file import FRONT, MAGIC, SessionFile, SessionHeader, write_session
from chalot.kernels.program import CACHE_TYPES, PAGE, CacheShape
from chalot.load import Model
from chalot.model.cache import PageCache, Sequence, cleared
from chalot.model.window import REWIND, Window

PROMPT = [int(i) for i in np.arange(300) * 37 % 4000]
SAMPLED = {"temperature": 0.9, "seed": 5}
SHAPE = CacheShape("int8", 2, 2, 24)


@pytest.fixture(scope="module")
def streaming(demo_file: Path) -> Iterator[Model]:
    """The bundled model with a window; its own context is 1,024."""
    with chalot.load(demo_file, window=64, sinks=4) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def wide(demo_file: Path) -> Iterator[Model]:
    """The bundled model with room for three texts."""
    with chalot.load(demo_file, texts=3) as loaded:
        yield loaded


def steps(session: object, count: int) -> list[int]:
    return [session.step() for _ in range(count)]  # type: ignore[attr-defined]


# ---- a window in the cache


def test_pages_behind_the_window_are_given_back() -> None:
    cache = PageCache(SHAPE, 6 * PAGE, window=Window(100, 4))
    sequence = Sequence(cache)
    for length in range(0, 20 * PAGE, 64):
        sequence.reserve(length + 64)
        sequence.length = length + 64
        assert len([n for n in sequence.pages if n >= 0]) <= 5 and sequence.pages[0] >= 0
    other = sequence.fork()
    sequence.truncate(sequence.length - REWIND)  # still there
    assert sequence.length == 20 * PAGE - REWIND
    sequence.truncate(10 * PAGE)  # gone: all is to be read again
    assert sequence.length == 0 and not sequence.pages
    other.close()
    assert sorted(cache.free) == list(range(6)) and not any(cache.users)


def test_text_beyond_the_context_is_that_of_a_cache_that_keeps_all(
    demo_file: Path, streaming: Model
) -> None:
    """1,840 tokens of a model made for 1,024, in a cache for a part of them."""
    pages = streaming.engine.cache.count
    assert streaming.context == 1 << 20 and pages * PAGE < 1800
    with streaming.session(**SAMPLED) as session:
        session.prefill(PROMPT * 6)
        ids = steps(session, 40)
        kept = len(session.sequence.pages) - session.sequence.pages.count(-1)
        assert kept <= 4
    shape, window = streaming.engine.cache.shape, streaming.window
    streaming.engine.cache = PageCache(shape, 2000)  # gives nothing back
    try:
        whole = streaming.session(**SAMPLED, draft=False)
        whole.prefill(PROMPT * 6 + ids[:10])
        assert steps(whole, 30) == ids[10:] and -1 not in whole.sequence.pages
    finally:
        streaming.engine.cache = PageCache(shape, pages * PAGE, window=window)


def test_going_back_reads_again_what_is_gone(streaming: Model) -> None:
    with streaming.session(**SAMPLED) as session:
        session.prefill(PROMPT * 2)
        ids = steps(session, 60)
        for back in (20, 350):
            session.rewind(660 - back)
            session.prefill((PROMPT * 2 + ids)[660 - back : 640])
            assert steps(session, 20) == ids[40:]


def test_before_the_window_is_left_nothing_differs(model: Model, streaming: Model) -> None:
    same = streaming.logits(PROMPT[:100]) == model.logits(PROMPT[:100])
    assert same[:68].all() and not same[68:].all(axis=1).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "--window 0: expected"),
        ({"window": 4}, "--sinks 4: expected 0 to 3"),
        ({"sinks": 4}, "only with a window"),
        ({"window": 1024}, "choose --window 1020 at most"),
        ({"window": 64, "context": (1 << 20) + 1}, "a window has room for 1048576"),
    ],
)
def test_what_cannot_be_is_refused(demo_file: Path, options: dict[str, int], words: str) -> None:
    with pytest.raises(ContextError, match=words):
        chalot.load(demo_file, **options)


# ---- forks and several answers


def test_a_fork_goes_on_as_if_it_had_read_all(wide: Model) -> None:
    model = wide
    with model.session(**SAMPLED) as first, model.session(**SAMPLED, choice=3) as alone:
        alone.prefill(PROMPT)
        first.prefill(PROMPT)
        third = first.fork(choice=3)
        assert third.sequence.pages == first.sequence.pages
        expected = steps(alone, 30)
        assert steps(third, 30) == expected
        ids = steps(first, 30)
        assert ids != expected
        later = first.fork()  # also between two tokens, with some of them confirmed ahead
        assert steps(later, 10) == steps(first, 10)
        later.close(), third.close()
    assert len(model.engine.cache.free) == model.engine.cache.count


@pytest.mark.parametrize("options", [SAMPLED, {"seed": 2, "top_k": 0, "repetition_penalty": 1.2}])
def test_each_answer_is_that_of_its_choice(demo_file: Path, options: dict[str, float]) -> None:
    with chalot.load(demo_file, texts=3) as model:
        prompt, stop = "def read(path):\n", ("(",)
        got = model.answers(prompt, 3, max_tokens=40, choice=1, stop=stop, **options)
        assert model.last_stats.new_tokens > 3 and model.last_stats.prompt_tokens < 20
        alone = [
            model.generate(prompt, max_tokens=40, choice=c, stop=stop, **options) for c in (1, 2, 3)
        ]
        assert got == alone and len(set(got)) > 1
        assert len(model.engine.cache.free) == model.engine.cache.count


def test_answers_that_do_not_fit_give_their_pages_back(model: Model) -> None:
    with pytest.raises(ContextError, match="positions of the cache are in use"):
        model.answers(PROMPT * 3, 8, max_tokens=200, **SAMPLED)
    assert len(model.engine.cache.free) == model.engine.cache.count


# ---- saved sessions


@pytest.mark.parametrize("where", ["after the prompt", "in the answer", "empty"])
@pytest.mark.parametrize("window", [None, 64])
def test_a_restored_session_goes_on_with_the_same_bits(
    demo_file: Path, tmp_path: Path, where: str, window: int | None
) -> None:
    path = tmp_path / "text.session"
    with chalot.load(demo_file, window=window, threads=1) as one:
        session = one.session(**SAMPLED)
        if where != "empty":
            session.prefill(PROMPT * 2)
        if where == "in the answer":
            steps(session, 150)
        one.save_session(session, path, b"note")
        content = path.read_bytes()
        if where == "empty":
            session.prefill(PROMPT)
        expected = steps(session, 40)
        one.save_session(session, tmp_path / "later.session")
    with chalot.load(demo_file, window=window, context=1000, threads=2, texts=5) as other:
        other.engine.cache.arena[:] = 0x55
        again = other.load_session(path)
        assert again.stats.cached_tokens == again.sequence.length >= len(again.tokens) - 1
        other.save_session(again, tmp_path / "same.session", b"note")
        assert (tmp_path / "same.session").read_bytes() == content  # nothing of other texts
        if where == "empty":
            again.prefill(PROMPT)
        assert steps(again, 40) == expected
        assert again.stats.prompt_tokens == (300 if where == "empty" else 0)
        other.save_session(again, tmp_path / "both.session")
        later = other.load_session(tmp_path / "later.session", seed=9)
        assert later.tokens == again.tokens and later.sampling.seed == 9


@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_what_a_page_held_of_others_is_cleared(kind: str) -> None:
    shape = CacheShape(kind, 2, 2, 24)
    page = np.full(shape.page_bytes, 7, np.uint8)
    for first in (1, 17, 255):
        found = cleared(page, shape, first)
        assert set(found.tolist()) == {0, 7} and (page == 7).all()
        assert (found == 7).sum() * PAGE == first * shape.page_bytes


@pytest.fixture(scope="module")
def kept(streaming: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved session."""
    path = tmp_path_factory.mktemp("kept") / "text.session"
    with streaming.session(**SAMPLED) as session:
        session.prefill(PROMPT * 2)
        streaming.save_session(session, path, b"some words")
    return path


def refused(model: Model, path: Path, words: str) -> None:
    free = sorted(model.engine.cache.free)
    with pytest.raises(FormatError, match=words):
        model.load_session(path)
    assert sorted(model.engine.cache.free) == free


def test_damage_is_refused(streaming: Model, kept: Path, tmp_path: Path) -> None:
    whole, path = kept.read_bytes(), tmp_path / "bad"
    for size in (*range(0, 700, 29), len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(streaming, path, "expected|header|checksum")
    path.write_bytes(whole + b"\0")
    refused(streaming, path, "truncated")
    for at in (*range(0, 900, 41), len(whole) // 2, len(whole) - 1):
        if FRONT.size - 8 <= at < FRONT.size:
            continue  # fill
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(streaming, path, ".")
    path.write_bytes(MAGIC + b"\xff" * 8 + whole[24:])
    refused(streaming, path, "a header of 18446744073709551615 bytes")
    refused(streaming, tmp_path, "not a regular file|cannot be opened")
    path.write_bytes(b"{}" + b"\0" * 100)
    refused(streaming, path, "this is no saved session")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 1 << 40}, "contradict"),
        ({"start": 1 << 40}, "contradict"),
        ({"tokens": 1 << 40}, "expected at most"),
        ({"tokens": -1}, "Expected `int` >= 0"),
        ({"note": 1 << 30}, "expected at most"),
        ({"pages": 1}, "expected [0-9]+ for 600 positions|truncated"),
        ({"pages": 1 << 48}, "truncated"),
        ({"page_bytes": 64}, "contradict|truncated"),
        ({"gone": 3}, "pages are gone that are seen"),
        ({"gone": 0}, "pages are gone that are seen|expected"),
        ({"sampling": {"temperature": -1}}, "temperature is -1"),
        ({"sampling": {"shell": 1}}, "shell"),
        ({"more": 1}, "unknown field"),
    ],
)
def test_headers_that_lie_are_refused(
    streaming: Model, kept: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    """Such as a hostile hand would write, with sizes that agree and a good checksum if it can."""
    with SessionFile(kept) as file:
        fields = msgspec.to_builtins(file.header) | change
    try:
        header = msgspec.convert(fields, SessionHeader)
        if max(header.tokens, header.pages, header.note) > 1 << 20:
            raise ValueError
        pages = [np.zeros(header.page_bytes, np.uint8)] * header.pages
        write_session(
            tmp_path / "lies", header, bytes(header.note), np.zeros(header.tokens, np.int32), pages
        )
    except ValueError:  # by hand
        text = msgspec.json.encode(fields)
        (tmp_path / "lies").write_bytes(FRONT.pack(MAGIC, len(text), bytes(32)) + text + bytes(999))
    refused(streaming, tmp_path / "lies", words)


def test_tokens_outside_the_vocabulary_are_refused(
    streaming: Model, kept: Path, tmp_path: Path
) -> None:
    with SessionFile(kept) as file:
        header = file.header
    pages = [np.zeros(header.page_bytes, np.uint8)] * header.pages
    tokens = np.full(header.tokens, 4096, np.int32)
    write_session(tmp_path / "x", header, bytes(header.note), tokens, pages)
    refused(streaming, tmp_path / "x", "outside the vocabulary")


def test_another_model_cache_or_window_is_refused(demo_files: dict[str, Path], kept: Path) -> None:
    others: list[tuple[str, dict[str, object], str]] = [
        ("int8", {"window": 64}, "made with 'model'"),
        ("nl4", {"window": 64, "kv": "f16"}, "'cache kind' 'int8', expected 'f16'"),
        ("nl4", {}, "'window' '64', expected 0"),
        ("nl4", {"window": 64, "sinks": 3}, "'sinks' '4', expected 3"),
        ("nl4", {"window": 64, "activations": 16}, "'activations' '', expected '16'"),
    ]
    for scheme, options, words in others:
        with chalot.load(demo_files[scheme], **options) as model:
            refused(model, kept, words)
    with (
        chalot.load(demo_files["nl4"], window=64, context=500) as small,
        pytest.raises(ContextError, match="holds 600 tokens, the context 500"),
    ):
        small.load_session(kept)


# ---- commands


def ran(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_run_with_a_cache(
    demo_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = tmp_path / "c", ["--max-tokens", "20", "--seed", "3", "--json"]

    def runs(prompt: str, *words: str) -> tuple[int, str, str]:
        return ran(capsys, "run", str(demo_file), prompt, *run, *words)

    code, out, _ = runs("def read(path):\n", "--cache", str(path))
    first = json.loads(out)
    assert code == 0 and first["stats"]["cached_tokens"] == 0 and path.exists()
    longer = "def read(path):\n" + first["text"]
    second = json.loads(runs(longer, "--cache", str(path))[1])
    plain = json.loads(runs(longer)[1])
    assert second["text"] == plain["text"]
    stats = second["stats"]
    assert stats["cached_tokens"] > 3
    assert stats["prompt_tokens"] < plain["stats"]["prompt_tokens"]
    before = path.read_bytes()
    code, _, err = runs("x", "--cache", str(path), "--window", "30")
    assert code == 1 and "'window' '0', expected 30" in err and path.read_bytes() == before
    code, _, err = runs("x", "--cache", str(demo_file))
    assert code == 1 and "no saved session" in err
    code, _, err = runs("x", "--cache", str(path), "-n", "2")
    assert code == 1 and "leave one of them out" in err
    code, _, err = runs("x", "--cache", str(tmp_path / "no" / "c"))
    assert code == 1 and "cannot be written" in err


def test_a_conversation_and_a_text_are_not_mixed(
    demo_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: chalot.Model
) -> None:
    """Neither replaces the other; who may read a file, and where a link leads, stays."""
    path, link = tmp_path / "c", tmp_path / "link"
    with model.session(temperature=0) as session:
        session.prefill([1, 2, 3])
        model.save_session(session, path, b"a conversation")
    before = path.read_bytes()
    run = ["run", str(demo_file), "x", "--max-tokens", "3", "--cache"]
    code, _, err = ran(capsys, *run, str(path))
    assert code == 1 and "holds a conversation" in err and path.read_bytes() == before
    path.unlink()
    path.touch(0o600)
    link.symlink_to(path)
    path.unlink()
    assert ran(capsys, *run, str(link))[0] == 0 and link.is_symlink() and path.exists()
    path.chmod(0o600)
    assert ran(capsys, *run, str(link))[0] == 0 and path.stat().st_mode & 0o777 == 0o600


def test_run_with_answers(demo_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["run", str(demo_file), "def read(path):\n", "--max-tokens", "9", "--seed", "3"]
    _, out, _ = ran(capsys, *run, "-n", "2", "--choice", "1", "--json")
    found = json.loads(out)
    assert [a["choice"] for a in found["answers"]] == [1, 2]
    assert found["options"]["choice"] == 1 and found["stats"]["new_tokens"] >= 9
    texts = [json.loads(ran(capsys, *run, "--choice", c, "--json")[1])["text"] for c in "12"]
    assert [a["text"] for a in found["answers"]] == texts
    _, out, err = ran(capsys, *run, "-n", "2", "--choice", "1")
    assert out == "".join(t + "\n" for t in texts) and err == "seed 3\n--- 1\n--- 2\n"
    code, _, err = ran(capsys, *run, "-n", "0")
    assert code == 1 and "0 answers asked for; expected 1 or more" in err


def test_run_beyond_the_context(
    demo_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", str(demo_file), "x = 1\n" * 600, "--max-tokens", "9", "--seed", "3", "-q"]
    code, out, _ = ran(capsys, *run, "--window", "100", "--choice", "2", "--json")
    found = json.loads(out)
    assert code == 0 and found["options"]["window"] == 100
    (tmp_path / "said.json").write_text(out)
    assert cli.main(["replay", str(tmp_path / "said.json"), str(demo_file)]) == 0
    assert "every byte came out again" in capsys.readouterr().out
    assert found["stats"]["prompt_tokens"] > 1024
    assert ran(capsys, *run)[0] == 1
    code, _, err = ran(capsys, *run, "--window", "3")
    assert code == 1 and "--sinks 4: expected 0 to 2" in err


def test_a_chat_goes_on_in_its_cache(model: Model, demo_file: Path, tmp_path: Path) -> None:
    first = [{"role": "user", "content": "def read(path):"}]
    answer = model.chat(first, max_tokens=20, **SAMPLED)
    model.save_talk(tmp_path / "c", b"words")
    more = [*first, {"role": "assistant", "content": answer}, *first]
    expected = model.chat(more, max_tokens=20, **SAMPLED)
    with chalot.load(demo_file) as other:
        other.chat(more[1:], max_tokens=3)  # goes away
        assert other.load_talk(tmp_path / "c") == b"words"
        assert other.chat(more, max_tokens=20, **SAMPLED) == expected
        assert other.last_stats.cached_tokens == model.last_stats.cached_tokens > 10


def test_a_batch_of_texts_with_a_window(streaming: Model) -> None:
    prompts = ["x = 1\n" * 90, "def f(", "import os\n" * 40]
    options = {"max_tokens": 30, "seed": 4}
    alone = [streaming.generate(prompt, **options) for prompt in prompts]
    assert streaming.generate_batch(prompts, **options) == alone


def test_ids_that_are_no_whole_numbers(model: chalot.Model) -> None:
    with model.session(temperature=0) as session:
        with pytest.raises(WrongTypeError, match="float in it, expected token ids"):
            session.prefill([1.5])  # type: ignore[list-item]
        session.prefill([1])
