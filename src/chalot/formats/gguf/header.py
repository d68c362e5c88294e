"""The header of a GGUF file: bytes in, checked metadata and extents out.

    "GGUF" | version u32 | tensors u64 | pairs u64 | pairs | tensor infos | padding | payload

All of it is hostile until it has passed here: no count is believed before the file has room for
what it counts, nothing is kept twice, and memory stays below a small multiple of the header's own
bytes. Knows no files: bytes come from a function. Format, version 3 (2 is the same):
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from chalot.errors import FormatError, UnsupportedError
from chalot.formats.files import quoted
from chalot.formats.gguf.blocks import REFUSED, TYPES, BlockType

MAGIC = b"GGUF"
MAX_HEADER = 128 << 20  # bytes; a vocabulary of 256k tokens with merges takes 10 MB
MAX_VALUES = 2_000_000  # strings and lists in arrays, all together; the largest have 0.7 million
MAX_PAIRS = 100_000
MAX_TENSORS = 100_000  # large models have some 2,000
MAX_NAME = 65_535
MAX_RANK = 4
MAX_DEPTH = 4  # of arrays in arrays, of which no known key has any
MAX_ALIGNMENT = 1 << 20
WINDOW = 1 << 20  # bytes read at a time
LEAST_PAIR, LEAST_INFO = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes that the shortest one takes

NUMBERS: dict[int, np.dtype[Any]] = {  # value type -> how a number of it is stored
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"),
    4: np.dtype("<u4"), 5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"),
    10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9

Read = Callable[[int, int], bytes]  # (offset, size) -> exactly that many bytes


class Stored(NamedTuple):
    """A tensor as its file has it: shape with rows first, extent from the start of the file."""

    kind: BlockType
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class Header(NamedTuple):
    """Everything before the payload. Arrays of numbers are numpy's, others are lists."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


class _Cursor:
    """A place in the header that only moves on, and never past the file's end."""

    def __init__(self, read: Read, size: int, where: object) -> None:
        self._read, self.size, self.where = read, size, where
        self.at = 0
        self.values = 0
        self._window, self._begin = b"", 0

    def need(self, size: int, what: str) -> None:
        """Raise FormatError unless `size` more bytes are there and allowed."""
        if size > self.size - self.at:
            raise FormatError(
                f"{self.where}: {what} needs {size:,} bytes at {self.at:,}, "
                f"file has {self.size:,}; truncated download?"
            )
        if self.at + size > MAX_HEADER:
            raise FormatError(f"{self.where}: header is longer than {MAX_HEADER:,} bytes")

    def take(self, size: int, what: str) -> bytes:
        """The next `size` bytes."""
        begin = self.at - self._begin
        if begin + size > len(self._window):
            self.need(size, what)
            self._window = self._read(self.at, min(max(size, WINDOW), self.size - self.at))
            self._begin, begin = self.at, 0
        self.at += size
        return self._window[begin : begin + size]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def text(self, what: str, most: int = MAX_HEADER) -> str:
        """A string: its length in 8 bytes, then UTF-8."""
        length = self.u64(what)
        if length > most:
            raise FormatError(
                f"{self.where}: {what} has {length:,} bytes, expected at most {most:,}"
            )
        self.need(length, what)
        content = self.take(length, what)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{self.where}: {what}: byte {error.start} is not UTF-8; damaged download?"
            ) from None

    def count(self, values: int, what: str) -> None:
        """Note Python objects about to be made. Raises FormatError where there are too many."""
        self.values += values
        if self.values > MAX_VALUES:
            raise FormatError(f"{self.where}: {what}: found more than {MAX_VALUES:,} values in all")

    def number(self, kind: int, what: str) -> int | float | bool:
        """One number."""
        dtype = NUMBERS[kind]
        content = self.take(dtype.itemsize, what)
        if kind == BOOL and content[0] > 1:
            raise FormatError(f"{self.where}: {what}: found {content[0]} as a truth value")
        found: int | float | bool = np.frombuffer(content, dtype)[0].item()
        return found

    def array(self, what: str, depth: int = 1) -> Any:
        """An array: the type of its elements, how many, the elements."""
        kind, count = self.u32(what), self.u64(what)
        if kind in NUMBERS:
            dtype = NUMBERS[kind]
            self.need(count * dtype.itemsize, what)
            content = self.take(count * dtype.itemsize, what)
            if kind == BOOL and count and max(content) > 1:
                raise FormatError(f"{self.where}: {what}: found {max(content)} as a truth value")
            return np.frombuffer(content, dtype)
        if kind not in (STRING, ARRAY):
            raise FormatError(f"{self.where}: {what}: value type {kind} does not exist")
        if depth >= MAX_DEPTH and kind == ARRAY:
            raise FormatError(f"{self.where}: {what}: arrays nested deeper than {MAX_DEPTH}")
        self.need(count * (8 if kind == STRING else 12), what)
        self.count(count if kind == STRING else 8 * count, what)  # an empty array takes 112 bytes
        if kind == STRING:
            return [self.text(what) for _ in range(count)]
        return [self.array(what, depth + 1) for _ in range(count)]


