"""A GGUF file, or the parts of a split one, as a `Checkpoint` of its Hugging Face model.

Tensors go by Hugging Face's names and are what its model has: rows of q and k that llama-family
files keep in another order, norms that Gemma's files keep as 1 + w, and scales that BitNet's keep
apart are undone while rows are read. Documents are made of the metadata.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, UnsupportedError
from chalot.formats import one_by_one
from chalot.formats.checkpoint import Checkpoint, TensorInfo
from chalot.formats.files import open_inside, open_regular, quoted, read_at
from chalot.formats.gguf import config as gguf_config
from chalot.formats.gguf import experts as gguf_experts
from chalot.formats.gguf import tokenizer as gguf_tokenizer
from chalot.formats.gguf.blocks import READABLE, decode
from chalot.formats.gguf.header import Metadata, Stored, parse_header
from chalot.formats.gguf.names import COMPUTED, PERMUTED, SHIFTED, from_gguf, stored_rows

PIECE = 1 << 18  # weights decoded at a time
MAX_PARTS = 500  # each holds a file descriptor; 1,024 is a common limit
NUMBERS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}  # types of numbers, as others call them
STORED: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
}
PART_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")


class _Part:
    """One open GGUF file, its header checked."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        try:
            found = os.fstat(file.fileno())
            self.size, self.stamp = found.st_size, (found.st_size, found.st_mtime_ns)
            header = parse_header(self.read, self.size, path)
            self.metadata, self.tensors = Metadata(header.metadata, path), header.tensors
            self.number = self.metadata.integer("split.no", 0)
            self.count = self.metadata.integer("split.count", 1)
        except BaseException:
            file.close()
            raise

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes at `offset` of the file."""
        return read_at(self.file, self.path, offset, size)


class _Place(NamedTuple):
    """Where a tensor lies, and what is to be undone."""

    part: _Part
    stored: Stored
    head: int = 0  # rows of a head that are in interleaved order; 0: none are
    shifted: bool = False  # stored as 1 + w
    factor: str = ""  # GGUF's name of a number that all weights are multiplied with


def open_gguf(path: Path) -> Checkpoint:
    """The file with its matrices one by one. Raises as GgufFile."""
    file = GgufFile(path)
    try:
        return one_by_one.apart(file)
    except BaseException:
        file.close()
        raise


class GgufFile:
    """A `Checkpoint` (see formats/checkpoint.py) in a .gguf file and, if it is split, its siblings.

    Raises FormatError for a damaged file or a missing part, UnsupportedError for an architecture or
    a type that chalot does not know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts: list[_Part] = []
        try:
            self._open()
            self._stored = self._all_tensors()
            self._metadata = self._parts[0].metadata
            self.architecture = gguf_config.architecture_of(self._metadata)
            tensors = {name: stored for name, (_, stored) in self._stored.items()}
            self._config = gguf_config.make_config(self._metadata, tensors, self._whole)
            self._places = self._find_places()
        except BaseException:
            self.close()
            raise
        self._tensors = {
            name: TensorInfo(
                name,
                NUMBERS.get(place.stored.kind.name, place.stored.kind.name),
                place.stored.shape,
                place.stored.nbytes,
                place.stored.kind.scheme,
            )
            for name, place in self._places.items()
        }
        self._documents: dict[str, bytes] | None = None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by Hugging Face's name, or by GGUF's where that has none; read-only."""
        return MappingProxyType(self._tensors)

    def raw(self, name: str) -> NDArray[Any]:
        """The values of a tensor of numbers as the file stores them, a read-only copy.

        uint16 bits for bf16. Raises FormatError (no such tensor), UnsupportedError where weights
        are quantised, or others than the model's.
        """
        place = self._place(name)
        kind = self._tensors[name].dtype
        if kind not in STORED or place[2:] != (0, False, ""):
            raise UnsupportedError(
                f"{self.path}: tensor {quoted(name)} is {kind} in a form of its own; "
                "expected plain numbers: use float32"
            )
        content = place.part.read(place.stored.begin, place.stored.nbytes)
        return np.frombuffer(content, STORED[kind]).reshape(place.stored.shape)

    def float32(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """Rows `first:last` along the first axis as a new float32 array; only these are read.

        Of q and k in interleaved order, all rows of the heads that are met. Raises FormatError (no
        such tensor, file cut), and IndexError for missing rows.
        """
        place = self._place(name)
        rows = place.stored.shape[0]
        last = rows if last is None else last
        if not 0 <= first <= last <= rows:
            raise IndexError(f"{name}: rows {first}:{last} of {rows}")
        if place.head and last > first:
            wanted = stored_rows(np.arange(first, last, dtype=np.int64), place.head)
            begin = int(wanted.min())
            out = self._rows(place, begin, int(wanted.max()) + 1)[wanted - begin]
        else:
            out = self._rows(place, first, last)
        if place.shifted:
            np.subtract(out, np.float32(1), out=out)
        if place.factor:
            np.multiply(out, self._whole(place.factor), out=out)
        return out

    def document(self, name: str) -> bytes | None:
        """config.json, or what is made of the tokenizer's metadata; None for others.

        Raises TokenizerError, FormatError or UnsupportedError for a tokenizer that is not known.
        """
        if name == "config.json":
            return json.dumps(self._config, indent=1).encode()
        if self._documents is None:
            self._documents = gguf_tokenizer.documents(self._metadata)
        return self._documents.get(name)

    def check_unchanged(self) -> None:
        """Raise FormatError if a file changed size or date since it was opened."""
        for part in self._parts:
            found = None
            with suppress(OSError):
                status = part.path.stat()
                found = status.st_size, status.st_mtime_ns
            if found != part.stamp:
                raise FormatError(f"{part.path}: changed since it was opened; start again")

    def close(self) -> None:
        """Give back the files."""
        for part in self._parts:
            part.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- opening

    def _open(self) -> None:
        """Open the file that was named, and all parts of it, in order."""
        named = _Part(self.path, open_regular(self.path, self.path))
        self._parts.append(named)
        if named.count == 1 and named.number == 0:
            return
        pattern = PART_NAME.fullmatch(self.path.name)
        if not 1 <= named.count <= MAX_PARTS or not 0 <= named.number < named.count:
            raise FormatError(
                f"{self.path}: is part {named.number + 1} of {named.count}, expected at most "
                f"{MAX_PARTS} parts"
            )
        stem = f"{pattern[1]}-" if pattern else "NAME-"
        names = [f"{stem}{n + 1:05}-of-{named.count:05}.gguf" for n in range(named.count)]
        if self.path.name != names[named.number]:
            raise FormatError(
                f"{self.path}: is part {named.number + 1} of {named.count}, expected the name "
                f"{quoted(names[named.number])}, with the other parts beside it"
            )
        parts = []
        for number, name in enumerate(names):
            if number == named.number:
                parts.append(named)
                continue
            folder = self.path.parent
            if not (folder / name).exists():
                raise FormatError(
                    f"{folder / name}: is missing, one of the {named.count} parts of "
                    f"{self.path.name}; download it too"
                )
            part = _Part(folder / name, open_inside(folder, name))
            self._parts.append(part)
            if (part.number, part.count) != (number, named.count):
                raise FormatError(
                    f"{part.path}: is part {part.number + 1} of {part.count}, expected part "
                    f"{number + 1} of {named.count}; download the parts again"
                )
            parts.append(part)
        self._parts = parts

    def _all_tensors(self) -> dict[str, tuple[_Part, Stored]]:
        """Tensors of all parts by GGUF's name, each once."""
        found: dict[str, tuple[_Part, Stored]] = {}
        for part in self._parts:
            for name, stored in part.tensors.items():
                if name in found:
                    raise FormatError(
                        f"{part.path}: tensor {quoted(name)} is in {found[name][0].path.name} "
                        "too; expected it once"
                    )
                found[name] = part, stored
        promised = self._parts[0].metadata.integer("split.tensors.count", len(found))
        if promised != len(found):
            raise FormatError(
                f"{self.path}: found {len(found)} tensors in all parts, expected {promised}; "
                "download the parts again"
            )
        return found

    def _find_places(self) -> dict[str, _Place]:
        """Tensors by Hugging Face's names, with what is to be undone."""
        places: dict[str, _Place] = {}
        head = self._config["head_dim"]
        for name, (part, stored) in self._stored.items():
            at = f"{part.path}: tensor {quoted(name)}"
            scales = f"{name.removesuffix('.scale')}.weight" in self._stored
            if name in COMPUTED or (name.endswith(".scale") and scales and self._is_scale(name)):
                continue
            if stored.kind.decode is None:
                raise UnsupportedError(
                    f"{at} is {stored.kind.name}; chalot reads {', '.join(READABLE)}: take a file "
                    "of one of these types, or convert the original weights"
                )
            experts = dict(gguf_experts.one_by_one(name, stored, part.path))
            if experts:
                if experts.keys() & places.keys():
                    raise FormatError(f"{at} holds what another tensor holds; expected it once")
                places |= {theirs: _Place(part, each) for theirs, each in experts.items()}
                continue
            theirs = from_gguf(name, self.architecture) or name
            turned = self.architecture in PERMUTED and re.search(r"[qk]_proj\.", theirs)
            if turned and (head % 2 or stored.shape[0] % head):
                raise FormatError(f"{at} has {stored.shape[0]} rows, no whole heads of {head}")
            factor = f"{name.removesuffix('.weight')}.scale"
            places[theirs] = _Place(
                part,
                stored,
                head if turned else 0,
                self.architecture in SHIFTED and theirs.endswith("norm.weight"),
                factor if factor in self._stored and self._is_scale(factor) else "",
            )
        return places

    def _is_scale(self, name: str) -> bool:
        stored = self._stored[name][1]
        return self.architecture.startswith("bitnet") and (stored.kind.name, stored.shape) == (
            "F32",
            (1,),
        )

    # ---- reading

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise FormatError(f"{self.path}: has no tensor {quoted(name)}")
        return self._places[name]

    def _whole(self, name: str) -> NDArray[np.float32]:
        """All of a small tensor, by GGUF's name."""
        part, stored = self._stored[name]
        if stored.kind.decode is None:
            raise UnsupportedError(f"{part.path}: tensor {quoted(name)} is {stored.kind.name}")
        return self._rows(_Place(part, stored), 0, stored.shape[0])

    def _rows(self, place: _Place, first: int, last: int) -> NDArray[np.float32]:
        """Rows as they are stored. Blocks may go over the elements of a vector, not over rows."""
        stored = place.stored
        kind, shape = stored.kind, stored.shape
        weights = int(np.prod(shape[1:], dtype=np.int64)) if len(shape) > 1 else 1
        begin, end = first * weights // kind.weights, -(-last * weights // kind.weights)
        out = np.empty((end - begin) * kind.weights, np.float32)
        step = PIECE // kind.weights
        for at in range(begin, end, step):
            count = min(step, end - at)
            content = place.part.read(stored.begin + at * kind.nbytes, count * kind.nbytes)
            piece = decode(kind, np.frombuffer(content, np.uint8))
            out[(at - begin) * kind.weights :][: piece.size] = piece
        skipped = first * weights - begin * kind.weights
        return out[skipped : skipped + (last - first) * weights].reshape(last - first, *shape[1:])
