"""Prompts and answers of four kinds, to see what drafting finds in them.

What drafting from the text so far gains depends on prompt and answer alone, whoever wrote the
answer. The bundled model is too small to copy, to edit or to extract, so its own answers would say
little there: those here are what a model that follows instructions gives, written out. All comes
from the held-out modules (`heldout.txt`), and from records that are made up by a fixed rule.
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from chalot.demo import FOLDER

PROSE = 500  # least characters of a docstring
PIECE = 1400  # characters of a prompt, and of an answer, of code
EDITS: dict[str, tuple[tuple[str, str], ...]] = {  # function or class -> (found, put in its place)
    "IllegalWeekdayError": (("weekday", "day"),),
    "setfirstweekday": (("firstweekday", "first_day"),),
    "formatmonth": (("width", "columns"), ("Return a month's", "Return one month's")),
    "formatyear": (("colwidth", "column_width"),),
    "DictReader": (("fieldnames", "names"), ("restkey", "rest_key")),
    "DictWriter": (("rowdict", "row"), ("raise ValueError", "raise KeyError")),
    "has_header": (("hasHeader", "found"),),
    "LifoQueue": (("LifoQueue", "Stack"), ("most recently", "last")),
    "put": (("timeout", "seconds"),),
    "enterabs": (("argument", "arguments"),),
    "run": (("blocking", "wait"), ("delayfunc", "sleep")),
    "Shelf": (("writeback", "write_back"),),
    "_split_chunks": (("text", "line"),),
    "_wrap_chunks": (("cur_line", "line"),),
    "quantiles": (("n", "count"),),
    "overlap": (("other", "second"),),
}
NAMES = ["Ada", "Boris", "Chen", "Divya", "Emeka", "Fatima", "Georg", "Hana", "Ivan", "Jo", "Kim"]
PLACES = ["Lisbon", "Osaka", "Accra", "Lima", "Turin", "Ghent", "Quito", "Hanoi", "Bergen", "Pune"]
THINGS = ["chairs", "lamps", "books", "cables", "plates", "stamps", "mugs", "shelves"]


@dataclass(frozen=True)
class Case:
    """A prompt and what follows it."""

    task: str
    prompt: str
    answer: str


def definitions(tree: ast.AST) -> dict[str, ast.AST]:
    """Functions and classes by name, the first of each."""
    found: dict[str, ast.AST] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(node.name, node)
    return found


def prose(source: str) -> Iterator[Case]:
    """Docstrings, cut in the middle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = str(node.value.value)
            if len(text) >= PROSE and ">>>" not in text:
                yield Case("prose", text[: len(text) // 3], text[len(text) // 3 :][:PIECE])


def code(source: str) -> Iterator[Case]:
    """Pieces of source and what follows each."""
    for at in range(0, len(source) - 2 * PIECE, 6 * PIECE):
        yield Case("code", source[at : at + PIECE], source[at + PIECE : at + 2 * PIECE])


def editing(source: str) -> Iterator[Case]:
    """Source, what to change in it, and all of it changed."""
    known = definitions(ast.parse(source))
    for name, changes in EDITS.items():
        old = new = ast.get_source_segment(source, known[name]) or ""
        old = new = old[:PIECE]
        for found, put in changes:
            new = re.sub(rf"\b{re.escape(found)}\b", put, new)
        asked = ", ".join(f"{found} becomes {put}" for found, put in changes)
        yield Case("editing", f"{old}\n\n# The same again, but {asked}:\n\n", new + "\n")


def extraction() -> Iterator[Case]:
    """Sentences, and what they say as JSON."""
    for n in range(8):
        records = []
        for m in range(n, n + 8):
            records.append(
                {
                    "name": NAMES[m * 7 % len(NAMES)],
                    "city": PLACES[m * 3 % len(PLACES)],
                    "item": THINGS[m * 5 % len(THINGS)],
                    "count": m * 11 % 37 + 2,
                    "price": round(m * 13.37 % 200, 2),
                    "date": f"20{10 + m % 14}-{m * 5 % 12 + 1:02}-{m * 9 % 28 + 1:02}",
                }
            )
        told = "\n".join(
            f"On {r['date']} {r['name']} of {r['city']} bought {r['count']} {r['item']} "
            f"for {r['price']} each."
            for r in records
        )
        keys = ", ".join(records[0])
        prompt = f"{told}\n\nAll purchases as a JSON list of objects with {keys}:\n\n"
        yield Case("extraction", prompt, json.dumps(records, indent=1) + "\n")


def cases() -> list[Case]:
    """All of them."""
    source = (FOLDER / "heldout.txt").read_text("utf-8")
    return [*prose(source), *code(source), *editing(source), *extraction()]
