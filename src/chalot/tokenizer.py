"""The verb `tokenizer`: train one, open any model's, compare two, say what one is like.

from chalot.tokenizer import tokenizer
ids = tokenizer("model.myai").encode("Hello")
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from chalot.errors import (
    FormatError,
    HubBusyError,
    HubOfflineError,
    OutputError,
    TokenizerError,
)
from chalot.formats import corpus, hub
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.documents import DOCUMENTS, parse_json, read_document
from chalot.formats.files import check_kind, whole_file
from chalot.formats.myai import MyaiFile
from chalot.kernels.backend import byte_pairs
from chalot.machine import resident_bytes
from chalot.sources import as_path, hub_id, on_hub
from chalot.text.byte_pairs import TABLES
from chalot.text.tokenizer import Source, Tokenizer, compiled, from_source
from chalot.text.training import SPECIALS, Recipe, check, configuration, train
from chalot.typed import PATH, check_types

NAME, CONFIGURATION = "tokenizer.json", "tokenizer_config.json"
LONG = 300_000  # characters that pay for compiling tables first
SHOWN = 8  # places where two tokenizers differ


# ---- training


@dataclass(frozen=True)
class Trained:
    """What training made, and of what."""

    path: Path
    vocabulary: int
    asked: int
    files: int
    bytes: int
    skipped: int
    seconds: float


def train_tokenizer(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    vocabulary: int = 4096,
    style: str = "qwen2",
    specials: Sequence[str] | None = None,
    min_frequency: int = 2,
    show_progress: bool = False,
) -> Trained:
    """Train a tokenizer of files, folders and patterns, and write it to `out`.

    A folder (or a name that ends in a slash) gets tokenizer.json and tokenizer_config.json, any
    other name is the file's. Raises FormatError (no text), TokenizerError (a vocabulary too small
    or a wrong special token), OutputError.
    """
    start = time.perf_counter()
    chosen = SPECIALS.get(style, ()) if specials is None else tuple(specials)
    recipe = Recipe(style, vocabulary, chosen, min_frequency)
    check(recipe)
    folder, path = _target(out)
    for place in (path, path.with_name(CONFIGURATION)) if folder is not None else (path,):
        check_kind(place, b"{")
    read = corpus.find(sources)
    content = train(read.pieces(), recipe, show_progress)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror})") from None
        with whole_file(folder / CONFIGURATION, b"{") as file:
            file.write(configuration(chosen))
    with whole_file(path, b"{") as file:
        file.write(content)
    made = Tokenizer.from_documents(content).vocabulary_size
    seconds = time.perf_counter() - start
    return Trained(path, made, vocabulary, read.files, read.bytes, len(read.skipped), seconds)


def _target(out: str | Path) -> tuple[Path | None, Path]:
    """(folder or None, file); raises OutputError for one that cannot be, before any work."""
    path = Path(out).expanduser()
    if path.is_dir() or str(out).endswith(("/", os.sep)):
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path}: is a file; expected a folder")
        return path, path / NAME
    if not path.parent.is_dir():
        raise OutputError(
            f"{path}: there is no folder {path.parent}; make it, or choose another place"
        )
    return None, path


# ---- opening


class _Folder:
    """The documents of a folder, whatever else is or is not in it."""

    def __init__(self, folder: Path, name: str = NAME) -> None:
        self.folder, self.name = folder, name

    def document(self, name: str) -> bytes | None:
        """See Source."""
        if name == NAME and self.name != NAME:
            return _whole(self.folder / self.name, DOCUMENTS[NAME])
        if self.name != NAME:  # beside a file of another name lies what belongs to others
            return None
        return read_document(self.folder, name)


def _whole(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise FormatError(f"{path}: found more than {limit:,} bytes, expected at most that many")
    return content


def _source(model: str | Path) -> Source:
    """Where the documents of what a user named are; a hub id's weights are not downloaded."""
    path = as_path(model)
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        try:
            return on_hub(model, hub.documents)
        except (HubOfflineError, HubBusyError):
            copy = hub.kept(hub_id(model) or "")  # downloaded earlier
            if copy is None:
                raise
            return _source(copy)
    if path.is_file() and path.suffix == ".json" and _is_tokenizer(path):
        return _Folder(path.parent, path.name)
    return open_checkpoint(path) if path.suffix != ".myai" else _of_myai(path)


def _of_myai(path: Path) -> Source:
    """A `.myai` file; one of the older version has its tokenizer as a source."""
    from chalot.library import is_ready

    return MyaiFile(path) if is_ready(path) else open_checkpoint(path)


def _is_tokenizer(path: Path) -> bool:
    if path.name == NAME:
        return True
    found = parse_json(_whole(path, DOCUMENTS[NAME]), path, dense=True)
    return (
        isinstance(found, dict)
        and isinstance(found.get("model"), dict)
        and "vocab" in found["model"]
    )


def tokenizer(model: str | Path, *, fast: bool = False) -> Tokenizer:
    """The tokenizer of a `.myai` or other model's file, a folder, a tokenizer.json, or of the hub.

    `fast` compiles the tables that a `.myai` file has (a second for 150,000 tokens), which pays for
    texts of a megabyte. Raises FormatError, TokenizerError, HubError.
    """
    check_types(model=(model, PATH))
    return _open(model, fast)[0]


def _open(model: str | Path, fast: bool) -> tuple[Tokenizer, int]:
    """(tokenizer, bytes of what it was opened from)"""
    source = _source(model)
    try:
        tables = source.document(TABLES) if isinstance(source, MyaiFile) else None
        raw = source.document(NAME)
        if tables is None and fast and raw is not None:
            tables = compiled(raw)
        return from_source(source, tables, byte_pairs), len(tables or raw or b"")
    finally:
        close = getattr(source, "close", None)
        if close is not None:
            close()


