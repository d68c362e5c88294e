"""A tokenizer, as the `tokenizers` library parses it: ids of a text, and which tokens are marks.

Parsing takes 0.3 s and 100 MB for 151,000 tokens, so it is done when text is first used, and only
where there are no tables instead (byte_pairs.py).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from chalot.errors import ChalotError, TokenizerError, one_line
from chalot.text.marks import any_of, is_bracketed, is_mark, make_aliases
from chalot.text.pieces import Decoder, Pieces
from chalot.text.settings import Settings

_UNKNOWN = "\U000ffffd"  # the last private character of plane 15: in no vocabulary
WITHIN = "expected one that this tokenizer.json's rules can take"
_CUT = ""  # an alias of its own, that stands for nothing: it keeps two pieces of a text apart


class Vocabulary:
    """A tokenizer.json, with an alias for every mark (see marks.py).

    `special` are the source's special tokens and their ids, `soft` the marks that are not among
    them. Special tokens that look like words are not marks, but looked for in every text, as the
    source does.
    """

    def __init__(self, core: Any, settings: Settings) -> None:
        """`core` is a `tokenizers.Tokenizer`, or BytePairs in its place."""
        self.core = core
        added = self.core.get_added_tokens_decoder()
        known = {token.content: token for token in added.values()}
        names = {text for text, token in known.items() if token.special}
        names |= {text for text in settings.special if text in known or is_bracketed(text)}
        ids = {text: self.core.token_to_id(text) for text in sorted(names)}
        self.special: dict[str, int] = {text: id_ for text, id_ in ids.items() if id_ is not None}
        templates = "".join(settings.templates.values())
        ordinary = known.keys() - self.special.keys()
        self.soft = {text for text in ordinary if is_bracketed(text) and text in templates}
        self.marks = {text for text in self.special if is_mark(text)} | self.soft
        words = self.special.keys() - self.marks
        self.hidden = frozenset(self.special.values())
        self._mark_ids = frozenset(self.core.token_to_id(text) for text in self.marks)
        self._added = frozenset(added)
        self._aliases = make_aliases([_CUT, *sorted(self.marks | words)])
        self._real = self._add_aliases(known)
        alone = {text for text, token in known.items() if token.single_word}
        self._find_words = any_of(words, alone)
        self._find_all = any_of(self.marks | words, alone)

    def _add_aliases(self, known: Mapping[str, Any]) -> dict[int, int]:
        """Make each mark special, never looked for, and give it an alias; alias ids to mark ids."""
        from tokenizers import AddedToken

        first = max(
            [self.core.get_vocab_size(with_added_tokens=False), *(id_ + 1 for id_ in self._added)]
        )
        if any(self.core.id_to_token(first + n) is not None for n in range(len(self._aliases))):
            raise TokenizerError("tokenizer.json: found holes among the token ids, expected none")
        aliases, marks = [], []
        for text, alias in self._aliases.items():
            like = known.get(text) or AddedToken(text, normalized=False)
            traits: Any = {name: getattr(like, name) for name in ("lstrip", "rstrip", "normalized")}
            aliases.append(AddedToken(alias, special=False, **traits))
            if text != _CUT:
                marks.append(AddedToken(text, special=True, **traits))
        self.core.add_special_tokens(marks)
        self.core.add_tokens(aliases)
        self.core.encode_special_tokens = True
        number = self.core.token_to_id
        self._alias_ids = frozenset(number(alias) for alias in self._aliases.values())
        return {
            number(alias): number(text) for text, alias in self._aliases.items() if text != _CUT
        }

    def encode(
        self,
        text: str,
        *,
        marks: bool,
        post_process: bool = False,
        finish: Callable[[str], str] = lambda text: text,
    ) -> list[int]:
        """Ids of a text. With `marks`, those in it are meant; `finish` follows."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text: found half of a surrogate pair at character {error.start}, expected Unicode"
            ) from None
        wanted = self._find_all if marks else self._find_words
        aliased = finish(wanted.sub(lambda mark: self._aliases[mark[0]], text))
        encoding = self._encode(aliased)
        if not self._mark_ids.isdisjoint(encoding.ids):
            # A model with marks among its words (Unigram) finds typed ones: take those apart.
            cut = self._find_all.sub(lambda m: m[0][0] + self._aliases[_CUT] + m[0][1:], aliased)
            encoding = self._encode(cut)
            # what stands for an unknown character may be there
            unknown = self._encode(_UNKNOWN).ids
            if not self._mark_ids.difference(unknown).isdisjoint(encoding.ids):
                raise TokenizerError(
                    "text: found a special token that this tokenizer cannot spell, expected other "
                    "text"
                )
        if post_process:
            with _typed("text", WITHIN):
                encoding = self.core.post_process(encoding)
        ids: list[int] = encoding.ids
        if self._alias_ids.isdisjoint(ids):
            return ids
        nothing = self.core.token_to_id(self._aliases[_CUT])
        return [self._real.get(id_, id_) for id_ in ids if id_ != nothing]

    def _encode(self, text: str) -> Any:
        with _typed("text", WITHIN):
            return self.core.encode(text, add_special_tokens=False)

    @cached_property
    def size(self) -> int:
        """One more than the greatest id."""
        ids = self.core.get_vocab(with_added_tokens=True)
        return 1 + max(
            (id_ for text, id_ in ids.items() if text not in self._alias_texts), default=-1
        )

    @cached_property
    def pieces(self) -> Pieces:
        """Bytes of tokens. Raises UnsupportedError for a decoder that is not known."""
        decoder = self.core.decoder
        specification = None if decoder is None else json.loads(decoder.__getstate__())
        return Pieces(Decoder(specification), self._token, self._added)

    def _token(self, id_: int) -> str | None:
        found = self.core.id_to_token(id_)
        return None if found in self._alias_texts else found

    @cached_property
    def _alias_texts(self) -> frozenset[str | None]:
        return frozenset(self._aliases.values())


@contextmanager
def _typed(what: str, expected: str) -> Iterator[None]:
    """What the library raises, as TokenizerError.

    A panic of Rust is no Exception: of a pattern that needs more than 10 million steps, say.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if isinstance(error, ChalotError | MemoryError) or not (
            panic or isinstance(error, Exception)
        ):
            raise
        raise TokenizerError(f"{what}: {one_line(error)}; {expected}") from None


def parse(content: bytes) -> Any:
    """tokenizer.json as a `tokenizers.Tokenizer` that neither cuts, pads nor draws lots."""
    from tokenizers import Tokenizer as Core

    with _typed("tokenizer.json", "expected what `tokenizers` writes"):
        core = Core.from_buffer(content)
    core.no_padding()
    core.no_truncation()
    if getattr(core.model, "dropout", None):
        core.model.dropout = None
    return core
