"""Byte-pair merges as sorted tables, which open at once; tokenizer.json takes 0.3 s and 100 MB.

`compile_tables` makes them when a model is converted, of every BPE: of GPT-2's, Llama 3's or Qwen's
kind, whose text is split into words first, and of SentencePiece's, whose text is one word. The
`tokenizers` library still does all but merging: it opens a *skeleton* of tokenizer.json, whose
model has letters and no merges, and so normalises, splits, and finds added tokens as before; the
letters of each word are merged here, by the compiled extension where there is one. Long texts do
without the library (long_text.py).

Sennrich et al., arXiv 1508.07909: of all neighbours in a word, the pair of the least rank (then the
leftmost) becomes one token, until no pair has a rank.
"""

import json
from array import array
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from heapq import heappop, heappush
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec
import numpy as np

from chalot.errors import TokenizerError, one_line
from chalot.text.long_text import BYTES, LongText, open_long

TABLES = "tokenizer.bpe"  # what the tables are called in a .myai file
SEPARATOR = b"\xff"  # between tokens: no byte of UTF-8
WORDS, LETTERS = 20_000, 64  # remembered with their tokens: so many words of so many letters
MOST_HOLES = 1 << 16  # ids without a token, each of which takes a byte; known models have a few
LONG = 4_000  # characters from which a text is worth the 2 ms that LongText takes to set up

Open = Callable[[bytes], Any]  # tokenizer.json -> a `tokenizers.Tokenizer`
Native = Callable[[Any, Any, int], Any]  # BytePairs of the extension, given (pairs, merges, tokens)


class Tables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is stored, as MessagePack; numbers are little-endian."""

    skeleton: bytes  # JSON
    ids: bytes  # u32 of each of the skeleton's ids: the token's own
    tokens: bytes  # in the order of their ids, a separator before, between and after
    pairs: bytes  # u64, ascending: left id << 32 | right id
    merges: bytes  # u32 (rank, merged id) of each pair


class _Model(msgspec.Struct):
    type: str
    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    byte_fallback: bool = False
    ignore_merges: bool = False


class Merges:
    """Pairs of ids to (rank, merged id), and the merging of words."""

    def __init__(self, pairs: "memoryview[int]", merges: "memoryview[int]") -> None:
        """`pairs` of u64, ascending, and `merges` of u32, two for each of them."""
        self.pairs, self.merges = pairs, merges
        self.known: dict[tuple[int, ...], list[int]] = {}

    def find(self, left: int, right: int) -> tuple[int, int] | None:
        """(rank, merged id) of two neighbours."""
        pair = left << 32 | right
        at = bisect_left(self.pairs, pair)
        if at == len(self.pairs) or self.pairs[at] != pair:
            return None
        return self.merges[2 * at], self.merges[2 * at + 1]

    def word(self, letters: tuple[int, ...]) -> list[int]:
        """Ids of a word, given as ids of its letters."""
        found = self.known.get(letters)
        if found is None:
            found = self._merged(letters)
            if len(letters) <= LETTERS:
                if len(self.known) >= WORDS:
                    self.known.clear()
                self.known[letters] = found
        return found

    def _merged(self, letters: tuple[int, ...]) -> list[int]:
        ids = list(letters)  # -1 where a token became part of the one before it
        after = list(range(1, len(ids) + 1))
        before = list(range(-1, len(ids) - 1))
        heap: list[tuple[int, int, int, int, int]] = []

        def offer(at: int) -> None:
            left, right = ids[at], ids[after[at]]
            if (merge := self.find(left, right)) is not None:
                heappush(heap, (merge[0], at, left, right, merge[1]))

        for at in range(len(ids) - 1):
            offer(at)
        while heap:
            _, at, left, right, merged = heappop(heap)
            gone = after[at]
            if ids[at] != left or gone == len(ids) or ids[gone] != right:
                continue  # one of the two was merged with another neighbour meanwhile
            ids[at], ids[gone] = merged, -1
            after[at] = after[gone]
            if after[at] < len(ids):
                before[after[at]] = at
                offer(at)
            if before[at] >= 0:
                offer(before[at])
        return [id_ for id_ in ids if id_ >= 0]


def compile_tables(content: bytes, open_core: Open) -> bytes | None:
    """The tables of a tokenizer.json; None for one that is opened as it is."""
    opened = open_core(content)  # raises for what is no tokenizer.json
    document = json.loads(content)
    try:
        model = msgspec.convert(document.get("model"), _Model)
    except msgspec.ValidationError:  # a Unigram model, say
        return None
    unusual = (model.dropout, model.continuing_subword_prefix, model.end_of_word_suffix)
    if model.type != "BPE" or any(unusual):
        return None
    table: dict[int, tuple[int, int]] = {}
    for rank, merge in enumerate(model.merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        table[model.vocab[left] << 32 | model.vocab[right]] = rank, model.vocab[left + right]
    pairs = array("Q", sorted(table))
    merges = array("I", [number for pair in pairs for number in table[pair]])
    # what the library makes of a text before it merges: characters, or bytes where one is unknown
    letters = [t for t in model.vocab if len(t) == 1 or t == model.unk_token or t in BYTES]
    if model.ignore_merges:  # words that are tokens, and that their merges do not make
        letters += _unmade(model.vocab, Merges(memoryview(pairs), memoryview(merges)))
    known = opened.get_vocab(with_added_tokens=True)
    few = {token: n for n, token in enumerate(sorted(letters))}
    document["model"] = {**document["model"], "vocab": few, "merges": []}
    skeleton = json.dumps(document, ensure_ascii=False).encode()
    opened = open_core(skeleton)
    names = [opened.id_to_token(n) for n in range(opened.get_vocab_size())]
    if not known.keys() >= set(names):  # an added token that normalising changes
        return None
    if not known or max(known.values()) >= len(known) + MOST_HOLES:
        return None
    ids = [known[name] for name in names]
    tokens = [b""] * (max(known.values()) + 1)
    for token, id_ in known.items():
        tokens[id_] = token.encode()
    ended = SEPARATOR.join([b"", *tokens, b""])
    numbers = (array("I", ids), pairs, merges)
    own, keys, values = (a.tobytes() for a in numbers)
    return msgspec.msgpack.encode(Tables(skeleton, own, ended, keys, values))


def _unmade(vocab: Mapping[str, int], merges: Merges) -> list[str]:
    def made(token: str) -> list[int]:
        return merges.word(tuple(vocab.get(letter, -1) for letter in token))

    return [token for token, id_ in vocab.items() if len(token) > 1 and made(token) != [id_]]


class Encoded(NamedTuple):
    """A text's ids, and what the library made of it."""

    ids: list[int]
    letters: Any  # a `tokenizers.Encoding` of the skeleton's ids, None of a long text


