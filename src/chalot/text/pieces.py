"""Token ids to text, one at a time: each token is a few bytes, and bytes become whole characters.

Which bytes a token stands for is said by the decoder in tokenizer.json. Two kinds are in use by
language models: GPT-2's (`ByteLevel`, a printable letter for each byte) and SentencePiece's
(`Replace` of U+2581 by a space, `ByteFallback` of <0x41>, `Strip` of the text's first space; or
`Metaspace`). Others are refused.

Bytes that are not UTF-8 become U+FFFD, one for each longest beginning of a character (Unicode 15,
section 3.9). `tokenizers` makes a whole run of byte tokens U+FFFD where one of them is wrong,
which no stream can know in time; and it reads added tokens with letters of GPT-2's table ("đi")
as bytes. Here they are text.
"""

import codecs
import json
import re
from collections.abc import Callable, Container
from typing import Any

from chalot.errors import TokenizerError, UnsupportedError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones are themselves, the others follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


class Decoder:
    """A tokenizer.json decoder: which bytes a token is, and what to cut at the start of a text."""

    def __init__(self, specification: Any) -> None:
        self.letters: dict[str, int] = {}
        self.replacements: list[tuple[str, str]] = []
        self.first_replacements: list[tuple[str, str]] = []  # of the first token of a text
        self.byte_tokens = False
        self.strip = ("", 0)  # this character, so many times, at the start of a text
        self.separator = ""
        if specification is None:
            self.separator = " "
        else:
            self._read(specification)

    def _read(self, step: Any) -> None:
        match step:
            case {"type": "Sequence", "decoders": list(steps)}:
                for one in steps:
                    self._read(one)
            case {"type": "ByteLevel"}:
                self.letters = byte_letters()
            case {"type": "ByteFallback"}:
                self.byte_tokens = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self.replacements.append((old, new))
                self.first_replacements.append((old, new))
            case {"type": "Strip", "content": str(letter), "start": int(count), "stop": 0}:
                self.strip = (letter, count)
            case {"type": "Metaspace", "replacement": str(old), **rest}:
                never = rest.get("prepend_scheme", "always") == "never"
                self.replacements.append((old, " "))
                self.first_replacements.append((old, " " if never else ""))
            case _:
                raise UnsupportedError(
                    f"tokenizer.json: found the decoder {json.dumps(step)[:80]}, expected "
                    "ByteLevel, Metaspace, or Replace with ByteFallback; ids can still be used"
                )

    def piece(self, token: str, added: bool, first: bool) -> bytes:
        """Bytes of a token; `added` ones are text as they stand, `first` is the first of a text."""
        if self.letters:
            if added or not all(letter in self.letters for letter in token):
                return token.encode()
            return bytes(self.letters[letter] for letter in token)
        if self.byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes((int(match[1], 16),))
        for old, new in self.first_replacements if first else self.replacements:
            token = token.replace(old, new)
        return ("" if first else self.separator).encode() + token.encode()


class Pieces:
    """The bytes of every token of a vocabulary, found when first asked for.

    `token_of` gives a token's string (None if there is no such id), `added` the ids of added
    tokens.
    """

    def __init__(
        self, decoder: Decoder, token_of: Callable[[int], str | None], added: Container[int]
    ) -> None:
        self.decoder = decoder
        self._token_of, self._added = token_of, added
        self._known: dict[tuple[int, bool], bytes] = {}

    def piece(self, token: int, first: bool) -> bytes:
        """Bytes of a token id; none for one without a token (a padded vocabulary has such)."""
        known = self._known.get((token, first))
        if known is None:
            text = self._lookup(token)
            known = b"" if text is None else self.decoder.piece(text, token in self._added, first)
            self._known[token, first] = known
        return known

    def _lookup(self, token: int) -> str | None:
        try:
            return self._token_of(token)
        except (OverflowError, TypeError):
            raise TokenizerError(f"found the token id {token!r:.40}, expected 0 or more") from None


class Incremental:
    """Text of a sequence of tokens, as far as its characters are whole. Constant work a token.

    Tokens of `hidden` are left out.
    """

    def __init__(self, pieces: Pieces, hidden: Container[int] = frozenset()) -> None:
        self._pieces, self._hidden = pieces, hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._letter, self._to_strip = pieces.decoder.strip

    def push(self, token: int) -> str:
        """Text that this token completes, possibly none."""
        if token in self._hidden:
            return ""
        text = self._utf8.decode(self._pieces.piece(token, self._first))
        self._first = False
        return self._stripped(text)

    def flush(self) -> str:
        """U+FFFD if the last character was not complete; nothing may follow."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._to_strip and text:
            if text[0] != self._letter:
                self._to_strip = 0
            else:
                text, self._to_strip = text[1:], self._to_strip - 1
        return text
