"""The text side of a server: tool calls in any pieces, grammars of tools, masks, schemas."""

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chalot.demo import FOLDER

llguidance = pytest.importorskip("llguidance", reason="the extra `serve` is not installed")
pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from chalot.serve.faults import Fault  # noqa: E402
from chalot.serve.guard import host_of, known  # noqa: E402
from chalot.serve.shapes import Function, Tool  # noqa: E402
from chalot.serve.structured import GrammarMask, Structures, schema_grammar  # noqa: E402
from chalot.serve.tools import STYLES, CallReader, Style, call_grammar, style_of  # noqa: E402

HERMES, MISTRAL, LLAMA = (
    next(style for _, style in STYLES if style.name == name)
    for name in ("hermes", "mistral", "llama3")
)
ENDS = frozenset([4095, 4093])
ONE = '{"name": "f", "arguments": {"a": "<b> } \\"x\\" ]"}}'
ANSWERS = [  # style, text, what is said, names of calls
    (HERMES, "plain text < with <tool", "plain text < with <tool", []),
    (HERMES, f"Well:<tool_call>\n{ONE}\n</tool_call>", "Well:", ["f"]),
    (HERMES, f"<tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>", "\n", ["f", "f"]),
    (HERMES, "a<tool_call>nonsense</tool_call>b", "a<tool_call>nonsense</tool_call>b", []),
    (HERMES, f"<tool_call>{ONE}", f"<tool_call>{ONE}", []),  # was cut
    (HERMES, ONE.join(["<tool_call>"] * 2), None, []),
    (HERMES, '<tool_call>{"name": "g", "arguments": {}}</tool_call>', None, []),  # unknown
    (MISTRAL, f"[TOOL_CALLS] [{ONE}, {ONE}]", "", ["f", "f"]),
    (MISTRAL, "see [TOOL_ or [TOOL_CALLS] x", "see [TOOL_ or [TOOL_CALLS] x", []),
    (LLAMA, '  {"name": "f", "parameters": {"a": 1}}', "  ", ["f"]),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}', "", ["f"]),
    (LLAMA, '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    (LLAMA, 'said {"name": "f", "parameters": {}}', 'said {"name": "f", "parameters": {}}', []),
    (LLAMA, "", "", []),
]


@pytest.fixture(scope="module")
def structures() -> Structures:
    return Structures((FOLDER / "tokenizer.json").read_text("utf-8"), 4096, ENDS)


@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 80), max_size=12))
def test_calls_are_found_however_the_text_is_cut(answer: Any, cuts: list[int]) -> None:
    style, text, said, names = answer
    reader = CallReader(style, ["f"])
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown, calls = "", []
    for a, b in zip(places, places[1:], strict=False):
        more, found = reader.push(text[a:b])
        shown, calls = shown + more, calls + found
    more, found = reader.flush()
    shown, calls = shown + more, calls + found
    assert shown == (text if said is None else said)
    assert [call.name for call in calls] == names
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)
    assert len({call.id for call in calls}) == len(calls)


def test_styles_of_templates() -> None:
    from conversations import TEMPLATES

    found = {name: style_of(TEMPLATES[name]).name for name in ("qwen", "mistral", "llama")}
    assert found == {"qwen": "hermes", "mistral": "mistral", "llama": "llama3"}
    with pytest.raises(Fault, match="tools"):
        style_of(TEMPLATES["gemma"])


def walk(structures: Structures, grammar: str, rng: random.Random, most: int) -> bytes | None:
    """A random text of a grammar, token by token as its mask allows; None if it did not end."""
    mask = GrammarMask(structures, structures.matcher(grammar, "x"))
    tokens: list[int] = []
    while len(tokens) < most:
        bits = np.unpackbits(mask.allowed(tokens).view(np.uint8), bitorder="little")
        ids = np.flatnonzero(bits[:4096]).tolist()
        assert ids
        ends = [id_ for id_ in ids if id_ in ENDS]
        tokens.append(ends[0] if ends and rng.random() < 0.5 else rng.choice(ids))
        if tokens[-1] in ENDS:
            assert mask.holds(tokens)
            text: bytes = structures.tokens.decode_bytes(tokens[:-1])
            return text
    return None


TOOLS = [
    Tool(
        Function(
            name,
            parameters={
                "type": "object",
                "properties": {"n": {"type": "integer", "maximum": 999, "minimum": 0}},
                "required": ["n"],
                "additionalProperties": False,
            },
        ),
        "function",
    )
    for name in ("f", "other-tool")
]


