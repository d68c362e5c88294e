"""How model families write tool calls: found in an answer's text, and as a grammar.

    hermes   <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>, any number (Qwen, Hermes)
    mistral  [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...] to the end
    llama3   {"name": ..., "parameters": {...}}, the whole answer; <|python_tag|> may stand before

Which one a model uses is read from its chat template. Text that only looks like a call stays text.
"""

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from chalot.serve.faults import Fault
from chalot.serve.shapes import Tool
from chalot.serve.structured import STRICT, check_schema


class Call(NamedTuple):
    """One call; `arguments` is a JSON object in a string."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Style:
    """A way to write calls."""

    name: str
    marks: tuple[str, ...]  # any begins a call; "" where the whole answer may be one
    end: str  # "": the answer's end
    arguments: str  # the key
    listed: bool = False  # calls are items of one list
    id_length: int = 24


STYLES = (  # the first whose words the template has
    ("[TOOL_CALLS]", Style("mistral", ("[TOOL_CALLS]",), "", "arguments", True, id_length=9)),
    ("<tool_call>", Style("hermes", ("<tool_call>",), "</tool_call>", "arguments")),
    ("ipython", Style("llama3", ("<|python_tag|>", ""), "", "parameters")),
)


def style_of(template: str) -> Style:
    """The style of a chat template. Raises Fault if it says nothing of tools, or unknown things."""
    if "tools" in template:
        for words, style in STYLES:
            if words in template:
                return style
    raise Fault(
        "tools: this model's chat template has no tools that chalot knows; expected one in the "
        "way of Qwen or Hermes (<tool_call>), Mistral ([TOOL_CALLS]) or Llama 3; leave tools out",
        param="tools",
        code="tools_unsupported",
    )


def _new_id(style: Style) -> str:
    letters = string.ascii_letters + string.digits
    made = "".join(secrets.choice(letters) for _ in range(style.id_length))
    return made if style.id_length == 9 else f"call_{made}"


class _Body(msgspec.Struct):
    """A call as a model writes it."""

    name: str
    arguments: dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None


def read_calls(style: Style, text: str, names: Sequence[str]) -> list[Call] | None:
    """The calls that a text holds; None if it is not made of calls of known names alone."""
    try:
        found = msgspec.json.decode(text.strip().encode(), type=list[_Body] | _Body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    calls = []
    for body in found if isinstance(found, list) else [found]:
        given = body.arguments if style.arguments == "arguments" else body.parameters
        if given is None or body.name not in names:
            return None
        written = json.dumps(given, ensure_ascii=False)
        calls.append(Call(_new_id(style), body.name, written))
    return calls or None


class CallReader:
    """Push text, get what is text still and the calls that are complete."""

    def __init__(self, style: Style, names: Sequence[str]) -> None:
        self.style, self.names = style, names
        self._held = ""
        self._inside = ""  # the mark that was read; a call follows
        self._started = False  # whether something but white space was shown or held

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Text to show, and calls."""
        self._held += text
        shown: list[str] = []
        calls: list[Call] = []
        while True:
            if self._inside:
                end = self.style.end
                at = self._held.find(end) if end else -1
                if at < 0:
                    break
                body, self._held = self._held[:at], self._held[at + len(end) :]
                found = read_calls(self.style, body, self.names)
                if found is None:
                    shown.append(self._inside + body + end)
                else:
                    calls += found
                self._inside = ""
            elif not self._enter(shown):
                break
        return "".join(shown), calls

    def _enter(self, shown: list[str]) -> bool:
        """Whether a call begins in what is held; what stands before goes to `shown`."""
        marks = [mark for mark in self.style.marks if mark]
        places = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        if "" in self.style.marks and not self._started:
            first = self._held.lstrip()
            if first.startswith("{"):
                places = [(len(self._held) - len(first), "{")]
            elif not first:
                return False
        if places:
            at, mark = min(places)
            shown.append(self._held[:at])
            self._held = self._held[at:] if mark == "{" else self._held[at + len(mark) :]
            self._inside, self._started = mark, True
            return True
        keep = max((_overlap(self._held, mark) for mark in marks), default=0)
        out = self._held[: len(self._held) - keep]
        self._held = self._held[len(out) :]
        self._started = self._started or bool(out.strip())
        shown.append(out)
        return False

    def flush(self) -> tuple[str, list[Call]]:
        """What was held, when nothing more comes."""
        held, self._held = self._held, ""
        inside, self._inside = self._inside, ""
        if inside and not self.style.end:
            found = read_calls(self.style, held, self.names)
            if found is not None:
                return "", found
        return ("" if inside == "{" else inside) + held, []


def _overlap(text: str, mark: str) -> int:
    """How many characters at the text's end begin the mark."""
    return next(
        (n for n in range(min(len(mark), len(text)), 0, -1) if mark.startswith(text[-n:])), 0
    )


# ---- as a grammar


def _schema(tool: Tool) -> str:
    parameters = tool.function.parameters or {"type": "object", "properties": {}}
    if parameters.get("type", "object") != "object":
        raise Fault(
            f"tools: {tool.function.name}: found parameters of type "
            f"{str(parameters.get('type'))[:40]!r}, expected object",
            param="tools",
        )
    check_schema(parameters, "tools")
    return json.dumps({**parameters, "type": "object", "x-guidance": STRICT})


def call_grammar(
    style: Style, tools: Sequence[Tool], specials: Mapping[str, int], *, must: bool, many: bool
) -> str:
    """Lark of answers: calls alone (`must`), or text with calls; `many` allows more than one.

    A mark that is one special token is written as its id.
    """
    rules = []
    for number, tool in enumerate(tools):
        name, key = json.dumps(tool.function.name), style.arguments
        before = json.dumps(f'{{"name": {name}, "{key}": ')
        rules.append(f'call_{number}: {before} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {_schema(tool)}")
    rules.append("call: " + " | ".join(f"call_{n}" for n in range(len(tools))))
    mark = style.marks[0]
    as_token = f"<[{specials[mark]}]>" if mark in specials else json.dumps(mark)
    end = json.dumps("\n" + style.end)
    if style.name == "hermes":
        one = f'"\\n" call {end}'
        rules.append(f"calls: {as_token} {one}" + (f' ("\\n" {as_token} {one})*' if many else ""))
        free = (
            _lazy(mark, specials) + f"with_calls: head {one}" + (f" (head {one})*" if many else "")
        )
        text = "start: TEXT | with_calls TEXT" if many else "start: TEXT | with_calls"
    elif style.name == "mistral":
        listed = '"[" call' + (' (", " call)*' if many else "") + ' "]"'
        rules.append(f"calls: {as_token} {_spaced(listed)}")
        free = _lazy(mark, specials) + f"with_calls: head {_spaced(listed)}"
        text = "start: TEXT | with_calls"
    else:
        rules.append("calls: call")
        free, text = "", "start: calls | SAID"
        rules.append(r"SAID: /(\s*[^\s{<](.|\n)*)?/")
    rules.append("TEXT: /(.|\\n)*/")
    if must:
        return "\n".join(["start: calls", *rules])
    return "\n".join([text, free, *rules])


def _spaced(rule: str) -> str:
    return f'" "? {rule}'


def _lazy(mark: str, specials: Mapping[str, int]) -> str:
    """Text up to the mark and the mark."""
    if mark in specials:
        return f"head: TEXT <[{specials[mark]}]>\n"
    return f"head[lazy]: TEXT {json.dumps(mark)}\n"
