"""A text's tokens and cache pages in a file: what it takes to go on without reading it again.

    magic (16 bytes) | header bytes (u64) | sha256 of all that follows (32 bytes) | zeros to 64
    header (JSON) | note | zeros to a multiple of 64 | tokens (int32) | zeros to 64 | pages

Little-endian. A page is as it lies in memory (docs/format.md); its number in the file says nothing.
Sizes are checked against the file's before anything is read, the checksum before anything is used.
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, one_line
from chalot.formats.documents import parse_json
from chalot.formats.files import open_regular, read_at, whole_file

MAGIC = b"chalot session 1"
FRONT = struct.Struct("<16sQ32s8x")
MAX_HEADER, MAX_NOTE, MAX_TOKENS = 1 << 16, 16_000_000, 1 << 24
READ = 1 << 24

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


class SessionHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What pages belong to, and what a text was about to do."""

    made_with: dict[str, str | int]  # must be that of whoever restores it
    tokens: Count
    start: Count  # where the answer begins
    length: Count  # tokens that are in the pages
    gone: Count  # pages before this one, those of sinks aside, lay behind the window
    pages: Count
    page_bytes: Count
    note: Count  # bytes
    sampling: dict[str, int | float]


@dataclass(frozen=True)
class Sizes:
    """Where the parts of a file begin."""

    header: int
    note: int
    tokens: int
    page_bytes: int
    pages: int

    @property
    def at_tokens(self) -> int:
        """Behind header and note."""
        return _up(FRONT.size + self.header + self.note)

    @property
    def at_pages(self) -> int:
        """Behind the tokens."""
        return _up(self.at_tokens + 4 * self.tokens)

    @property
    def end(self) -> int:
        """The file's bytes."""
        return self.at_pages + self.pages * self.page_bytes


def _up(n: int) -> int:
    return -(-n // 64) * 64


def _sizes(header: bytes, found: SessionHeader) -> Sizes:
    return Sizes(len(header), found.note, found.tokens, found.page_bytes, found.pages)


def write_session(
    path: Path,
    header: SessionHeader,
    note: bytes,
    tokens: NDArray[np.int32],
    pages: Iterable[NDArray[np.uint8]],
) -> None:
    """Write the file, whole or not at all; what is there must be a session. Raises OutputError."""
    text = msgspec.json.encode(header)
    sizes = _sizes(text, header)
    digest = hashlib.sha256()
    with whole_file(path, MAGIC) as file:
        file.write(bytes(FRONT.size))

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(text + note + bytes(sizes.at_tokens - FRONT.size - len(text) - len(note)))
        put(tokens.astype("<i4").tobytes())
        put(bytes(sizes.at_pages - sizes.at_tokens - 4 * len(tokens)))
        for page in pages:
            put(page.data)
        file.seek(0)
        file.write(FRONT.pack(MAGIC, len(text), digest.digest()))


class SessionFile:
    """An opened file, its header checked against its size. Use it in a `with` block."""

    def __init__(self, path: Path) -> None:
        """Raises FormatError for what is not such a file, or not whole."""
        self.path = path
        self.file: BinaryIO = open_regular(path, path)
        try:
            self._open()
        except BaseException:
            self.file.close()
            raise

    def _open(self) -> None:
        path, size = self.path, os.fstat(self.file.fileno()).st_size
        if size < FRONT.size:
            raise FormatError(f"{path}: found {size} bytes, expected a saved session; remove it")
        magic, length, self.sha256 = FRONT.unpack(read_at(self.file, path, 0, FRONT.size))
        if magic != MAGIC:
            raise FormatError(
                f"{path}: begins with {magic!r}; this is no saved session; choose another name"
            )
        if not 0 < length <= min(MAX_HEADER, size - FRONT.size):
            raise FormatError(
                f"{path}: a header of {length} bytes in a file of {size}; damaged? remove it"
            )
        text = read_at(self.file, path, FRONT.size, length)
        try:
            self.header = msgspec.convert(parse_json(text, f"{path}: header"), SessionHeader)
        except msgspec.ValidationError as error:
            raise FormatError(f"{path}: header: {one_line(error)}") from None
        if self.header.note > MAX_NOTE or self.header.tokens > MAX_TOKENS:
            raise FormatError(
                f"{path}: {self.header.tokens} tokens and a note of {self.header.note} bytes; "
                f"expected at most {MAX_TOKENS} and {MAX_NOTE}; damaged? remove it"
            )
        self.sizes = _sizes(text, self.header)
        if self.sizes.end != size:
            raise FormatError(
                f"{path}: found {size} bytes, expected {self.sizes.end}; truncated? remove it"
            )

    def read(self, pages: Iterable[NDArray[np.uint8]]) -> tuple[NDArray[np.int32], bytes]:
        """Tokens and note; `pages` are filled. Raises FormatError where the checksum is wrong."""
        sizes, digest = self.sizes, hashlib.sha256()
        front = read_at(self.file, self.path, FRONT.size, sizes.at_pages - FRONT.size)
        digest.update(front)
        self.file.seek(sizes.at_pages)
        for page in pages:
            view = page.data
            while view:
                done = self.file.readinto(view[:READ])  # type: ignore[attr-defined]
                if not done:
                    raise FormatError(f"{self.path}: was cut while it was read; start again")
                view = view[done:]
            digest.update(page.data)
        if digest.digest() != self.sha256:
            raise FormatError(f"{self.path}: the checksum is wrong; damaged? remove it")
        at = sizes.at_tokens - FRONT.size
        tokens = np.frombuffer(front[at : at + 4 * sizes.tokens], "<i4").astype(np.int32)
        return tokens, front[sizes.header : sizes.header + sizes.note]

    def close(self) -> None:
        """Give back the file."""
        self.file.close()

    def __enter__(self) -> "SessionFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
