"""A model in an .npz with a manifest: codes of 1, 2, 4 or 8 bits with a scale and zero per row.

NAME_quantized_q4.npz holds the arrays, NAME_manifest_q4.json says what they are; either finds the
other. Codes are packed (several a byte, quant/rows.py), row by row or all in a run, or stand in an
int8 or uint8 each; the arrays' shapes say which. No array is unpickled, and none is read whole:
rows are read as they are asked for. Written by formats/npz/writer.py, described in docs/npz.md.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, WeightError
from chalot.formats.checkpoint import TensorInfo
from chalot.formats.documents import DOCUMENTS
from chalot.formats.files import quoted
from chalot.formats.npy import LONGEST, Array, parse_header
from chalot.formats.npz.manifest import FLOATS, Entry, read_manifest
from chalot.formats.zip_members import Member, ZipMembers
from chalot.quant.rows import Rows, dequantize_rows, row_bytes, unpack_bits

NAMES = re.compile(r"(.*)_(quantized|manifest)(_q\d+)?\.(npz|json)")


class Place(NamedTuple):
    """An array in the zip file."""

    member: Member
    array: Array


def partners(name: str) -> list[str]:
    """What the other file of the pair may be called, the likeliest first."""
    other = ".json" if name.endswith(".npz") else ".npz"
    stem = name.rpartition(".")[0] or name
    found = [stem + other]
    match = NAMES.fullmatch(name)
    if match:
        word = "manifest" if other == ".json" else "quantized"
        found.insert(0, f"{match[1]}_{word}{match[3] or ''}{other}")
    return found + (["manifest.json"] if other == ".json" else [])


class NpzModel:
    """A `Checkpoint` (see formats/checkpoint.py) of an .npz and its manifest."""

    def __init__(self, path: Path) -> None:
        """`path` is one of the two. Raises FormatError, or UnsupportedError for other versions."""
        self.path = path
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FormatError(f"{path}: cannot be opened ({reason})") from None
        folder = real.parent
        with real.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        manifest = self._partner(real, "manifest") if is_zip else real
        self.manifest = read_manifest(folder, manifest.name)
        named = self.manifest.weights_file
        if is_zip:
            weights = real
        else:
            weights = folder / named if named else self._partner(real, "weights")
        self.files = (manifest, weights)
        self._stamps = [_stamp(file) for file in self.files]
        self.zip = ZipMembers(weights)
        try:
            self._check_size()
            self._arrays: dict[str, Place] = {}
            self._tensors = {e.name: self._info(e) for e in self.manifest.entries.values()}
            self._documents = {
                name: self._document(name, array) for name, array in self.manifest.documents.items()
            }
        except BaseException:
            self.close()
            raise

    def _partner(self, real: Path, what: str) -> Path:
        for name in partners(real.name):
            if (real.parent / name).is_file():
                return real.parent / name
        expected = partners(real.name)[0]
        raise FormatError(
            f"{self.path}: found no {what}; expected {quoted(expected)} beside it: "
            "the two files belong together"
        )

    def _check_size(self) -> None:
        expected = self.manifest.weights_bytes
        if expected is not None and expected != self.zip.size:
            raise FormatError(
                f"{self.zip.path}: found {self.zip.size:,} bytes, its manifest says {expected:,}; "
                "they belong to two conversions, or one is cut"
            )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every weight of the manifest. `dtype` is "f32", "f16", or "q4" for codes of 4 bits."""
        return MappingProxyType(self._tensors)

    # ---- arrays

    def _array(self, name: str, what: str) -> Place:
        """An array by its name, its header read and checked against its member's size."""
        if name not in self._arrays:
            member = self.zip.members.get(name + ".npy")
            where = f"{self.zip.path}: {what}: array {quoted(name)}"
            if member is None:
                raise FormatError(f"{where} is missing, and the manifest names it")
            array = parse_header(self.zip.bytes_of(member, 0, LONGEST), where)
            if member.size != array.begin + array.nbytes:
                raise FormatError(
                    f"{where} has {member.size:,} bytes, {array.dtype.str} of shape {array.shape} "
                    f"takes {array.begin + array.nbytes:,}"
                )
            self._arrays[name] = Place(member, array)
        return self._arrays[name]

    def _numbers(self, place: Place, first: int, last: int) -> NDArray[Any]:
        """Numbers `first:last` of an array, counted through all its dimensions."""
        size = place.array.dtype.itemsize
        data = self.zip.bytes_of(
            place.member, place.array.begin + first * size, (last - first) * size
        )
        return np.frombuffer(data, place.array.dtype)

    def _info(self, entry: Entry) -> TensorInfo:
        """A weight whose arrays are there and of the shapes that its own asks for."""
        where = f"{self.zip.path}: weight {quoted(entry.name)}"
        codes = self._array(entry.codes, f"weight {quoted(entry.name)}").array
        if codes.dtype.kind == "f":
            if codes.shape != entry.shape:
                raise FormatError(f"{where}: found shape {codes.shape}, expected {entry.shape}")
            return TensorInfo(entry.name, f"f{codes.dtype.itemsize * 8}", entry.shape, codes.nbytes)
        if entry.bits in FLOATS or len(entry.shape) != 2 or codes.dtype.itemsize != 1:
            raise FormatError(
                f"{where}: {codes.dtype.str} of shape {codes.shape} is neither floats nor codes "
                f"of {entry.bits} bits of a matrix"
            )
        self._width(entry, codes)
        total = codes.nbytes
        for name, needed in ((entry.scales, True), (entry.zeros, entry.bits > 1)):
            if name is None and needed:
                raise FormatError(f"{where}: q_scales or q_zero_point is missing")
            if name is not None:
                array = self._array(name, f"weight {quoted(entry.name)}").array
                if array.shape not in ((entry.shape[0],), (entry.shape[0], 1)):
                    raise FormatError(
                        f"{where}: {quoted(name)} has shape {array.shape}, expected one number "
                        f"for each of {entry.shape[0]:,} rows"
                    )
                total += array.nbytes
        return TensorInfo(entry.name, f"q{entry.bits}", entry.shape, total, f"row{entry.bits}")

    def _width(self, entry: Entry, array: Array) -> tuple[int, int]:
        """(bits of a stored code, codes from one row's first to the next row's)."""
        rows, columns = entry.shape
        per = 8 // entry.bits
        packed = row_bytes(columns, entry.bits)
        if array.shape == (rows, packed) and array.dtype.kind == "u":
            return entry.bits, packed * per
        if array.shape in ((rows, columns), (rows * columns,)):
            return 8, columns
        if array.shape == (-(-rows * columns // per),) and array.dtype.kind == "u":
            return entry.bits, columns
        raise FormatError(
            f"{self.zip.path}: weight {quoted(entry.name)}: codes {array.dtype.str} of shape "
            f"{array.shape}; expected {packed} bytes a row for {rows} x {columns} of {entry.bits} "
            "bits, or a byte for each"
        )

    # ---- the protocol

    def codes(self, name: str, first: int = 0, last: int | None = None) -> Rows:
        """Rows `first:last` of a quantised weight as they are stored.

        Raises WeightError for scales or zeros that are NaN or Inf.
        """
        entry = self.manifest.entries[name]
        rows, columns = entry.shape
        last = rows if last is None else last
        place = self._array(entry.codes, name)
        bits, stride = self._width(entry, place.array)
        per, count = 8 // bits, last - first
        begin = first * stride // per
        end = -(-((last - 1) * stride + columns) // per)
        stored = self._numbers(place, begin, end)
        codes = stored if bits == 8 else unpack_bits(stored, bits)
        codes = codes[first * stride - begin * per :][: count * stride]
        codes = codes.reshape(count, stride)[:, :columns]
        scale, zero = (
            np.zeros(count, np.float32)
            if array is None
            else self._numbers(self._array(array, name), first, last).astype(np.float32)
            for array in (entry.scales, entry.zeros)
        )
        if not (np.isfinite(scale).all() and np.isfinite(zero).all()):
            raise WeightError(
                f"{self.zip.path}: tensor {quoted(name)} has scales or zero points that are NaN "
                "or Inf; take another file"
            )
        if codes.dtype.kind == "i":
            if entry.bits == 1:  # -1 or 1, or 0 or 1
                codes = (codes > 0).view(np.uint8)
            else:  # -128..127 and its zero point, both moved by 128
                codes = codes.view(np.uint8) ^ np.uint8(128)
                zero = zero + np.float32(128)
        return Rows(entry.bits, codes, scale, zero)

    def float32(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """See Checkpoint. Of matrices rows, of vectors numbers."""
        info = self._tensors.get(name)
        if info is None:
            raise FormatError(f"{self.path}: has no tensor {quoted(name)}")
        rows = info.shape[0]
        last = rows if last is None else last
        if not 0 <= first <= last <= rows:
            raise IndexError(f"{name}: rows {first}:{last} of {rows}")
        shape = (last - first, *info.shape[1:])
        if first == last:
            return np.zeros(shape, np.float32)
        if info.dtype.startswith("q"):
            return dequantize_rows(self.codes(name, first, last))
        width = math.prod(info.shape[1:])
        place = self._array(self.manifest.entries[name].codes, name)
        with np.errstate(over="ignore"):  # what is no float32 becomes Inf, which is refused by name
            numbers = self._numbers(place, first * width, last * width).astype(np.float32)
        return numbers.reshape(shape)

    def raw(self, name: str) -> NDArray[Any]:
        """The whole tensor as float32: codes are nothing that a reader of numbers could use."""
        return self.float32(name)

    def _document(self, name: str, array: str) -> Place:
        place = self._array(array, f"document {quoted(name)}")
        found = place.array
        if found.dtype != np.uint8 or len(found.shape) != 1 or found.nbytes > DOCUMENTS[name]:
            raise FormatError(
                f"{self.zip.path}: document {name}: found {found.dtype.str} of shape "
                f"{found.shape}, expected at most {DOCUMENTS[name]:,} bytes"
            )
        return place

    def document(self, name: str) -> bytes | None:
        """A document that is embedded; config.json is what the manifest says."""
        if name == "config.json":
            return json.dumps(self.manifest.config).encode()
        place = self._documents.get(name)
        if place is None:
            return None
        content = self._numbers(place, 0, place.array.nbytes).tobytes()
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{self.zip.path}: document {name}: byte {error.start} is not UTF-8"
            ) from None
        return content

    def check_unchanged(self) -> None:
        """Raise FormatError if one of the two files changed since it was opened."""
        for file, stamp in zip(self.files, self._stamps, strict=True):
            if _stamp(file) != stamp:
                raise FormatError(f"{file}: changed since it was opened; start again")

    def close(self) -> None:
        """Give back the file."""
        self.zip.close()

    def __enter__(self) -> "NpzModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
