"""A model's chat template: messages to text, as transformers renders it, within bounds.

The template comes with the model, from anywhere, so it is as hostile as any file. It is parsed by
jinja2 with the settings that transformers documents (trim_blocks, lstrip_blocks, loop controls,
`generation` blocks, `tojson`, `raise_exception`, `strftime_now`) and evaluated by
`chalot.text.jinja`, where every step and every character is paid from a budget: `BASE_UNITS` and
`UNITS_PER_CHARACTER` of input. That bounds time (well under a second for a short chat), memory
and the length of the text at once; what goes beyond is a TokenizerError that names the line.

Reference: https://huggingface.co/docs/transformers/chat_templating
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from chalot.errors import TokenizerError

if TYPE_CHECKING:
    from chalot.text.jinja.budget import Budget

MAX_SOURCE = 1 << 18  # characters of a template; the longest known have about 30,000
MAX_DEPTH = 64  # of lists and mappings in messages and tools
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # the first is the usual name
SAID = ("content", "tool_calls", *THOUGHTS)  # one of them is there
BASE_UNITS = 1_000_000
UNITS_PER_CHARACTER = 32


class ChatTemplate:
    """One template. Parsed when first used; then it may be used from any thread."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TokenizerError(
                f"chat template: found {len(source)} characters, expected at most {MAX_SOURCE}; "
                "give a shorter one"
            )
        self.source = source

    @cached_property
    def _body(self) -> Any:
        from jinja2 import Environment, TemplateSyntaxError, nodes
        from jinja2.ext import Extension
        from jinja2.parser import Parser

        class GenerationBlock(Extension):
            """{% generation %} marks what a model wrote, for training; here it is only a scope."""

            tags = {"generation"}

            def parse(self, parser: Parser) -> nodes.Node:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return nodes.Scope(body, lineno=line)

        environment = Environment(  # noqa: S701  (plain text; nothing is escaped)
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", GenerationBlock],
        )
        try:
            return environment.parse(self.source).body
        except TemplateSyntaxError as error:
            raise TokenizerError(f"chat template, line {error.lineno}: {error.message}") from None
        except (RecursionError, ValueError) as error:  # ValueError: a number of over 4,300 digits
            raise TokenizerError(
                f"chat template: found {error}, expected what jinja2 can parse"
            ) from None

    def render(self, variables: Mapping[str, Any], now: datetime | None = None) -> str:
        """The text for `variables` (messages, tools, ...: plain data, see `plain`).

        `now` is what strftime_now formats, the current time if none. Raises TokenizerError when the
        template refuses the messages (raise_exception), fails, or finds no end.
        """
        from jinja2 import UndefinedError
        from jinja2.exceptions import SecurityError

        from chalot.text.jinja.budget import Budget, Fault
        from chalot.text.jinja.evaluate import Evaluator, Scope

        body, names = self._body, {name: plain(value) for name, value in variables.items()}
        budget = Budget(BASE_UNITS + UNITS_PER_CHARACTER * sum(map(_size, names.values())))
        try:
            return Evaluator(budget).captured(body, Scope({}, names, _functions(budget, now)))
        except _Refused as refusal:
            raise TokenizerError(
                f"the model's chat template refuses these messages: {refusal}"
            ) from None
        except RecursionError:
            reason = "found calls or values nested too deeply"
        except MemoryError:
            reason = "found more text than memory holds"
        except (Fault, UndefinedError, SecurityError) as error:
            reason = str(error)
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise TokenizerError(
            f"chat template, line {budget.line}: {reason[:500]}; check that the messages have "
            "the shape that this model expects, or give another template"
        )


class _Refused(Exception):
    """The template called raise_exception."""


def _functions(budget: "Budget", now: datetime | None) -> dict[str, Any]:
    """The functions that every chat template may call."""
    from chalot.text.jinja.budget import Fault
    from chalot.text.jinja.values import Function, Namespace, to_text

    def refuse(message: Any) -> None:
        raise _Refused(to_text(budget, message)[:500])

    def named(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        budget.walk(args)  # keys are hashed, which visits all of them
        return dict(*args, **kwargs)

    def strftime(form: str) -> str:
        # A C library pads "%999999999d" to that width.
        if len(form) > 200 or not re.fullmatch(r"(?:[^%]|%[-_0^#]?[A-Za-z%])*", form):
            raise Fault(f"found the date format {form[:40]!r}, expected plain % letters")
        return (now or datetime.now()).strftime(form)

    def counted(*bounds: int) -> list[int]:
        numbers = range(*bounds)
        if len(numbers) > 100_000:
            raise Fault(f"found range{bounds}, expected at most 100,000 numbers")
        return list(numbers)

    functions: dict[str, Any] = {
        "raise_exception": refuse,
        "strftime_now": strftime,
        "range": counted,
        "dict": named,
        "namespace": lambda *args, **kwargs: Namespace(named(*args, **kwargs)),
    }
    return {name: Function(function) for name, function in functions.items()}


def plain(value: Any, depth: int = 0) -> Any:
    """A copy of `value` made of none, bool, int, float, str, list and dict alone.

    Raises TokenizerError for anything else: an object with methods has no place in a template.
    """
    if depth > MAX_DEPTH:
        raise TokenizerError(
            f"messages: found values nested more than {MAX_DEPTH} deep, expected fewer"
        )
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain(key, depth + 1): plain(one, depth + 1) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(one, depth + 1) for one in value]
    raise TokenizerError(
        f"messages: found a {type(value).__name__}, expected text, numbers, lists and mappings"
    )


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as transformers 5 hands them to a template: plain, without keys whose value is none.

    What a model thought goes by several names; the one that most templates read is filled in.
    """
    found = plain(messages)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise TokenizerError(
            'messages: expected a list of one or more {"role": ..., "content": ...}, '
            f"found {str(found)[:40]!r}"
        )
    for number, message in enumerate(found):
        if message.get("role") is None or all(message.get(name) is None for name in SAID):
            raise TokenizerError(
                f"messages[{number}]: found {str(message)[:40]!r}, expected a role, and content or "
                "tool_calls"
            )
    result = []
    for message in found:
        message = {key: value for key, value in message.items() if value is not None}
        thoughts = [message[name] for name in THOUGHTS if name in message][:1]
        if thoughts:
            message = {"thinking": thoughts[0], **message, "reasoning_content": thoughts[0]}
        result.append(message)
    return result


def _size(value: Any) -> int:
    """About the number of characters in plain data."""
    if isinstance(value, dict):
        return sum(_size(key) + _size(one) + 1 for key, one in value.items())
    if isinstance(value, list):
        return sum(_size(one) + 1 for one in value)
    return len(value) if isinstance(value, str) else 1