def check_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> list[int]:
    """The ids as a list. Raises TokenizerError for one that the vocabulary does not reach."""
    found = list(ids)
    size = tokenizer.vocabulary_size
    for id_ in found:
        if not 0 <= id_ < size:
            raise TokenizerError(f"found the token id {id_!r:.40}, expected 0 to {size - 1:,}")
    return found


# ---- comparing and measuring


@dataclass(frozen=True)
class Use:
    """How a tokenizer takes a text."""

    vocabulary: int
    tokens: int
    bytes_per_token: float
    different: int  # tokens of the vocabulary that the text uses
    round_trip: bool  # whether decoding gives the text again
    megabytes_per_second: float


@dataclass(frozen=True)
class Difference:
    """The same bytes of a text, cut in two ways."""

    byte: int
    a: list[str]
    b: list[str]


@dataclass(frozen=True)
class Comparison:
    """Two tokenizers on one text; `differences` are the first of `spans`."""

    bytes: int
    a: Use
    b: Use
    same_ids: bool
    spans: int | None  # places that they cut differently; None where their bytes differ
    differences: list[Difference]


@dataclass(frozen=True)
class Stats:
    """What a tokenizer is like; `use` on a text, if one was given."""

    vocabulary: int
    holes: int  # ids without a token
    special_tokens: dict[str, int]
    chat_template: bool
    bytes: int  # of what it was opened from
    opening_ms: float
    memory_bytes: int | None
    use: Use | None = field(default=None)


def _measure(tokenizer: Tokenizer, text: str) -> tuple[Use, list[int]]:
    size = len(text.encode())
    tokenizer.encode(text[:10_000])
    start = time.perf_counter()
    ids = tokenizer.encode(text)
    seconds = time.perf_counter() - start
    same = tokenizer.decode(ids) == text
    speed = size / 1e6 / max(seconds, 1e-9)
    each = size / max(len(ids), 1)
    return Use(tokenizer.vocabulary_size, len(ids), each, len(set(ids)), same, speed), ids


def compare(a: str | Path, b: str | Path, text: str) -> Comparison:
    """How two tokenizers take the same text. Raises what `tokenizer` does."""
    first, second = tokenizer(a, fast=True), tokenizer(b, fast=True)
    (use_a, ids_a), (use_b, ids_b) = _measure(first, text), _measure(second, text)
    pieces = [_pieces(t, ids) for t, ids in ((first, ids_a), (second, ids_b))]
    spans = None
    shown: list[Difference] = []
    if b"".join(pieces[0]) == b"".join(pieces[1]):
        spans = 0
        for difference in _spans(*pieces):
            spans += 1
            if len(shown) < SHOWN:
                shown.append(difference)
    return Comparison(len(text.encode()), use_a, use_b, ids_a == ids_b, spans, shown)


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[bytes]:
    hidden = set(tokenizer.special_tokens.values())
    return [piece for id_ in ids if id_ not in hidden and (piece := tokenizer.piece(id_))]


def _spans(a: list[bytes], b: list[bytes]) -> Iterator[Difference]:
    """Where two cuttings of the same bytes differ, between places that both cut at."""
    ends = [list(accumulate(map(len, pieces))) for pieces in (a, b)]
    start = i = j = 0
    for end in sorted(set(ends[0]) & set(ends[1])):
        first_i, first_j = i, j
        while i < len(a) and ends[0][i] <= end:
            i += 1
        while j < len(b) and ends[1][j] <= end:
            j += 1
        if a[first_i:i] != b[first_j:j]:
            cut = (a[first_i:i], b[first_j:j])
            shown = [[piece.decode(errors="backslashreplace") for piece in part] for part in cut]
            yield Difference(start, *shown)
        start = end


def stats(model: str | Path, text: str | None = None) -> Stats:
    """What a model's tokenizer is like. Opened from tables, as `run` does, where it can be."""
    source = _source(model)
    raw = None if isinstance(source, MyaiFile) else source.document(NAME)
    tables = source.document(TABLES) if isinstance(source, MyaiFile) else None
    if tables is None and raw is not None:
        tables = compiled(raw)
    before, start = resident_bytes(), time.perf_counter()
    opened = from_source(source, tables, byte_pairs)
    opened.encode("Hello")
    seconds = time.perf_counter() - start
    memory = max(0, resident_bytes() - before) if before else None
    size = opened.vocabulary_size
    return Stats(
        size,
        sum(1 for id_ in range(size) if not opened.piece(id_)),
        opened.special_tokens,
        opened.has_chat_template,
        len(tables or raw or b""),
        seconds * 1e3,
        memory,
        None if text is None else _measure(opened, text)[0],
    )


def as_pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """What each id stands for, bytes that are no whole character as \\\\xNN."""
    return [tokenizer.piece(id_).decode(errors="backslashreplace") for id_ in ids]


def report(comparison: Comparison) -> list[tuple[str, Any, Any]]:
    """Rows of (what, of a, of b)."""
    a, b = comparison.a, comparison.b
    same_a, same_b = ("yes" if use.round_trip else "no" for use in (a, b))
    return [
        ("vocabulary", f"{a.vocabulary:,}", f"{b.vocabulary:,}"),
        ("tokens", f"{a.tokens:,}", f"{b.tokens:,}"),
        ("bytes a token", f"{a.bytes_per_token:.3f}", f"{b.bytes_per_token:.3f}"),
        ("different tokens", f"{a.different:,}", f"{b.different:,}"),
        ("decodes to the text", same_a, same_b),
        ("encoding, MB/s", f"{a.megabytes_per_second:.1f}", f"{b.megabytes_per_second:.1f}"),
    ]
