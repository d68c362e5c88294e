"""One numpy array in a file (.npy, versions 1 to 3): its header, read without evaluating it.

    magic "\\x93NUMPY", version (2 bytes), header length (2 or 4 bytes), header, numbers

The header is a Python literal. numpy and its followers write one form of it only, which a regular
expression reads; anything else is refused, and so are object arrays, which are pickles.
Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, UnsupportedError
from chalot.formats.files import open_inside, quoted, whole_file

MAGIC = b"\x93NUMPY"
LONGEST = 4096  # bytes of a header; numpy's take 128
MAX_RANK = 8
MAX_FILE = 1 << 30  # bytes of an array that is read whole
TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
HEADER = re.compile(
    rb"\{ *'descr' *: *'([^']{1,32})' *, *'fortran_order' *: *(True|False) *, *"
    rb"'shape' *: *\(([0-9, ]*)\) *,? *\} *\n?"
)


class Array(NamedTuple):
    """What a header says: the numbers follow `begin` bytes after the file's start."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_header(start: bytes, where: object) -> Array:
    """The header in the first `LONGEST` bytes of a file, checked.

    Raises FormatError, which begins with `where`, and UnsupportedError for types and orders that
    are not read here.
    """
    wide = start[6:7] in (b"\2", b"\3")
    begin = 12 if wide else 10
    if not start.startswith(MAGIC) or len(start) < begin or start[6] not in (1, 2, 3):
        raise FormatError(f"{where}: is no numpy array (.npy); truncated, or another kind of file?")
    length = int.from_bytes(start[8:begin], "little")
    if length > LONGEST - begin or len(start) < begin + length:
        raise FormatError(f"{where}: a header of {length:,} bytes; expected at most {LONGEST}")
    text = start[begin : begin + length]
    found = HEADER.fullmatch(text)
    if found is None:
        raise FormatError(f"{where}: header {quoted(repr(text))} is not what numpy writes")
    name = found[1].decode("latin-1")
    if "O" in name:
        raise FormatError(
            f"{where}: is an array of objects, a pickle, which can run code when it is loaded; "
            "expected numbers"
        )
    if name[1:] not in TYPES or name[0] not in "<|" or (name[0] == "|") != (name[2] == "1"):
        raise UnsupportedError(
            f"{where}: numbers of type {quoted(name)}; expected little-endian {', '.join(TYPES)}"
        )
    shape = tuple(int(part[:20]) for part in found[3].decode().replace(",", " ").split())
    if len(shape) > MAX_RANK or any(size >= 1 << 48 for size in shape):
        raise FormatError(f"{where}: shape {quoted(str(shape))} is none of an array")
    if found[2] == b"True" and len(shape) > 1:
        raise UnsupportedError(
            f"{where}: is stored by columns; save it with numpy.ascontiguousarray"
        )
    return Array(np.dtype(name), shape, begin + length)


def header_bytes(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header of an array, as numpy writes it: padded to a multiple of 64 bytes."""
    sizes = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({sizes}), }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return MAGIC + b"\1\0" + len(text).to_bytes(2, "little") + text.encode()


def read_array(path: Path) -> NDArray[Any]:
    """A whole .npy file of at most 1 GB. Raises FormatError or UnsupportedError."""
    place = path.expanduser()
    try:
        place = place.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"{path}: cannot be opened ({reason}); expected a .npy file") from None
    with open_inside(place.parent, place.name) as file:
        size = place.stat().st_size
        array = parse_header(file.read(LONGEST), path)
        if size != array.begin + array.nbytes or size > MAX_FILE:
            raise FormatError(
                f"{path}: found {size:,} bytes, expected {array.begin + array.nbytes:,} for "
                f"{array.dtype.str} of shape {array.shape}, and at most {MAX_FILE:,}; truncated?"
            )
        out = np.empty(array.shape, array.dtype)
        file.seek(array.begin)
        view = memoryview(out.reshape(-1).view(np.uint8).data)
        while view:
            done = file.readinto(view)  # type: ignore[attr-defined]
            if not done:
                raise FormatError(f"{path}: was cut while it was read; start again")
            view = view[done:]
    return out


def write_array(path: Path, values: NDArray[np.float32]) -> None:
    """A float32 array as a .npy file, whole or not at all. Raises OutputError."""
    with whole_file(path, b"\x93NUMPY") as file:
        file.write(header_bytes("<f4", values.shape))
        file.write(np.ascontiguousarray(values, "<f4").data)
