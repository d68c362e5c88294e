"""Conversations and tools that tests share, and jinja2 as transformers sets it up."""

import json
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

TEMPLATES = {
    path.stem: path.read_text() for path in (Path(__file__).parent / "templates").iterdir()
}
NOW = datetime(2026, 3, 4, 5, 6, 7)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "abcdef123"}


def calling(arguments: Any, content: Any = None) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    calls = [{"id": "abcdef123", "type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


_PROPERTIES = {
    "place": {"type": "string", "description": "Đà Nẵng / 東京"},
    "days": {"type": ["integer", "null"]},
    "tags": {"type": "array", "items": {"type": "number"}},
    "extra": {"type": "object", "additionalProperties": {"type": "boolean"}},
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'weather of a <place> & "time"\nmore',
            "parameters": {"type": "object", "properties": _PROPERTIES, "required": ["place"]},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "time",
            "parameters": {"type": "object", "properties": {}},
            "return": {"type": "string"},
        },
    },
]

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [user("Hi")],
    "several": [user("  Hi\n"), assistant("  Hello <b>\n "), user('é 東京 👩‍👩‍👧 it\'s "q"')],
    "system": [
        system(" Be terse. /no_think "),
        user("Hi"),
        assistant("<think>\nhm\n</think>\n\nHello"),
        user("x"),
    ],
    "thinking": [user("q"), assistant("<think>\nlong\nthoughts\n</think>\n\nanswer")],
    "tools": [
        system("sys"),
        user("weather?"),
        calling({"place": "Huế", "days": 2, "f": 1.0, "b": True, "n": None}),
        tool('{"t": 30.5}'),
        assistant("It is 30.5"),
        user("thanks"),
    ],
    "calls as text": [
        user("weather?"),
        calling('{"place": "x"}', "Let me see"),
        tool("1"),
        tool("2"),
    ],
    "parts": [
        user([{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": "b"}])
    ],
    "two users": [user("a"), user("b")],
    "odd role": [user("a"), {"role": "critic", "content": "c"}],
    "empty": [user("")],
    "result as mapping": [user("w"), calling({"place": "x"}), tool({"t": 1.5, "ok": True})],
}


class Generation(jinja2.ext.Extension):
    """`generation` blocks write what is in them."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("through"), [], [], body).set_lineno(line)

    def through(self, caller: Any) -> str:
        return str(caller())


@cache
def reference() -> jinja2.Environment:
    """jinja2 set up as transformers documents it for chat templates."""

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = NOW.strftime
    return environment
