"""Structured output by llguidance: which tokens may come next so that an answer keeps its grammar.

It fails closed: what the grammar cannot hold an answer to is a Fault before any work. A completed
answer is in the grammar, because an end is allowed only where the grammar may end.
https://github.com/guidance-ai/llguidance
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from chalot.errors import ChalotError
from chalot.serve.faults import Fault
from chalot.serve.shapes import Format, Grammar, JsonObject, JsonSchema, Regex

MOST_GRAMMAR = 500_000  # characters
# What llguidance takes for a note and does not hold an answer to, though JSON Schema does.
UNENFORCED = (
    "additionalItems", "contentEncoding", "contentMediaType", "contentSchema", "dependencies",
    "dependentRequired", "dependentSchemas", "maxContains", "minContains", "unevaluatedItems",
    "unevaluatedProperties", "$recursiveRef", "$dynamicRef", "extends", "divisibleBy", "disallow",
)  # fmt: skip
STRICT: Any = {
    "lenient": False,
    "whitespace_pattern": r"[ \n]{0,20}",
}  # over a schema's "x-guidance"


class StructureError(ChalotError):
    """An answer left its grammar, or the grammar became too costly on the way."""


class Structures:
    """Grammars for one model's tokens."""

    def __init__(self, tokenizer_json: str, vocabulary: int, ends: frozenset[int]) -> None:
        if not ends:
            raise Fault("structured output needs a model with an end-of-text token")
        try:
            self.tokens = llguidance.LLTokenizer(
                tokenizer_json, n_vocab=vocabulary, eos_token=sorted(ends)
            )
        except Exception as error:  # noqa: BLE001  (of Rust; no common base)
            raise Fault(
                f"structured output: this model's tokenizer is not supported ({str(error)[:200]})"
            ) from None
        self.vocabulary = vocabulary
        self.limits = llguidance.LLParserLimits(
            initial_lexer_fuel=300_000,
            step_lexer_fuel=50_000,  # about 14,000 a millisecond
            step_max_items=50_000,
            max_lexer_states=20_000,  # at 1 to 2 kB each
            max_grammar_size=200_000,
            verbose_errors=False,
        )

    def matcher(self, grammar: str, param: str) -> Any:
        """A matcher at the grammar's start. Raises Fault for one that cannot be kept to."""
        if len(grammar) > MOST_GRAMMAR:
            raise Fault(
                f"{param}: found a grammar of {len(grammar):,} characters, expected at most "
                f"{MOST_GRAMMAR:,}",
                param=param,
            )
        matcher = llguidance.LLMatcher(self.tokens, grammar, log_level=0, limits=self.limits)
        reason = matcher.get_error()
        if not reason and not any(matcher.compute_bitmask()):
            reason = matcher.get_error() or "nothing satisfies it"
        if reason:
            raise refused(reason, param)
        matcher.reset()
        return matcher


def refused(reason: str, param: str) -> Fault:
    """What llguidance says, as a client's error."""
    keys = re.search(r"Unimplemented keys: (\[.*?\])", reason)
    said = f"keywords that cannot be enforced: {keys[1]}" if keys else " ".join(reason.split())
    return Fault(
        f"{param}: {said[:600]}; expected what llguidance can hold an answer to; see "
        "docs/server.md",
        param=param,
        code="unsupported_schema" if keys else "invalid_schema",
    )


def check_schema(schema: Any, param: str) -> None:
    """Raise Fault for keywords that would be passed over in silence."""
    found = sorted(_keywords(schema, 0, param))
    if found:
        raise refused(f"Unimplemented keys: {json.dumps(found)}", param)


def _keywords(schema: Any, depth: int, param: str) -> set[str]:
    """Keywords of UNENFORCED in a schema and in those inside of it."""
    if depth > 100:
        raise Fault(f"{param}: found a schema more than 100 deep", param=param)
    if isinstance(schema, list):
        return set().union(*(_keywords(one, depth + 1, param) for one in schema))
    if not isinstance(schema, Mapping):
        return set()
    found = {key for key in UNENFORCED if key in schema}
    for key, value in schema.items():
        if key in ("const", "enum", "default", "examples", "example"):
            continue
        if key in ("properties", "patternProperties", "$defs", "definitions"):
            value = list(value.values()) if isinstance(value, Mapping) else value
        found |= _keywords(value, depth + 1, param)
    return found


def schema_grammar(schema: Mapping[str, Any], param: str) -> str:
    """llguidance's grammar of a JSON schema. Raises Fault for one that is none."""
    check_schema(schema, param)
    try:
        made: str = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides=STRICT
        )
    except ValueError as error:
        raise refused(str(error), param) from None
    return made


def format_grammar(wanted: Format | None, param: str = "response_format") -> str | None:
    """llguidance's grammar of a response format; None where any text will do."""
    made: str | None = None
    if isinstance(wanted, JsonObject):
        return schema_grammar({"type": "object"}, param)
    if isinstance(wanted, JsonSchema):
        return schema_grammar(wanted.json_schema.schema or {"type": "object"}, param)
    if isinstance(wanted, Regex):
        made = llguidance.LLMatcher.grammar_from_regex(wanted.pattern)
    if isinstance(wanted, Grammar):
        made = llguidance.LLMatcher.grammar_from_lark(wanted.grammar)
    return made


class GrammarMask:
    """`chalot.engine.requests.Mask` of one answer."""

    def __init__(self, structures: Structures, matcher: Any) -> None:
        self.matcher = matcher
        self.words = -(-structures.vocabulary // 32)
        self.read: list[int] = []

    def allowed(self, tokens: list[int]) -> NDArray[np.uint32]:
        """Bits of the ids that may follow. Raises StructureError where the grammar gives up."""
        if tokens[: len(self.read)] != self.read:  # an answer that was begun again
            self.matcher.reset()
            self.read = []
        for token in tokens[len(self.read) :]:
            if not self.matcher.consume_token(token):
                raise self._lost()
            self.read.append(token)
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint32)
        if self.matcher.is_error():
            raise self._lost()
        return bits[: self.words]

    def _lost(self) -> StructureError:
        reason = " ".join(self.matcher.get_error().split())[:300]
        return StructureError(
            f"structured output: the grammar gave up in mid-answer: {reason or 'unknown reason'}; "
            "a simpler schema or grammar may do"
        )

    def holds(self, tokens: list[int]) -> bool:
        """Whether these tokens, the end among them, are a whole answer."""
        for token in tokens[len(self.read) :]:
            if self.matcher.is_stopped():
                break
            if not self.matcher.consume_token(token):
                return False
            self.read.append(token)
        return bool(self.matcher.is_accepting() or self.matcher.is_stopped())
