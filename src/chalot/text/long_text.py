"""Ids of a long text at once: a megabyte in a fraction of a second.

For byte-level BPE whose words are split in a known way (styles.py). What the `tokenizers` library
does in its turn is done here in the same order: added tokens are found, what lies between them is
normalised, split and merged. Where an added token of an unusual kind is in the text (one that eats
spaces, say), the library does it.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from chalot.text.marks import any_of
from chalot.text.pieces import byte_letters
from chalot.text.styles import Style, kinds, style_of


class LongText:
    """`encode` for one tokenizer; `core` is the skeleton's, which aliases may be added to."""

    def __init__(
        self, core: Any, native: Any, style: Style, number: Callable[[str], int | None]
    ) -> None:
        """`native` is a BytePairs of the extension, with its alphabet; `number` a token's id."""
        self._core, self._native, self._rules, self._number = core, native, style.rules, number
        normalizer = core.normalizer
        self._normalizer = normalizer
        state = None if normalizer is None else json.loads(normalizer.__getstate__())
        self._keeps_ascii = state in (None, {"type": "NFC"})
        self._patterns: tuple[Any, ...] = ()

    @classmethod
    def of(
        cls,
        core: Any,
        native: Any,
        skeleton: bytes,
        own: list[int],
        number: Callable[[str], int | None],
    ) -> "LongText | None":
        """None for a tokenizer that is not of the kind."""
        document = json.loads(skeleton)
        style = style_of(document.get("pre_tokenizer"))
        letters = byte_letters()
        vocabulary = document["model"]["vocab"]
        if style is None or not letters.keys() <= vocabulary.keys():
            return None
        alphabet = np.zeros(256, np.uint32)
        for letter, byte in letters.items():
            alphabet[byte] = own[vocabulary[letter]]
        native.set_alphabet(alphabet, kinds())
        for token, id_ in vocabulary.items():  # words that stay whole
            if len(token) > 1 and letters.keys() >= set(token):
                native.set_whole(bytes(letters[letter] for letter in token), own[id_])
        return cls(core, native, style, number)

    def encode(self, text: str) -> list[int] | None:
        """Ids without a post-processor's; None for a text that the library must do."""
        first, then, unusual = self._added()
        if unusual and (unusual.search(text) or unusual.search(self._normal(text))):
            return None
        out: list[int] = []
        for part, token in _cut(first, text):
            if token:
                out.append(self._number(part) or 0)
                continue
            for piece, token in _cut(then, self._normal(part)):
                if token:
                    out.append(self._number(piece) or 0)
                else:
                    out += self._native.text(piece.encode(), self._rules)
        return out

    def _normal(self, text: str) -> str:
        if self._normalizer is None or (self._keeps_ascii and text.isascii()):
            return text
        return str(self._normalizer.normalize_str(text))

    def _added(self) -> tuple[re.Pattern[str] | None, ...]:
        """Patterns of added tokens: found before normalising, after it, and unusual ones."""
        hidden = self._core.encode_special_tokens
        added = [
            token
            for token in self._core.get_added_tokens_decoder().values()
            if not (hidden and token.special)
        ]
        known = tuple(token.content for token in added)
        if not self._patterns or self._patterns[0] != known:
            sorts: tuple[list[str], ...] = ([], [], [])
            for token in added:
                odd = token.lstrip or token.rstrip or token.single_word
                odd = odd or (token.normalized and self._normalizer is not None)
                sorts[2 if odd else int(token.normalized)].append(token.content)
                if odd:
                    sorts[2].append(self._normal(token.content))
            self._patterns = (known, *(any_of(sort) if sort else None for sort in sorts))
        return self._patterns[1:]


def _cut(pattern: re.Pattern[str] | None, text: str) -> Iterator[tuple[str, bool]]:
    """Parts of a text, and whether each is a match."""
    at = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() > at:
            yield text[at : match.start()], False
        yield match[0], True
        at = match.end()
    if at < len(text):
        yield text[at:], False
