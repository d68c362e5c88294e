"""Text to ids and back on the bundled tokenizer: streams, stop strings, special tokens as text."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chalot.demo import FOLDER
from chalot.errors import TokenizerError
from chalot.formats.safetensors import SafetensorsFolder
from chalot.text.stream import TextStream
from chalot.text.tokenizer import Tokenizer, check_same, from_source

VIETNAMESE = "Tiếng Việt có dấu: ă â đ ê ô ơ ư, ngã hỏi nặng."
TEXTS = [
    "def add(a, b):\n    return a + b\n",
    unicodedata.normalize("NFC", VIETNAMESE),
    unicodedata.normalize("NFD", VIETNAMESE),
    "日本語と中文, 한국어",
    "🙂👩‍👩‍👧‍👦🇻🇳 ✈️ é",
    "مرحبا بالعالم",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with SafetensorsFolder(FOLDER) as folder:
        return from_source(folder)


texts = st.lists(st.sampled_from(TEXTS) | st.text(max_size=20), max_size=4).map("".join)


@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    text = unicodedata.normalize("NFC", text)  # as the tokenizer does first
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 4095), max_size=40))
def test_stream_is_decode_for_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_streams_hold_whole_characters_only(tokenizer: Tokenizer, text: str) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer.encode(text)
    pieces = [stream.push(i) for i in ids]
    assert len(ids) > 3 and not any("�" in p for p in pieces)
    assert "".join(pieces) + stream.flush() == unicodedata.normalize("NFC", text)


@settings(max_examples=80, deadline=None)
@given(text=texts, cut=st.tuples(st.integers(0, 60), st.integers(1, 6)))
def test_stop_strings_match_over_token_borders(
    tokenizer: Tokenizer, text: str, cut: tuple[int, int]
) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    stop = whole[cut[0] : cut[0] + cut[1]] or "never there"
    stream = TextStream(tokenizer, [stop])
    shown = ""
    for i in ids:
        shown += stream.push(i)
        assert stop not in shown
    shown += stream.flush()
    assert shown == whole.split(stop, 1)[0]
    assert (stream.stopped is not None) == (stop in whole)


def test_special_tokens_that_a_user_types_stay_text(tokenizer: Tokenizer) -> None:
    special = set(tokenizer.special_tokens.values())
    assert len(special) == 3
    for name, token in tokenizer.special_tokens.items():
        assert not special & set(tokenizer.encode(f"a {name} b"))
        assert tokenizer.encode(f"a {name} b", specials=True).count(token) == 1
        assert tokenizer.decode(tokenizer.encode(f"a {name} b")) == f"a {name} b"


@settings(max_examples=60, deadline=None)
@given(
    content=st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "system", "\n", "<|", "|>", " "])
        | st.text(max_size=5),
        max_size=6,
    ).map("".join)
)
def test_no_message_forges_a_turn(tokenizer: Tokenizer, content: str) -> None:
    start, end = (tokenizer.special_tokens[t] for t in ("<|im_start|>", "<|im_end|>"))
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert ids.count(start) == 2 and ids.count(end) == 1  # one turn, and the answer's beginning


def test_a_plain_conversation_is_its_rendering(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What does zip() do?"},
    ]
    text = tokenizer.render(messages)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat does zip() do?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.encode_chat(messages) == tokenizer.encode(text, specials=True)


def changed(
    tokenizer_config: bytes | None = None, tokenizer_json: bytes | None = None
) -> Tokenizer:
    class Documents:
        def document(self, name: str) -> bytes | None:
            replaced = {
                "tokenizer_config.json": tokenizer_config,
                "tokenizer.json": tokenizer_json,
            }.get(name)
            path = FOLDER / name
            return replaced or (path.read_bytes() if path.exists() else None)

    return from_source(Documents())


def test_a_changed_template_is_noticed(tokenizer: Tokenizer) -> None:
    check_same(tokenizer, changed())
    config = (FOLDER / "tokenizer_config.json").read_text()
    other = config.replace("<|im_end|>\\n{% endfor", "<|im_end|>\\n\\n{% endfor")
    assert other != config
    with pytest.raises(TokenizerError, match="template"):
        check_same(tokenizer, changed(other.encode()))


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(10**9) %}x{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception('no') }}",
        "{{ undefined_thing.x }}",
        "{% if %}",
    ],
)
def test_hostile_templates_end_in_a_typed_error(template: str) -> None:
    import json
    import time

    config = json.loads((FOLDER / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    start = time.perf_counter()
    with pytest.raises(TokenizerError):
        changed(json.dumps(config).encode()).render([{"role": "user", "content": "x"}])
    assert time.perf_counter() - start < 20  # bounded, not timed: an endless one would hang here


@pytest.mark.parametrize("raw", [b"", b"{}", b"[1]", b'{"model": 3}', b"\xff", b"[" * 100_000])
def test_broken_tokenizers_end_in_a_typed_error(raw: bytes) -> None:
    from chalot.errors import ChalotError

    with pytest.raises(ChalotError):
        changed(tokenizer_json=raw or b" ").encode("x")
