"""Long texts, encoded by the extension: every id is the one that the `tokenizers` library gives."""

import json
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Core

import vocabularies
from chalot.kernels.backend import byte_pairs as native
from chalot.text import byte_pairs
from chalot.text.byte_pairs import BytePairs, compile_tables
from chalot.text.styles import STYLES, kinds, style_of
from chalot.text.tokenizer import Tokenizer, compiled
from chalot.text.vocabulary import parse

pytestmark = pytest.mark.skipif(native is None, reason="the extension is not built")
TRICKY = [
    "x'Sab I'LLz y'Db 'sab I'll I'LL we'Re they've'd 's'S 'ſ 'tis '' ' x's\u017f",
    "a(a)\tb a  b   c\td \n e\n\n\nf \r\n\r\n  g\n  \nh   ",
    "1 12 123 1234 12345 ½³²Ⅷ 三 ٣٤ x1y2 3.14 1,000",
    "!?! ?? ...\n\n... (a) [b]{c} <|x|> $%^\r\n a_b __init__ #x",
    "\u00a0a \u3000b\u2028c\u0085d\x1c e\u200bf \u00ad g\ufeffh",
    "e\u0301 Tie\u0302\u0301ng \u1e9b\u0323 각 각 👩‍👩‍👧 🏳️‍🌈 \U000f0000 \U0010ffff \x00\x7f",
]


@pytest.fixture(autouse=True)
def every_text_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_pairs, "LONG", 0)


@cache
def document(style: str) -> dict[str, Any]:
    """Merges that cross words, so that a text split elsewhere has other ids."""
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        show_progress=False,
        special_tokens=["<|x|>", "<|y|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    lines = [piece for text in TRICKY for n in range(1, 8) for piece in (text[n:], text[:-n])]
    often = ["\n\n", " \n \n  b", "'S", "'Sab", "(a", "\tb", "I'LLz", "x'Re", "'\u017fa"]
    core.train_from_iterator(lines * 2 + often * 50, trainer)
    found: dict[str, Any] = json.loads(core.to_str())
    found["pre_tokenizer"] = STYLES[style].pre_tokenizer()
    if STYLES[style].normalizer:
        found["normalizer"] = {"type": STYLES[style].normalizer}
    found["model"]["ignore_merges"] = STYLES[style].ignore_merges
    if STYLES[style].ignore_merges:
        vocab = found["model"]["vocab"]
        for word in ("Ġzq", "(zq", "vqx"):
            vocab[word] = len(vocab)
    return found


@cache
def cores(style: str) -> tuple[Core, BytePairs]:
    raw = json.dumps(document(style)).encode()
    return Core.from_buffer(raw), BytePairs(compile_tables(raw, parse) or b"", parse, native)


styled = pytest.mark.parametrize("style", STYLES)
LETTERS = st.sampled_from(
    list("aZé1²½三 \t\n\r\u00a0\u3000'.!_$<|xsdtmrelv\u017f\u0301\u212a\u037e")
)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(TRICKY), LETTERS, st.text(max_size=6), st.sampled_from(["zq", "vqx"])
    ),
    max_size=12,
).map("".join)


