"""Byte-pair tables: every id is the one that the `tokenizers` library gives."""

import json
from functools import cache
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core

import vocabularies
from chalot.errors import TokenizerError
from chalot.text.byte_pairs import BytePairs, compile_tables
from chalot.text.tokenizer import Tokenizer, check_same, compiled
from chalot.text.vocabulary import parse

WHOLE = ["zzqx", "Ġzzqx", "quick"]  # tokens that no merge makes


def changed(**model: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(vocabularies.byte_level())
    document["model"].update(model)
    return document


def beginning() -> dict[str, Any]:
    """As Llama 3's: words that are tokens stay whole, and a token begins each text."""
    document = changed(ignore_merges=True)
    vocab = document["model"]["vocab"]
    added = {t["content"] for t in document["added_tokens"]}
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] in vocab]
    for word in WHOLE:
        vocab.setdefault(word, len(vocab))
    first = len(vocab)
    more = sorted(added - vocab.keys())
    like = document["added_tokens"][0]
    document["added_tokens"] += [
        {**like, "content": text, "id": first + n, "special": False} for n, text in enumerate(more)
    ]
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {
                "id": "<|endoftext|>", "ids": [vocab["<|endoftext|>"]], "tokens": ["<|endoftext|>"]
            }
        },
    }  # fmt: skip
    return document


def older() -> dict[str, Any]:
    """Merges written "a b", as before tokenizers 0.20."""
    document = changed()
    document["model"]["merges"] = [" ".join(m) for m in document["model"]["merges"]]
    return document


SOURCES = {"new": changed, "older": older, "beginning": beginning}


@cache
def content(name: str) -> bytes:
    return json.dumps(SOURCES[name]()).encode()


@cache
def pair(name: str) -> tuple[Tokenizer, Tokenizer]:
    """(the library's, by tables)"""
    tables = compiled(content(name))
    assert tables is not None
    settings = {"eos_token": "<|im_end|>"}
    return (
        Tokenizer.from_documents(content(name), settings),
        Tokenizer.from_documents(b"", settings, tables=tables),
    )


PARTS = st.sampled_from(
    [*vocabularies.TEXTS, *vocabularies.CHATML, *vocabularies.SOFT, *WHOLE, " ", "\n\n", "e\u0301"]
)
TEXTS = st.lists(st.one_of(PARTS, st.text(max_size=12)), max_size=6).map("".join)


@pytest.mark.parametrize("name", SOURCES)
@given(text=TEXTS, specials=st.booleans())
def test_ids_are_the_librarys(name: str, text: str, specials: bool) -> None:
    library, tables = pair(name)
    assert tables.encode(text, specials=specials) == library.encode(text, specials=specials)


@pytest.mark.parametrize("name", SOURCES)
@given(text=TEXTS, bare=st.booleans())
def test_a_core_is_the_librarys(name: str, text: str, bare: bool) -> None:
    library = Core.from_buffer(content(name))
    core = BytePairs(compile_tables(content(name), parse) or b"", parse)
    expected = library.encode(text, add_special_tokens=not bare).ids
    assert core.encode(text, add_special_tokens=not bare).ids == expected


@given(letters=st.text("ab", max_size=200), order=st.permutations(["a a", "b b", "a b", "aa b"]))
def test_pairs_merge_by_rank_then_place(letters: str, order: list[str]) -> None:
    if order.index("aa b") < order.index("a a"):
        order.remove("aa b")
    vocab = {t: n for n, t in enumerate(["a", "b", *(m.replace(" ", "") for m in order)])}
    model = {"type": "BPE", "vocab": vocab, "merges": order}
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
        "decoder": None, "model": model,
    }  # fmt: skip
    raw = json.dumps(document).encode()
    core = BytePairs(compile_tables(raw, parse) or b"", parse)
    assert core.encode(letters).ids == Core.from_buffer(raw).encode(letters).ids


@pytest.mark.parametrize("name", SOURCES)
def test_all_else_is_the_same(name: str) -> None:
    library, tables = pair(name)
    check_same(library, tables)
    every = range(library.vocabulary_size)
    assert [tables.decode([i], False) for i in every] == [library.decode([i], False) for i in every]
    core, lean = library._opened.core, tables._opened.core
    names = [core.id_to_token(i) for i in every]
    assert [lean.id_to_token(i) for i in every] == names
    assert [lean.token_to_id(t) for t in names if t] == [core.token_to_id(t) for t in names if t]
    assert lean.token_to_id("no such token") is lean.token_to_id("") is None
    for wrong, error in ((-1, OverflowError), (1 << 32, OverflowError), ("x", TypeError)):
        with pytest.raises(error):
            lean.id_to_token(wrong)


def test_what_is_no_plain_bpe_is_opened_as_it_is() -> None:
    assert compiled(vocabularies.unigram()) is None
    for setting in ({"dropout": 0.1}, {"end_of_word_suffix": "</w>"}):
        assert compiled(json.dumps(changed(**setting)).encode()) is None


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("skeleton", lambda raw: b"{}"),
        ("ids", lambda raw: raw[:-4]),
        ("ids", lambda raw: raw[:-4] + b"\xff" * 4),
        ("pairs", lambda raw: raw[:-8]),
        ("pairs", lambda raw: raw[:-1]),
        ("merges", lambda raw: raw[:-4] + b"\xff" * 4),
        ("tokens", lambda raw: b""),
    ],
)
def test_damaged_tables_are_refused(field: str, change: Any) -> None:
    tables = msgspec.msgpack.decode(compiled(content("new")) or b"")
    tables[field] = change(tables[field])
    with pytest.raises(TokenizerError):
        Tokenizer.from_documents(b"", tables=msgspec.msgpack.encode(tables)).encode("x")
    with pytest.raises(TokenizerError):
        Tokenizer.from_documents(b"", tables=b"\x01").encode("x")