@pytest.mark.parametrize("style", [HERMES, MISTRAL, LLAMA], ids=lambda style: style.name)
@pytest.mark.parametrize("many", [False, True])
def test_what_a_grammar_of_tools_allows_is_read_as_calls(
    structures: Structures, style: Style, many: bool
) -> None:
    grammar = llguidance.LLMatcher.grammar_from_lark(
        call_grammar(style, TOOLS, {}, must=True, many=many)
    )
    rng, seen = random.Random(1), 0
    for _ in range(12):
        text = walk(structures, grammar, rng, 150)
        if text is None:
            continue
        seen += 1
        reader = CallReader(style, ["f", "other-tool"])
        said, calls = reader.push(text.decode())
        more, rest = reader.flush()
        calls += rest
        assert not (said + more).strip() and calls and (many or len(calls) == 1)
        assert all(0 <= json.loads(call.arguments)["n"] <= 999 for call in calls)
    assert seen > 3


def test_a_mark_that_is_one_token_is_meant_by_that_token(structures: Structures) -> None:
    specials = {"[TOOL_CALLS]": 4094}
    grammar = call_grammar(MISTRAL, TOOLS, specials, must=True, many=False)
    mask = GrammarMask(
        structures, structures.matcher(llguidance.LLMatcher.grammar_from_lark(grammar), "x")
    )
    bits = np.unpackbits(mask.allowed([]).view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [4094]
    free = call_grammar(MISTRAL, TOOLS, specials, must=False, many=False)
    mask = GrammarMask(
        structures, structures.matcher(llguidance.LLMatcher.grammar_from_lark(free), "x")
    )
    bits = np.unpackbits(mask.allowed([]).view(np.uint8), bitorder="little")
    allowed = np.flatnonzero(bits).tolist()
    assert 4094 in allowed and 4095 in allowed and len(allowed) > 3000
    after = np.unpackbits(mask.allowed([4094]).view(np.uint8), bitorder="little")
    assert 0 < np.flatnonzero(after).size < 100


NAMES = st.sampled_from(["a", "b", "cé", 'd"'])
LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.builds(lambda n: {"type": "integer", "minimum": 0, "maximum": n}, st.integers(0, 500)),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
    st.builds(lambda v: {"enum": v}, st.lists(st.integers(0, 9) | st.text(max_size=3), min_size=1)),
    st.just({"type": "string", "pattern": "^[a-f]{1,3}$"}),
    st.just({"type": ["null", "number"], "minimum": -5, "maximum": 5}),
    st.just({"const": {"x": [1, None]}}),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            lambda s, n: {"type": "array", "items": s, "maxItems": n}, inner, st.integers(0, 3)
        ),
        st.builds(
            lambda p, all_: {
                "type": "object",
                "properties": p,
                "required": sorted(p) if all_ else [],
                "additionalProperties": False,
            },
            st.dictionaries(NAMES, inner, max_size=3),
            st.booleans(),
        ),
        st.builds(lambda s: {"anyOf": s}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(SCHEMAS, st.randoms(use_true_random=False))
def test_every_answer_that_ends_is_valid(
    structures: Structures, schema: dict[str, Any], rng: random.Random
) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema")
    try:
        grammar = schema_grammar(schema, "x")
        structures.matcher(grammar, "x")
    except Fault:  # fails closed
        return
    text = walk(structures, grammar, rng, 120)
    if text is not None:
        jsonschema.validate(json.loads(text), schema)


def test_a_mask_that_is_asked_again_from_the_start(structures: Structures) -> None:
    """An answer that gave up its pages is computed once more."""
    grammar = schema_grammar({"type": "object"}, "x")
    mask = GrammarMask(structures, structures.matcher(grammar, "x"))
    open_ = structures.tokens.tokenize_str("{")
    first, second = mask.allowed([]).copy(), mask.allowed(open_).copy()
    assert (mask.allowed([]) == first).all() and (mask.allowed(open_) == second).all()
    assert (first != second).any()


def test_hosts_and_keys() -> None:
    hosts = {"localhost:80": "localhost", "[::1]:80": "::1", "LOCALHOST": "localhost", "": ""}
    assert {header: host_of(header) for header in hosts} == hosts
    assert known("abcdefgh", ("12345678", "abcdefgh")) and not known("", ("abcdefgh",))
    assert not known("abcdefg\udcff", ("abcdefgh",))