@styled
@example(text="".join(TRICKY))
@given(text=TEXTS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_ids_are_the_librarys(style: str, text: str) -> None:
    library, core = cores(style)
    assert core._long is not None
    assert core._long.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert core.encode(text).ids == library.encode(text, add_special_tokens=False).ids


@styled
def test_every_kind_of_character_is_the_librarys(style: str) -> None:
    table = kinds()
    edges = np.flatnonzero(table[1:] != table[:-1])
    codes = sorted({int(c) + n for c in edges for n in (0, 1)} | set(range(0, 0x110000, 997)))
    letters = [chr(c) for c in codes if not 0xD800 <= c < 0xE000]
    library, core = cores(style)
    for around in ("{}a", "'{}", " {}1", "\n{} {}", "!{}\n"):
        text = "".join(around.replace("{}", letter) for letter in letters)
        assert core.encode(text).ids == library.encode(text).ids


def test_kinds_are_those_of_the_library() -> None:
    """Where this fails, `tokenizers` has a new Unicode: run tools/character_kinds.py."""
    table = kinds()
    every = [c for c in range(0, 0x110000, 5) if not 0xD800 <= c < 0xE000]
    for kind, pattern in ((1, r"\p{L}+"), (2, r"\p{N}+"), (3, r"\s+")):
        split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        found = split.pre_tokenize_str("".join(map(chr, every)))
        assert {ord(c) for word, _ in found for c in word} == {c for c in every if table[c] == kind}


def test_a_style_is_known_by_its_json() -> None:
    for style in STYLES.values():
        assert style_of(style.pre_tokenizer()) is style
    split = pre_tokenizers.Split(Regex(STYLES["qwen2"].pattern), "isolated")
    steps = [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    written = json.loads(pre_tokenizers.Sequence(steps).__getstate__())  # type: ignore[arg-type]
    assert style_of(written) is STYLES["qwen2"]
    assert style_of({"type": "ByteLevel", "add_prefix_space": False}) is STYLES["gpt2"]
    for other in (None, [], {"type": "Metaspace"}, {"type": "ByteLevel", "add_prefix_space": True}):
        assert style_of(other) is None


# ---- the whole tokenizer, with marks


@cache
def tokenizers_of(name: str) -> tuple[Tokenizer, Tokenizer]:
    special = {"bytes": vocabularies.byte_level, "odd": odd_tokens}
    raw = special[name]() if name in special else json.dumps(document(name)).encode()
    settings = {"eos_token": "<|y|>"}
    return (
        Tokenizer.from_documents(raw, settings),
        Tokenizer.from_documents(b"", settings, tables=compiled(raw), native=native),
    )


def odd_tokens() -> bytes:
    """Added tokens that eat spaces, stand alone, or are found after normalising."""
    found = json.loads(vocabularies.byte_level())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    first = max(token["id"] for token in found["added_tokens"]) + 1
    first = max(first, len(found["model"]["vocab"]))
    for n, (text, trait) in enumerate(
        [("<l>", "lstrip"), ("<r>", "rstrip"), ("alone", "single_word"), ("Kex", "normalized")]
    ):
        token = {**flags, "id": first + n, "content": text, "special": False, trait: True}
        found["added_tokens"].append(token)
    return json.dumps(found).encode()


PARTS = [
    *vocabularies.CHATML,
    *vocabularies.SOFT,
    "<|x|>",
    "<l>",
    "<r>",
    "alone",
    "Kex",
    "\u212aex",
]


@pytest.mark.parametrize("name", ["bytes", "odd", "llama3", "gpt2"])
@given(text=st.lists(st.one_of(st.sampled_from(PARTS), TEXTS), max_size=5).map("".join))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_marks_are_the_librarys(name: str, text: str) -> None:
    library, fast = tokenizers_of(name)
    for specials in (False, True):
        assert fast.encode(text, specials=specials) == library.encode(text, specials=specials)


def test_a_beginning_of_text_is_kept() -> None:
    changed = document("llama3") | {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|x|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<|y|>", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                text: {"id": text, "ids": [n], "tokens": [text]}
                for n, text in enumerate(["<|x|>", "<|y|>"])
            },
        }
    }
    raw = json.dumps(changed).encode()
    library, core = (
        Core.from_buffer(raw),
        BytePairs(compile_tables(raw, parse) or b"", parse, native),
    )
    for text in TRICKY:
        assert core.encode(text, True).ids == library.encode(text).ids
        bare = core.encode(text)
        assert core.post_process(bare).ids == library.encode(text).ids


# ---- words


