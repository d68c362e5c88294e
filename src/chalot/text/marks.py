"""Marks: tokens that are structure and not text, told apart from what a user types.

Two means, both of private characters (Unicode planes 15 and 16):

- An alias stands for a mark that is meant. It is an added token of the same properties as the
  mark, made of random private characters, so nobody can type it. The opened tokenizer looks for
  aliases and never for marks; so one pass over the whole text gives the same joints, spaces and
  merges as the source's.
- A disguise stands for a character of the user's text that begins or ends a mark, while a chat
  template mixes that text with its own. One for one, so that lengths, slices and trimming stay
  the same.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from chalot.errors import TokenizerError

_PLANE_15, _PLANE_16, _PLANE_SIZE = 0xF0000, 0x100000, 0xFFFE
_WORD = re.compile(r"[\w.-]*")  # holds no mark, and cannot be the edge of one
_OWN = ("content", "reasoning_content", "thinking", "reasoning")  # what a model wrote, in its turns


def is_mark(text: str) -> bool:
    """Whether a special token looks like structure, so that it is text when a user types it.

    Not a word, not white space, not a single sign: those are found in every text.
    """
    return len(text) > 2 and not _WORD.fullmatch(text) and not text.isspace()


def is_bracketed(text: str) -> bool:
    """<tool_call>, [INST], ...: the look of a mark, though it may not be called special."""
    return len(text) > 2 and text[0] in "<[{" and text[-1] in ">]}"


def any_of(texts: Iterable[str], whole_words: Iterable[str] = ()) -> re.Pattern[str]:
    """A pattern for the leftmost, then longest of `texts`; matches nothing if there are none."""
    alone = set(whole_words)
    patterns = [
        rf"(?<!\w){re.escape(text)}(?!\w)" if text in alone else re.escape(text)
        for text in sorted(texts, key=len, reverse=True)
    ]
    return re.compile("|".join(patterns) or r"(?!)")


def make_aliases(texts: Iterable[str]) -> dict[str, str]:
    """From each text to its alias. Random anew in each process, so that no text can hold one."""
    prefix = "".join(chr(_PLANE_16 + secrets.randbelow(_PLANE_SIZE)) for _ in range(4))
    found = list(texts)
    if len(found) > _PLANE_SIZE:
        raise TokenizerError(
            f"tokenizer.json: found {len(found)} special tokens, expected at most 65,534"
        )
    return {text: prefix + chr(_PLANE_16 + number) for number, text in enumerate(found)}


class Disguise:
    """One rendering's disguise. `soft` are those of the `marks` that a model may write itself."""

    def __init__(self, marks: Iterable[str], soft: Iterable[str], taken: set[str]) -> None:
        marks = list(marks)
        edges = sorted({edge for mark in marks for edge in (mark[0], mark[-1])})
        free = (
            chr(code)
            for code in range(_PLANE_15, _PLANE_15 + _PLANE_SIZE)
            if chr(code) not in taken
        )
        self._table = dict(zip(map(ord, edges), free, strict=False))
        if len(self._table) < len(edges):
            raise TokenizerError(
                "messages: found every private character in use, expected one to be free"
            )
        self._back = {ord(standing): chr(edge) for edge, standing in self._table.items()}
        self._marks, self._soft = any_of(marks), any_of(soft)

    def remove(self, text: str) -> str:
        """The text that is meant."""
        return text.translate(self._back)

    def everywhere(self, text: str) -> str:
        """Every character that could begin or end a mark: no joining of pieces makes a mark."""
        return text.translate(self._table)

    def on_marks(self, text: str) -> str:
        """Only characters of whole marks: a template that looks for brackets finds the others."""
        return self._marks.sub(lambda mark: mark[0].translate(self._table), text)

    def put_on(self, value: Any, strength: Callable[[str], str]) -> Any:
        """Plain data with every text in it disguised."""
        if isinstance(value, dict):
            return {
                self.put_on(key, strength): self.put_on(one, strength) for key, one in value.items()
            }
        if isinstance(value, list):
            return [self.put_on(one, strength) for one in value]
        if not isinstance(value, str) or _WORD.fullmatch(value):
            return value
        return strength(value)

    def put_on_messages(self, messages: Any, strength: Callable[[str], str]) -> Any:
        """As `put_on`, but what the assistant wrote keeps its soft marks."""

        def around_soft(text: str) -> str:
            pieces, at = [], 0
            for mark in self._soft.finditer(text):
                pieces += [strength(text[at : mark.start()]), mark[0]]
                at = mark.end()
            return "".join(pieces) + strength(text[at:])

        return [
            {
                key: self.put_on(value, around_soft if key in _OWN else strength)
                for key, value in message.items()
            }
            if isinstance(message, dict) and message.get("role") == "assistant"
            else self.put_on(message, strength)
            for message in messages
        ]


def private_characters(value: Any) -> set[str]:
    """Characters of plane 15 in plain data, which a disguise must not use."""
    if isinstance(value, Mapping):
        return set().union(*(private_characters(part) for pair in value.items() for part in pair))
    if isinstance(value, list):
        return set().union(*(private_characters(part) for part in value))
    if isinstance(value, str) and not value.isascii():
        return {letter for letter in value if _PLANE_15 <= ord(letter) < _PLANE_16}
    return set()