def parse_header(read: Read, size: int, where: object) -> Header:
    """Read and check the header of a file of `size` bytes.

    Raises FormatError or UnsupportedError, each beginning with `where`.
    """
    cursor = _Cursor(read, size, where)
    _check_start(cursor)
    tensor_count, pair_count = cursor.u64("the header"), cursor.u64("the header")
    for count, most, least, what in (
        (pair_count, MAX_PAIRS, LEAST_PAIR, "metadata pairs"),
        (tensor_count, MAX_TENSORS, LEAST_INFO, "tensors"),
    ):
        if count > most or count * least > size - cursor.at:
            raise FormatError(
                f"{where}: says it has {count:,} {what}, more than a file of {size:,} bytes holds "
                f"or than {most:,}; damaged download?"
            )
    metadata = _metadata(cursor, pair_count)
    alignment = metadata.get("general.alignment", 32)
    if (
        type(alignment) is not int
        or not 1 <= alignment <= MAX_ALIGNMENT
        or alignment.bit_count() > 1
    ):
        raise FormatError(
            f"{where}: general.alignment is {quoted_value(alignment)}, expected a power of two"
        )
    infos = _infos(cursor, tensor_count, alignment)
    payload = -(-cursor.at // alignment) * alignment
    tensors = {name: t._replace(begin=payload + t.begin) for name, t in infos.items()}
    _check_extents(tensors, size, where)
    return Header(metadata, tensors)


def _check_start(cursor: _Cursor) -> None:
    start = cursor.take(min(24, cursor.size), "the header")
    if start[:4] != MAGIC:
        lfs = start.startswith(b"version ")
        what = "is a git-lfs pointer; run `git lfs pull`" if lfs else f"begins with {start[:4]!r}"
        raise FormatError(f"{cursor.where}: {what}, expected a GGUF file")
    if len(start) < 24:
        raise FormatError(f"{cursor.where}: found {len(start)} bytes; truncated download?")
    version = int.from_bytes(start[4:8], "little")
    if version and version & 0xFFFF == 0:
        raise UnsupportedError(
            f"{cursor.where}: is big-endian; convert it with `gguf-convert-endian FILE little`"
        )
    if version not in (2, 3):
        help_ = "make the file again with a newer llama.cpp" if version == 1 else "update chalot"
        raise UnsupportedError(
            f"{cursor.where}: is GGUF version {version}, expected 2 or 3; {help_}"
        )
    cursor.at = 8


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for n in range(count):
        key = cursor.text(f"key {n}", MAX_NAME)
        if key in metadata:
            raise FormatError(f"{cursor.where}: key {quoted(key)} is there twice; expected it once")
        what = f"metadata {quoted(key)}"
        kind = cursor.u32(what)
        if kind in NUMBERS:
            metadata[key] = cursor.number(kind, what)
        elif kind == STRING:
            metadata[key] = cursor.text(what)
        elif kind == ARRAY:
            metadata[key] = cursor.array(what)
        else:
            raise FormatError(f"{cursor.where}: {what}: value type {kind} does not exist")
    return metadata


def _infos(cursor: _Cursor, count: int, alignment: int) -> dict[str, Stored]:
    """Tensor infos, with extents counted from the start of the payload."""
    found: dict[str, Stored] = {}
    for n in range(count):
        name = cursor.text(f"name of tensor {n}", MAX_NAME)
        at = f"{cursor.where}: tensor {quoted(name)}"
        if name in found:
            raise FormatError(f"{at} is there twice; expected it once")
        rank = cursor.u32(f"tensor {quoted(name)}")
        if not 1 <= rank <= MAX_RANK:
            raise FormatError(f"{at} has {rank} dimensions, expected 1 to {MAX_RANK}")
        info = cursor.take(8 * rank + 12, f"tensor {quoted(name)}")
        *dimensions, number, offset = struct.unpack(f"<{rank}QIQ", info)
        kind = TYPES.get(number)
        if kind is None:
            unknown = "which is not known; update chalot, or take another file of this model"
            raise UnsupportedError(f"{at} has type {number}, {REFUSED.get(number, unknown)}")
        if min(dimensions) < 1 or math.prod(dimensions) >= 1 << 62:
            raise FormatError(f"{at} has impossible dimensions {dimensions}")
        if dimensions[0] % kind.weights:
            raise FormatError(
                f"{at}: rows of {dimensions[0]:,} numbers are no whole blocks of {kind.name}, "
                f"which have {kind.weights}"
            )
        if offset % alignment:
            raise FormatError(f"{at} begins at {offset:,}, expected a multiple of {alignment}")
        nbytes = math.prod(dimensions) // kind.weights * kind.nbytes
        found[name] = Stored(kind, tuple(reversed(dimensions)), offset, nbytes)
    return found


def _check_extents(tensors: Mapping[str, Stored], size: int, where: object) -> None:
    """Raise FormatError where a tensor overlaps another or lies past the end of the file."""
    reached, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
        if tensor.begin < reached:
            raise FormatError(
                f"{where}: tensor {quoted(name)} overlaps {quoted(before)}; do not use this file"
            )
        reached, before = tensor.begin + tensor.nbytes, name
    if reached > size:
        raise FormatError(
            f"{where}: tensor {quoted(before)} ends at {reached:,}, file has {size:,} bytes; "
            "truncated download?"
        )


def quoted_value(value: object) -> str:
    """A value out of a file, short and safe to print."""
    return quoted(value) if isinstance(value, str) else f"{value!r:.60}"


class Metadata:
    """Typed questions to a header's metadata, which answers with what the key should be, or raises.

    A key that is missing gives the default; without one it is a FormatError that begins with
    `where`, as is a value of another type.
    """

    def __init__(self, values: Mapping[str, Any], where: object) -> None:
        self.values, self.where = values, where

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def _error(self, key: str, expected: str) -> FormatError:
        if key not in self.values:
            return FormatError(f"{self.where}: metadata {quoted(key)} is missing")
        found = self.values[key]
        shown = f"a list of {len(found)}" if isinstance(found, list) else quoted_value(found)
        return FormatError(f"{self.where}: metadata {quoted(key)} is {shown}, expected {expected}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number below 2^63, or an array that repeats one: some have one for each layer."""
        found = self.values.get(key, default)
        if isinstance(found, np.ndarray) and len(found) and (found == found[0]).all():
            found = found[0].item()
        if type(found) is not int or not -(1 << 63) <= found < 1 << 63:
            raise self._error(key, "a whole number, the same for all layers")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, as the shortest decimal of its float32: 1e-06, not 9.99999997e-07."""
        found = self.values.get(key, default)
        if type(found) not in (int, float) or not abs(found) < 3e38:
            raise self._error(key, "a finite number")
        return float(str(np.float32(found)))

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        found = self.values.get(key, default)
        if type(found) is not bool:
            raise self._error(key, "a truth value")
        return found

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        found = self.values.get(key, default)
        if type(found) is not str:
            raise self._error(key, "a text")
        return found

    def texts(self, key: str, default: list[str] | None = None) -> list[str]:
        """A list of strings."""
        found = self.values.get(key, default)
        empty = isinstance(found, np.ndarray) and not len(found)
        if empty:
            return []
        if not isinstance(found, list) or any(type(item) is not str for item in found):
            raise self._error(key, "a list of texts")
        return found

    def numbers(self, key: str, count: int, kinds: str) -> "np.ndarray[Any, np.dtype[Any]] | None":
        """`count` numbers of dtype kinds such as "iu" or "f"; None where there are none."""
        if key not in self.values:
            return None
        found = self.values[key]
        if (
            not isinstance(found, np.ndarray)
            or found.dtype.kind not in kinds
            or len(found) != count
        ):
            raise self._error(key, f"a list of {count:,} numbers")
        return found