@given(
    words=st.lists(st.text("ab", max_size=90), min_size=1, max_size=4),
    order=st.permutations(["a a", "b b", "a b", "b a", "aa b", "aa aa", "ab ab", "ba ab"]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_merging_is_the_oracles(words: list[str], order: list[str]) -> None:
    """Merges of every order, those before the merges that make their parts too."""
    tokens = ["a", "b", *dict.fromkeys(m.replace(" ", "") for m in order)]
    number = {token: n for n, token in enumerate(tokens)}
    table = {}
    for rank, merge in enumerate(order):
        left, right = merge.split()
        table[number[left] << 32 | number[right]] = rank, number[left + right]
    pairs = np.array(sorted(table), np.uint64)
    merges = np.array([n for pair in sorted(table) for n in table[pair]], np.uint32)
    oracle = byte_pairs.Merges(memoryview(pairs), memoryview(merges))
    letters = np.array([number[c] for c in "".join(words)], np.uint32)
    ends = np.cumsum([len(word) for word in words]).astype(np.uint64)
    wanted = [id_ for word in words for id_ in oracle.word(tuple(number[c] for c in word))]
    assert native is not None
    assert native(pairs, merges, len(tokens)).words(letters, ends) == wanted


def test_tables_that_do_not_fit_are_refused() -> None:
    assert native is not None
    pairs, merges = np.array([1, 2], np.uint64), np.array([0, 2, 1, 3], np.uint32)
    good = native(pairs, merges, 4)
    for wrong in (
        (pairs[::-1].copy(), merges, 4),
        (np.array([1, 1], np.uint64), merges, 4),
        (pairs, merges[:3].copy(), 4),
        (pairs, merges, 3),
        (np.array([1, 9 << 32], np.uint64), merges, 4),
    ):
        with pytest.raises(ValueError):
            native(*wrong)
    letters = np.array([0, 1, 2, 4_000_000_000], np.uint32)
    assert good.words(letters, np.array([4], np.uint64)) == [2, 2, 4_000_000_000]
    for ends in ([5], [3, 2], [1 << 63]):
        with pytest.raises(ValueError):
            good.words(letters, np.array(ends, np.uint64))
    with pytest.raises(ValueError):
        good.text(b"x", STYLES["gpt2"].rules)  # no alphabet yet


def test_bytes_that_are_not_utf8_are_read_within_bounds() -> None:
    _, core = cores("qwen2")
    assert core._long is not None
    for raw in (
        b"\xff",
        b"\xf4\x90\x80\x80",
        b"a\xc3",
        b"\xe2\x82",
        b"\xf0\x9f\x98",
        b"\xed\xa0\x80",
    ):
        for style in STYLES.values():
            assert core._long._native.text(raw, style.rules)


# ---- time


@styled
@pytest.mark.parametrize("text", ["a", " ", "\n", "!?", "ab\u0301", "'", "9", "x\n ", "一"])
def test_no_text_takes_more_than_n_log_n(style: str, text: str) -> None:
    """Four times the text, far less than sixteen times the processor time."""
    _, core = cores(style)

    def seconds(length: int) -> float:
        many, start = text * (length // len(text)), time.process_time()
        core.encode(many)
        return time.process_time() - start

    seconds(1000)
    small = min(seconds(30_000) for _ in range(2))
    assert seconds(120_000) < 10 * small + 0.05


# ---- SentencePiece's kind


def sentencepiece(kind: str) -> bytes:
    """As Llama 2's, Mistral's and Gemma's; "words" has no token across a space."""
    if kind in ("legacy", "first", "none"):
        return vocabularies.sentencepiece(kind)
    found = json.loads(vocabularies.sentencepiece("none" if kind == "gemma" else "legacy"))
    if kind == "gemma":
        found["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        }
    elif kind in ("always", "never"):
        found["normalizer"] = None
        found["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": kind, "split": False
        }  # fmt: skip
    elif kind == "words":
        model = found["model"]
        crossing = {t for t in model["vocab"] if "▁" in t.lstrip("▁")}
        merges = [m for m in model["merges"] if not crossing & {*m, m[0] + m[1]}]
        added = {t["content"] for t in found["added_tokens"]}
        kept = [t for t in model["vocab"] if t not in crossing and t not in added]
        names = [t["content"] for t in found["added_tokens"]]
        model["vocab"] = {t: n for n, t in enumerate(names[:3] + kept)}
        model["merges"] = merges
        for n, token in enumerate(found["added_tokens"]):
            token["id"] = n if n < 3 else len(model["vocab"]) + n
        found["added_tokens"] = found["added_tokens"][:3]
    elif kind == "unknown":
        found["model"]["byte_fallback"] = False
    return json.dumps(found).encode()


KINDS = ("legacy", "first", "none", "gemma", "always", "never", "words", "unknown")


@cache
def pieces_of(kind: str) -> tuple[Tokenizer, Tokenizer, BytePairs, Core]:
    raw, settings = sentencepiece(kind), {"bos_token": "<s>", "eos_token": "</s>"}
    tables = compiled(raw) or b""
    return (
        Tokenizer.from_documents(raw, settings),
        Tokenizer.from_documents(b"", settings, tables=tables, native=native),
        BytePairs(tables, parse, native),
        Core.from_buffer(raw),
    )


SPACES = st.sampled_from(
    [" ", "  ", "▁", "a ▁ b", " x", "\n ", "<0x41>", "<unk>", "</s>", "[INST]", "<|user|>"]
)
LINES = st.one_of(SPACES, st.sampled_from(vocabularies.TEXTS[:5]), TEXTS)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.lists(LINES, max_size=6).map("".join))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_sentencepieces_are_the_librarys(kind: str, text: str) -> None:
    library, fast, core, raw = pieces_of(kind)
    assert core._long is not None and core._long.__class__.__name__ == "_Characters"
    assert core.encode(text).ids == raw.encode(text, add_special_tokens=False).ids
    assert core.encode(text, True).ids == raw.encode(text).ids
    for specials in (False, True):
        wanted = library.encode(text, specials=specials)
        assert fast.encode(text, specials=specials) == wanted
    assert fast.decode(wanted) == library.decode(wanted)


def test_both_ways_of_cutting_sentencepieces_are_tried() -> None:
    splits = {kind: pieces_of(kind)[2]._long._splits for kind in KINDS}  # type: ignore[union-attr]
    assert splits["words"] and not splits["legacy"]
    text = "The quick  brown fox ▁▁ é\u0301 你好 " * 3
    assert pieces_of("words")[2]._long.encode(text) is not None  # type: ignore[union-attr]
    assert pieces_of("unknown")[2]._long.encode(text) is None  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["legacy", "none", "words"])
def test_streams_of_bytes_are_whole_characters(kind: str) -> None:
    """Of characters without a token: nothing until the last byte is there."""
    _, fast, _, _ = pieces_of(kind)
    text = "x 🦊é\u0301漢 y"
    ids = fast.encode(text)
    stream, shown = fast.incremental(), []
    for id_ in ids:
        shown.append(stream.push(id_))
    assert "".join(shown) + stream.flush() == text == fast.decode(ids)
    assert all("\ufffd" not in piece for piece in shown) and "" in shown
