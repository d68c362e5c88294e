"""A Hugging Face folder: config.json, a tokenizer, and weights in one or more safetensors files.

A safetensors file is a header length (8 bytes, little endian), that many bytes of JSON, and the
payload. The JSON maps each name to {"dtype", "shape", "data_offsets": [begin, end]}, offsets from
the start of the payload, and may hold "__metadata__", strings to strings. Extents cover the payload
without overlap or hole. Source: https://github.com/huggingface/safetensors, README, "Format".

`float32` reads with pread, so a file that is cut meanwhile is a FormatError. `raw` maps, and checks
the file's length first; a file cut between that check and the use of the view ends the process with
SIGBUS. Only copying would close that race: do not change a checkpoint while it is converted.
"""

import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, LimitError, UnsupportedError, WeightError
from chalot.formats.checkpoint import TensorInfo
from chalot.formats.documents import DOCUMENTS, read_document
from chalot.formats.files import open_inside, quoted, read_at, whole_file
from chalot.formats.floats import STORED, bf16_to_float32, narrowed
from chalot.formats.safetensors.header import (
    INDEX,
    MAX_SHARDS,
    Extent,
    header_length,
    merge,
    parse_header,
    parse_index,
    weight_files,
)
from chalot.formats.safetensors.writer import TensorPlan, header

PIECE = 1 << 20  # bytes read at a time while widening to float32

INTEGERS: dict[str, np.dtype[Any]] = {  # types of codes
    "u8": np.dtype("u1"),
    "i8": np.dtype("i1"),
    "i32": np.dtype("<i4"),
    "i64": np.dtype("<i8"),
}

Source = NDArray[Any] | Callable[[], NDArray[Any]]


class _Shard:
    """One open safetensors file."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        self.file = open_inside(folder, name)
        self.mapping: mmap.mmap | None = None
        try:
            self.size = os.fstat(self.file.fileno()).st_size
            length = header_length(self.read(0, min(8, self.size)), self.size, self.path)
            self.payload = 8 + length
            header = self.read(8, length)
            self.extents = parse_header(header, self.size - self.payload, self.path)
        except BaseException:
            self.file.close()
            raise

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes at `offset` of the file."""
        return read_at(self.file, self.path, offset, size)

    def view(self, extent: Extent) -> NDArray[Any]:
        """A tensor's stored values, mapped and read-only; a copy where they are not aligned."""
        if self.file.closed:
            raise FormatError(f"{self.path}: is closed; open the checkpoint again")
        found = os.fstat(self.file.fileno()).st_size
        if found < self.payload + extent.end:
            raise FormatError(
                f"{self.path}: found {found} bytes, had {self.size} when it was opened"
            )
        if self.mapping is None:
            try:
                self.mapping = mmap.mmap(self.file.fileno(), self.size, access=mmap.ACCESS_READ)
            except OSError as error:
                raise LimitError(
                    f"{self.path}: {self.size:,} bytes cannot be mapped ({error.strerror}); "
                    "raise the limits that `ulimit -v` and `ulimit -n` show"
                ) from error
        values: NDArray[Any] = np.frombuffer(
            self.mapping,
            dtype=(STORED | INTEGERS)[extent.info.dtype],
            count=math.prod(extent.info.shape),
            offset=self.payload + extent.begin,
        ).reshape(extent.info.shape)
        return values if values.flags.aligned else values.copy()

    def close(self) -> None:
        self.file.close()
        if self.mapping is not None:
            with suppress(BufferError):  # views are still in use; the last one unmaps
                self.mapping.close()
            self.mapping = None


