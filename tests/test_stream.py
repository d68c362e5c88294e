"""Laws of streaming: what comes out is what decoding gives, in whole characters, cut at stops."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Core

import vocabularies
from chalot.text.pieces import Pieces
from chalot.text.stream import TextStream
from chalot.text.tokenizer import Tokenizer

SAMPLES = [
    unicodedata.normalize("NFC", "Trăm năm trong cõi người ta, Đà Nẵng ngày đẹp trời."),
    unicodedata.normalize("NFD", "Trăm năm trong cõi người ta, Đà Nẵng ngày đẹp trời."),
    "龍が如く、鬱陶しい天気。你好世界！ 안녕하세요",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 😀😀 🇻🇳",
    " two  spaces\n\n\ttabs, Ünïcödé ½ €100 \u200b\ufeff \x00 \ufffd end ",
]
# Without a normalizer, so that text comes back as it was.
CORES = {"bytes": vocabularies.byte_level, "legacy": vocabularies.sentencepiece}
TOKENIZERS = {name: Tokenizer.from_documents(make()) for name, make in CORES.items()}
every = pytest.mark.parametrize("name", TOKENIZERS)


def pushed(
    name: str, ids: list[int], stop: list[str] | tuple[str, ...] = ()
) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZERS[name], stop)
    return [*[stream.push(id_) for id_ in ids], stream.flush()], stream


def byte_ids(name: str, text: str) -> list[int]:
    """The text with a token for each byte: every character is split."""
    raw = vocabularies.raw(name)
    if name == "legacy":
        return [raw.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    letters = {
        piece: id_
        for id_, piece in ((i, TOKENIZERS[name]._opened.pieces.piece(i, False)) for i in range(400))
    }
    return [letters[bytes((byte,))] for byte in text.encode()]


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    """Any ids at all, specials and bytes that make no character among them."""
    return st.lists(st.integers(0, TOKENIZERS[name].vocabulary_size + 3), max_size=30)


@every
@pytest.mark.parametrize("text", SAMPLES, ids=["NFC", "NFD", "CJK", "emoji", "spaces"])
def test_samples_come_in_whole_characters(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    for ids in (tokenizer.encode(text), byte_ids(name, text)):
        found, _ = pushed(name, ids)
        wanted = tokenizer.decode(ids)
        assert "".join(found) == wanted
        assert all("\ufffd" not in piece for piece in found) or "\ufffd" in text
        assert wanted == vocabularies.raw(name).decode(ids)
    if name == "bytes":
        assert "".join(found) == text


@every
def test_a_character_appears_with_its_last_byte(name: str) -> None:
    ids = byte_ids(name, "é你😀")
    assert pushed(name, ids)[0] == ["", "é", "", "", "你", "", "", "", "😀", ""]


@every
@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_pushes_and_flush_are_the_decoding(name: str, data: st.DataObject) -> None:
    ids = data.draw(ids_of(name))
    assert "".join(pushed(name, ids)[0]) == TOKENIZERS[name].decode(ids)
    if name == "bytes":  # for any ids; SentencePiece's differ where bytes are wrong, see pieces.py
        assert TOKENIZERS[name].decode(ids) == vocabularies.raw(name).decode(ids)


@every
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=20))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_decoding_is_the_librarys(name: str, text: str) -> None:
    for ids in (TOKENIZERS[name].encode(text), byte_ids(name, text)):
        assert TOKENIZERS[name].decode(ids) == vocabularies.raw(name).decode(ids)


@every
def test_wrong_bytes_are_shown_as_soon_as_they_are_wrong(name: str) -> None:
    good = byte_ids(name, "é")
    assert pushed(name, [good[0], *byte_ids(name, "a")])[0] == ["", "\ufffda", ""]
    assert pushed(name, [good[1], good[0]])[0] == ["\ufffd", "", "\ufffd"]
    assert pushed(name, byte_ids(name, "你")[:2])[0] == ["", "", "\ufffd"]


def test_added_tokens_with_letters_of_the_byte_table_are_text() -> None:
    """The library takes them for bytes, and makes U+0011 of U+0111."""
    core = Core.from_buffer(vocabularies.byte_level())
    core.add_tokens([AddedToken("đi", normalized=False), AddedToken("é", normalized=False)])
    tokenizer = Tokenizer.from_documents(core.to_str().encode())
    ids = tokenizer.encode("Tôi đi, é")
    assert core.token_to_id("đi") in ids
    assert tokenizer.decode(ids) == "Tôi đi, é"


def test_metaspace_decodes_as_the_library_does() -> None:
    core = Core.from_buffer(vocabularies.unigram())
    tokenizer = Tokenizer.from_documents(vocabularies.unigram())
    for text in ("a b", " a b", "abc  d", ""):
        ids = core.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == core.decode(ids)


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The oracle: the text before the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


letters = st.text(st.sampled_from("ab\né你"), max_size=14)
stop_strings = st.lists(st.text(st.sampled_from("ab\né你"), min_size=1, max_size=4), max_size=3)


@every
@given(text=letters, stops=stop_strings, whole=st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_stop_strings_are_found_as_on_the_full_text(
    name: str, text: str, stops: list[str], whole: bool
) -> None:
    ids = TOKENIZERS[name].encode(text) if whole else byte_ids(name, text)
    found, stream = pushed(name, ids, stops)
    assert ("".join(found), stream.stopped) == cut(TOKENIZERS[name].decode(ids), stops)
    assert stream.push(ids[0] if ids else 5) == stream.flush() == "" or stream.stopped is None


@every
@given(text=letters, stops=stop_strings)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_only_what_may_become_a_stop_string_is_held_back(
    name: str, text: str, stops: list[str]
) -> None:
    stream = TextStream(TOKENIZERS[name], stops)
    shown = "".join([stream.push(id_) for id_ in byte_ids(name, text)])
    if stream.stopped is not None:
        return
    whole = TOKENIZERS[name].decode(byte_ids(name, text))
    keep = max(
        (n for stop in stops for n in range(len(stop)) if whole.endswith(stop[:n])), default=0
    )
    assert shown == whole[: len(whole) - keep]


def test_a_stop_string_across_tokens_is_not_shown() -> None:
    ids = byte_ids("bytes", "one\n\nUser: two")
    found, stream = pushed("bytes", ids, ["\nUser:", "never"])
    assert "".join(found) == "one\n" and stream.stopped == "\nUser:"


@pytest.mark.parametrize("stop", [[""], ["a", ""], [5], [None]])
def test_stop_strings_that_make_no_sense(stop: list[str]) -> None:
    with pytest.raises(ValueError, match="stop strings"):
        TextStream(TOKENIZERS["bytes"], stop)


def test_one_stop_string_may_be_given_alone() -> None:
    assert "".join(pushed("bytes", byte_ids("bytes", "a.b"), ".")[0]) == "a"  # type: ignore[arg-type]


def test_each_token_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = Pieces.piece
    monkeypatch.setattr(
        Pieces, "piece", lambda self, id_, first: calls.append(id_) or real(self, id_, first)
    )
    ids = byte_ids("bytes", "a" * 2000)
    calls.clear()
    pushed("bytes", ids, ["aaab"])
    assert calls == ids


def test_special_tokens_are_shown_on_request() -> None:
    stream = TextStream(TOKENIZERS["bytes"], skip_specials=False)
    assert [stream.push(id_) for id_ in (0, 2)] == ["<|endoftext|>", "<|im_end|>"]
    assert pushed("bytes", [0, 2])[0] == ["", "", ""]