class BytePairs:
    """What vocabulary.py uses of a `tokenizers.Tokenizer`, by tables; ids are the model's own."""

    def __init__(self, raw: bytes, open_core: Open, native: Native | None = None) -> None:
        """Raises TokenizerError for tables that do not fit together."""
        try:
            tables = msgspec.msgpack.decode(raw, type=Tables)
            self._core = open_core(tables.skeleton)
            self._own = list(memoryview(tables.ids).cast("I"))  # of each of the skeleton's ids
            pairs = memoryview(tables.pairs).cast("Q")
            merges = memoryview(tables.merges).cast("I")
        except (msgspec.DecodeError, TypeError, ValueError) as error:
            raise _damaged(one_line(error)) from None
        self._tokens, self._ends = tables.tokens, _ends(tables.tokens)
        if len(merges) != 2 * len(pairs) or max(merges[1::2], default=0) >= len(self._ends):
            raise _damaged("merges do not fit their pairs")
        highest = max(self._own, default=len(self._ends))
        if len(self._own) != self._core.get_vocab_size() or highest >= len(self._ends):
            raise _damaged("ids do not fit their tokens")
        self._merges = Merges(pairs, merges)
        self._native, self._skeleton = None, tables.skeleton
        if native is not None:
            try:
                arrays = np.frombuffer(tables.pairs, "<u8"), np.frombuffer(tables.merges, "<u4")
                self._native = native(*arrays, len(self._ends))
            except ValueError as error:
                raise _damaged(str(error)) from None
        self._new: dict[int, str] = {}  # tokens that were added since, by id

    # ---- texts

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoded:
        """See `tokenizers.Tokenizer.encode`."""
        if len(text) >= LONG and self._long is not None:
            ids = self._long.encode(text)
            if ids is not None:
                encoded = Encoded(ids, None)
                return self.post_process(encoded) if add_special_tokens else encoded
        return self._encoded(self._core.encode(text, add_special_tokens=add_special_tokens))

    def post_process(self, encoded: Encoded) -> Encoded:
        """See `tokenizers.Tokenizer.post_process`."""
        if encoded.letters is None:
            before, after = self._around or ([], [])
            return Encoded([*before, *encoded.ids, *after], None)
        return self._encoded(self._core.post_process(encoded.letters))

    @cached_property
    def _around(self) -> tuple[list[int], list[int]] | None:
        """Ids that the post-processor puts around a text; None if it does anything else."""
        bare = self._core.encode("a", add_special_tokens=False).ids
        ids = self._core.encode("a", add_special_tokens=True).ids
        size = len(bare)
        at = [n for n in range(len(ids) - size + 1) if ids[n : n + size] == bare]
        return (ids[: at[0]], ids[at[0] + size :]) if bare and len(at) == 1 else None

    @cached_property
    def _long(self) -> LongText | None:
        if self._native is None or self._around is None:
            return None
        own, tokens = self._own, self._tokens
        return open_long(self._core, self._native, self._skeleton, own, self.token_to_id, tokens)

    def _encoded(self, letters: Any) -> Encoded:
        if self._native is not None and len(letters) > 0:
            return Encoded(self._merged(letters), letters)
        out: list[int] = []
        for word, pairs in groupby(zip(letters.word_ids, letters.ids, strict=True), itemgetter(0)):
            ids = [id_ for _, id_ in pairs]
            if word is None:  # the post-processor's, by their own ids
                out += ids
            else:
                out += self._merges.word(tuple(self._own[id_] for id_ in ids))
        return Encoded(out, letters)

    def _merged(self, letters: Any) -> list[int]:
        """As `_encoded`, by the extension."""
        ids = np.array(letters.ids, np.uint32)
        word = np.array([-1 if w is None else w for w in letters.word_ids], np.int64)
        own = np.array(self._own, np.uint32)
        real = np.where(word < 0, ids, own[np.minimum(ids, len(own) - 1)])
        last = np.flatnonzero((word[1:] != word[:-1]) | (word[1:] < 0))  # of each word but one
        ends = np.append(last, len(ids) - 1).astype(np.uint64) + np.uint64(1)
        found: list[int] = self._native.words(real, ends)  # type: ignore[union-attr]
        return found

    # ---- tokens

    def _stored(self, token: str) -> int | None:
        whole = SEPARATOR + token.encode() + SEPARATOR
        at = self._tokens.find(whole) if token else -1
        return None if at < 0 else bisect_left(self._ends, at + len(whole) - 1)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, of an added one too."""
        found = self._core.token_to_id(token)
        return self._stored(token) if found is None else self._own[found]

    def id_to_token(self, id_: int) -> str | None:
        """The token of an id. Raises OverflowError or TypeError for what cannot be one."""
        if not 0 <= id_ < 1 << 32:
            raise OverflowError
        if id_ >= len(self._ends):
            return self._new.get(id_)
        first = self._ends[id_ - 1] + 1 if id_ else 1
        return self._tokens[first : self._ends[id_]].decode(errors="replace") or None

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """One more than the greatest id, holes included."""
        return len(self._ends) + (len(self._new) if with_added_tokens else 0)

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Every token's id."""
        every = range(self.get_vocab_size(with_added_tokens))
        return {token: id_ for id_ in every if (token := self.id_to_token(id_)) is not None}

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        """Added tokens by their ids."""
        found = self._core.get_added_tokens_decoder()
        return {self._own[id_]: token for id_, token in found.items()}

    def add_tokens(self, tokens: Sequence[Any]) -> None:
        """Add tokens; one that is in the vocabulary keeps its id, others get new ones."""
        self._core.add_tokens(tokens)
        self._name_new()

    def add_special_tokens(self, tokens: Sequence[Any]) -> None:
        """As `add_tokens`, of tokens called special."""
        self._core.add_special_tokens(tokens)
        self._name_new()

    def _name_new(self) -> None:
        for n in range(len(self._own), self._core.get_vocab_size()):
            token = self._core.id_to_token(n)
            id_ = self._stored(token)
            if id_ is None:
                id_ = self.get_vocab_size()
                self._new[id_] = token
            self._own.append(id_)

    @property
    def decoder(self) -> Any:
        """What makes text of tokens."""
        return self._core.decoder

    @property
    def encode_special_tokens(self) -> bool:
        """Whether special tokens in a text are text."""
        return bool(self._core.encode_special_tokens)

    @encode_special_tokens.setter
    def encode_special_tokens(self, value: bool) -> None:
        self._core.encode_special_tokens = value


def _ends(tokens: bytes) -> "memoryview[int]":
    """Where each token ends."""
    at = np.flatnonzero(np.frombuffer(tokens, np.uint8) == SEPARATOR[0])
    return at[1:].astype(np.uint32).data


def _damaged(what: str) -> TokenizerError:
    return TokenizerError(f"{TABLES}: {what}; convert the model again")