class SafetensorsFolder:
    """A `Checkpoint` (see formats/checkpoint.py) in a Hugging Face folder.

    Weights are `model.safetensors`; else the shards that `model.safetensors.index.json` names; else
    every *.safetensors of the folder. Tensors of other types than bf16, f16 and f32 are listed,
    with their own type's name ("i64"), and raise UnsupportedError only when they are asked for.
    Raises FormatError without weights or with a damaged file, UnsupportedError for pickles only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shards: dict[str, _Shard] = {}
        self._places: dict[str, tuple[_Shard, Extent]] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        self._tensors = {name: extent.info for name, (_, extent) in self._places.items()}
        self._stamps = {file: _stamp(file) for file in self._files()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name in the files; read-only."""
        return MappingProxyType(self._tensors)

    def raw(self, name: str) -> NDArray[Any]:
        """The stored values, mapped and read-only: uint16 bits for bf16, else float16 or float32.

        Aligned: where the file does not align a tensor, this is a copy. The view stays valid after
        `close`. Raises FormatError (no such tensor, empty, file cut), UnsupportedError (its type).
        """
        shard, extent = self._place(name)
        return shard.view(extent)

    def float32(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """Rows `first:last` along the first axis as a new float32 array; only these are read.

        Takes the result's memory and 1 MB. Raises as `raw`, and IndexError for missing rows.
        """
        shard, extent = self._place(name)
        rows = extent.info.shape[0] if extent.info.shape else 1
        last = rows if last is None else last
        if not 0 <= first <= last <= rows:
            raise IndexError(f"{name}: rows {first}:{last} of {rows}")
        shape = (last - first, *extent.info.shape[1:]) if extent.info.shape else ()
        stored = STORED[extent.info.dtype]
        row = extent.info.nbytes // rows
        offset = shard.payload + extent.begin + first * row
        out = np.empty((last - first) * row // stored.itemsize, np.float32)
        step = PIECE // stored.itemsize
        for start in range(0, out.size, step):
            piece = out[start : start + step]
            content = shard.read(offset + start * stored.itemsize, piece.size * stored.itemsize)
            values = np.frombuffer(content, stored)
            if extent.info.dtype == "bf16":
                bf16_to_float32(values, piece)
            else:
                piece[:] = values
        return out.reshape(shape)

    def integers(self, name: str, first: int, last: int) -> NDArray[np.uint8]:
        """Rows `first:last` of a matrix of bytes ("u8"). Raises as `float32`."""
        shard, extent = self._place(name, ("u8",))
        rows, columns = extent.info.shape
        if not 0 <= first <= last <= rows:
            raise IndexError(f"{name}: rows {first}:{last} of {rows}")
        begin = shard.payload + extent.begin + first * columns
        content = shard.read(begin, (last - first) * columns)
        return np.frombuffer(content, np.uint8).reshape(last - first, columns)

    def held(self, name: str) -> NDArray[Any]:
        """A tensor of whole numbers (INTEGERS), mapped as by `raw`. Raises as `raw`."""
        shard, extent = self._place(name, INTEGERS)
        return shard.view(extent)

    def document(self, name: str) -> bytes | None:
        """One of `DOCUMENTS`, or None if the folder has none. Raises FormatError (size, UTF-8)."""
        return read_document(self.path, name)

    def check_unchanged(self) -> None:
        """Raise FormatError if a file of the checkpoint came, went, or changed size or date."""
        for file in {*self._stamps, *self._files()}:
            if self._stamps.get(file) != _stamp(file):
                raise FormatError(f"{file}: changed since it was opened; start again")

    def close(self) -> None:
        """Give back the files. Views from `raw` stay valid; their memory goes with the last one."""
        for shard in self._shards.values():
            shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        """Open every file of weights and check them against each other and against the index."""
        promised: dict[str, str] = {}
        try:
            files = weight_files([entry.name for entry in self.path.iterdir()], self.path)
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be listed ({error.strerror})") from error
        if not files:
            promised = parse_index(read_document(self.path, INDEX) or b"", self.path / INDEX)
            files = sorted(set(promised.values()))
        if len(files) > MAX_SHARDS:
            raise FormatError(f"{self.path}: {len(files)} files; expected at most {MAX_SHARDS}")
        for name in files:
            self._shards[name] = _Shard(self.path, name)
        extents = {name: shard.extents for name, shard in self._shards.items()}
        for tensor, name in merge(extents, promised, self.path).items():
            self._places[tensor] = (self._shards[name], extents[name][tensor])

    def _files(self) -> list[Path]:
        names = {*DOCUMENTS, *self._shards}
        return [self.path / name for name in sorted(names)]

    def _place(self, name: str, types: Iterable[str] = STORED) -> tuple[_Shard, Extent]:
        """Where a tensor lies, if it is there and of a type and size that can be computed with."""
        if name not in self._places:
            raise FormatError(f"{self.path}: has no tensor {quoted(name)}")
        shard, extent = self._places[name]
        if extent.info.dtype not in types:
            raise UnsupportedError(
                f"{shard.path}: tensor {quoted(name)} is {extent.info.dtype}; chalot reads bf16, "
                "f16 and f32: use the model's original, not yet quantised checkpoint"
            )
        if extent.info.nbytes == 0:
            raise FormatError(
                f"{shard.path}: tensor {quoted(name)} is empty, shape {extent.info.shape}; saved "
                "under ZeRO-3 without gathering the weights? Save it again with all of them"
            )
        return shard, extent


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def write(
    path: Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...], Source]],
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Write a safetensors file at `path`, whole or not at all.

    `tensors` are (name, "bf16" | "f16" | "f32", shape, values); values are an array of that shape,
    or a function that makes it, called while writing, so that one tensor at a time is in memory.
    Stored bits are taken as they are (uint16 for bf16), other floats are rounded to nearest. The
    default metadata is what transformers looks for. Raises ValueError for a wrong name, type or
    shape, WeightError where rounding would make a finite value infinite, OutputError for the disk.
    """
    # the widest type first, as the reference writer: then every tensor is aligned to its element
    given = list(tensors)
    for name, dtype, shape, _ in given:
        if dtype not in STORED or not name or any(size < 0 for size in shape):
            raise ValueError(f"tensor {quoted(name)}: cannot store {dtype} of shape {shape}")
    order = sorted(given, key=lambda entry: -STORED[entry[1]].itemsize)
    begin = header([TensorPlan(*entry[:3]) for entry in order], metadata)
    with whole_file(path) as file:
        file.write(begin)
        for name, dtype, shape, source in order:
            _write_tensor(file, name, dtype, shape, source)


def _write_tensor(
    file: BinaryIO, name: str, dtype: str, shape: tuple[int, ...], source: Source
) -> None:
    values = source() if callable(source) else source
    if values.shape != shape:
        raise ValueError(f"tensor {quoted(name)}: values of shape {values.shape}, expected {shape}")
    if values.dtype != STORED[dtype]:
        if values.dtype.kind != "f":
            raise ValueError(f"tensor {quoted(name)}: {values.dtype} values, expected {dtype}")
        try:
            values = narrowed(values, dtype)
        except OverflowError:
            raise WeightError(
                f"tensor {quoted(name)}: values too large for {dtype}; store it as f32"
            ) from None
    file.write(np.ascontiguousarray(values).data if values.size else b"")
