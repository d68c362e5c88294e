"""Ids of a long text at once: a megabyte in a fraction of a second.

What the `tokenizers` library does in its turn is done here in the same order: added tokens are
found, what lies between them is normalised, made into letters' ids and merged by the extension. Of
two kinds of BPE: on bytes, whose words are split in a known way (styles.py), and SentencePiece's on
characters, whose text is one long word. Where an added token of an unusual kind is in the text (one
that eats spaces, say), the library does it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from chalot.text.marks import any_of
from chalot.text.pieces import byte_letters
from chalot.text.styles import Rules, kinds, style_of

NONE = 0xFFFFFFFF
SPACE = "\u2581"  # what SentencePiece writes for one
ACROSS = re.compile(rb"(?<!\xff)(?<!\xe2\x96\x81)\xe2\x96\x81")
UTF8 = (0x80, 0x800, 0x10000)  # from where a character has a byte more
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


class LongText:
    """`encode` for one tokenizer; `core` is the skeleton's, which aliases may be added to."""

    def __init__(self, core: Any, number: Callable[[str], int | None]) -> None:
        """`number` gives a token's id."""
        self._core, self._number = core, number
        self._normalizer = core.normalizer
        state = None if core.normalizer is None else json.loads(core.normalizer.__getstate__())
        self._keeps_ascii = state in (None, {"type": "NFC"})
        self._patterns: tuple[Any, ...] = ()

    def encode(self, text: str) -> list[int] | None:
        """Ids without a post-processor's; None for a text that the library must do."""
        first, then, unusual = self._added()
        if unusual and (unusual.search(text) or unusual.search(self._normal(text))):
            return None
        out: list[int] = []
        begins = True  # no token and no text before this piece
        for part, token in _cut(first, text):
            if token:
                out.append(self._number(part) or 0)
                begins = False
                continue
            for piece, token in _cut(then, self._normal(part)):
                ids = [self._number(piece) or 0] if token else self._ids(piece, begins)
                if ids is None:
                    return None
                out += ids
                begins = False
        return out

    def _ids(self, piece: str, begins: bool) -> list[int] | None:
        """Ids of normalised text, which may be the beginning of all."""
        raise NotImplementedError

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


class _Bytes(LongText):
    """Bytes, in words of a known style."""

    def __init__(
        self, core: Any, number: Callable[[str], int | None], native: Any, rules: Rules
    ) -> None:
        super().__init__(core, number)
        self._native, self._rules = native, rules

    def _ids(self, piece: str, begins: bool) -> list[int] | None:
        found: list[int] = self._native.text(piece.encode(), self._rules)
        return found


class _Characters(LongText):
    """Characters, or the bytes of those that have no token; `metaspace` is such a step or None."""

    def __init__(
        self,
        core: Any,
        number: Callable[[str], int | None],
        native: Any,
        letters: Mapping[str, int],
        metaspace: Mapping[str, Any] | None,
        tokens: bytes,
    ) -> None:
        super().__init__(core, number)
        self._native = native
        self._metaspace = metaspace
        self._table = np.full(0x110000, NONE, np.uint32)
        for letter, id_ in letters.items():
            if len(letter) == 1:
                self._table[ord(letter)] = id_
        names = [letters.get(f"<0x{byte:02X}>", NONE) for byte in range(256)]
        self._bytes = np.array(names, np.uint32)
        # where no token has a space after something else, no merge crosses a word's beginning
        self._splits = ACROSS.search(tokens) is None

    def _ids(self, piece: str, begins: bool) -> list[int] | None:
        if self._metaspace is not None:
            piece = piece.replace(" ", SPACE)
            scheme = self._metaspace["prepend_scheme"]
            if scheme == "always" or (scheme == "first" and begins):
                piece = piece if piece.startswith(SPACE) else SPACE + piece
        codes = np.frombuffer(piece.encode("utf-32-le"), "<u4")
        ids = self._table[codes]
        ends = np.array([len(codes)], np.int64)
        if self._splits:
            space = codes == ord(SPACE)
            ends = np.append(np.flatnonzero(space[1:] & ~space[:-1]) + 1, ends)
        unknown = ids == NONE
        if unknown.any():
            if self._bytes[0] == NONE:
                return None
            sizes = np.where(unknown, 1 + sum((codes >= n).astype(int) for n in UTF8), 1)
            after = np.cumsum(sizes)
            ends = after[ends - 1]
            every, known = np.empty(after[-1], np.uint32), np.zeros(after[-1], bool)
            known[after[~unknown] - 1] = True
            every[known] = ids[~unknown]
            raw = codes[unknown].tobytes().decode("utf-32-le").encode()
            every[~known] = self._bytes[np.frombuffer(raw, np.uint8)]
            ids = every
        found: list[int] = self._native.words(ids, ends.astype(np.uint64))
        return found


def open_long(
    core: Any,
    native: Any,
    skeleton: bytes,
    own: list[int],
    number: Callable[[str], int | None],
    tokens: bytes,
) -> LongText | None:
    """None for a tokenizer of no known kind. `own` are the ids of the skeleton's, `tokens` all."""
    document = json.loads(skeleton)
    model, step = document["model"], document.get("pre_tokenizer")
    vocabulary = {token: own[id_] for token, id_ in model["vocab"].items()}
    letters = byte_letters()
    style = style_of(step)
    if style is not None and letters.keys() <= vocabulary.keys():
        alphabet = np.zeros(256, np.uint32)
        for letter, byte in letters.items():
            alphabet[byte] = vocabulary[letter]
        native.set_alphabet(alphabet, kinds())
        for token, id_ in vocabulary.items():  # words that stay whole
            if len(token) > 1 and letters.keys() >= set(token):
                native.set_whole(bytes(letters[letter] for letter in token), id_)
        return _Bytes(core, number, native, style.rules)
    if model.get("ignore_merges") or not _is_one_word(step, document.get("normalizer")):
        return None
    if not model.get("byte_fallback") or len(BYTES & vocabulary.keys()) < 256:
        vocabulary = {token: id_ for token, id_ in vocabulary.items() if token not in BYTES}
    return _Characters(
        core, number, native, vocabulary, step if _is_metaspace(step) else None, tokens
    )


def _is_metaspace(step: Any) -> bool:
    return bool(
        step
        and step.get("type") == "Metaspace"
        and step.get("split") is False
        and step.get("replacement") == SPACE
        and step.get("prepend_scheme") in ("always", "first", "never")
    )


def _is_one_word(step: Any, normalizer: Any) -> bool:
    """Whether nothing splits a text; not Gemma's split at spaces, as normalising leaves none."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    split = {"type": "Split", "pattern": {"String": " "}}
    return (
        step is None or _is_metaspace(step) or (normalizer == replace and {**step, **split} == step)
    )


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
