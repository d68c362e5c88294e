"""`.myai` version 3: kernel-ready bytes behind one manifest. Specified in docs/format.md.

    header (256 bytes) | extents, each at a multiple of 64 bytes | manifest (JSON)

An extent is touched only after it was checked against the file's length. If the file
is cut while it is mapped, the next read past its end kills the process: `check_length` is asked
before each step, and the race that remains is documented.
"""

import hashlib
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from chalot import machine
from chalot.errors import (
    ChalotError,
    ClosedError,
    FormatError,
    LimitError,
    SchemeError,
    UnsupportedError,
    WeightError,
    one_line,
    out_of_memory,
)
from chalot.formats.documents import parse_json
from chalot.formats.files import check_plain_name, quoted
from chalot.formats.myai.manifest import (
    HEADER,
    MAGIC,
    MAX_MANIFEST,
    VERSION,
    WHERE,
    Extent,
    Manifest,
    TensorEntry,
    header_bytes,
)
from chalot.quant.packing import ALIGNMENT, Layout, Matrix, stored_bytes
from chalot.quant.scheme import SCHEMES

READ = 1 << 26  # bytes at once
PRIVATE: dict[str, int] = (  # Windows has no flags, and all anonymous memory is private there
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)


class MyaiFile:
    """An opened file: its manifest, and its tensors as views of the mapping.

    If it is not `mapped`, of a copy in memory of its own, in huge pages where the system has them.
    What is elsewhere is read from the `other` file, which is opened with it and closed with it.
    """

    def __init__(self, path: Path, mapped: bool = True, follow: bool = True) -> None:
        """Raises FormatError for anything that is not a whole, consistent file.

        If it is not to `follow`, what is elsewhere cannot be read.
        """
        self.path = path
        self.mapped = mapped
        self.size = 0
        self.other: MyaiFile | None = None
        try:
            # without O_NONBLOCK, opening a named pipe would wait for its writer for ever
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:
            raise self._unusable(error) from None
        try:
            status = os.fstat(self.descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{path}: is not a regular file; expected a .myai file")
            self.size = status.st_size
            if self.size < HEADER:
                raise FormatError(
                    f"{path}: found {self.size} bytes, expected at least {HEADER}; truncated?"
                )
            if mapped:
                self.map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)
            else:
                self.map = self._copy()
            self.data: NDArray[np.uint8] = np.frombuffer(self.map, np.uint8)
            self.manifest, self.digest = self._manifest()
            self._check_extents()
            if follow:
                self.other = self._open_other()
        except BaseException as error:
            self.close()
            if isinstance(error, ChalotError) or not isinstance(error, (OSError, ValueError)):
                raise
            raise self._unusable(error) from None

    def _copy(self) -> mmap.mmap:
        free = machine.memory_available()
        if free is not None and self.size > free:
            raise LimitError(
                f"{self.path}: {self.size:,} bytes do not fit the {free:,} that are free; "
                "leave out --no-mmap, and it is read as it is needed"
            )
        memory = mmap.mmap(-1, self.size, **PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        with open(self.descriptor, "rb", buffering=0, closefd=False) as file:
            view = memoryview(memory)
            while view:
                done = file.readinto(view[:READ])
                if not done:
                    raise FormatError(f"{self.path}: was cut while it was read; start again")
                view = view[done:]
        return memory

    def _unusable(self, error: Exception) -> ChalotError:
        reason = getattr(error, "strerror", None) or error
        if out_of_memory(error):
            return LimitError(
                f"{self.path}: {self.size:,} bytes cannot be mapped ({reason}); "
                "raise the limits that `ulimit -v` and `ulimit -n` show"
            )
        return FormatError(f"{self.path}: cannot be opened ({reason}); expected a .myai file")

    def _manifest(self) -> tuple[Manifest, str]:
        magic, version = struct.unpack_from("<2I", self.map, 0)
        if magic != MAGIC:
            raise FormatError(
                f"{self.path}: begins with {magic:#x}; this is no .myai file, which begins with "
                f"{MAGIC:#x}; make one with chalot convert"
            )
        if version != VERSION:
            raise UnsupportedError(
                f"{self.path}: version {version} of the format; this chalot reads version {VERSION}"
            )
        offset, length, size, expected = WHERE.unpack_from(self.map, 64)
        if size != self.size:
            raise FormatError(
                f"{self.path}: found {self.size} bytes, expected {size}; copy or download it again"
            )
        if length > MAX_MANIFEST or offset < HEADER or offset + length != size:
            raise FormatError(
                f"{self.path}: a manifest of {length} bytes at {offset} does not end the file of "
                f"{size}; damaged download?"
            )
        raw = self.map[offset : offset + length]
        found = hashlib.sha256(raw).digest()
        if found != expected:
            raise FormatError(f"{self.path}: the manifest's checksum is wrong; damaged download?")
        parsed = parse_json(raw, f"{self.path}: manifest")  # strict where msgspec is not
        try:
            manifest = msgspec.convert(parsed, Manifest)
        except msgspec.ValidationError as error:
            raise FormatError(f"{self.path}: manifest: {one_line(error)}") from None
        if manifest.format != VERSION:
            raise FormatError(f"{self.path}: manifest of format {manifest.format} in version 3")
        try:
            agrees = self.map[:HEADER] == header_bytes(
                manifest.config, (offset, length, size, expected)
            )
        except (KeyError, TypeError, ValueError, OverflowError, struct.error):
            agrees = False
        if not agrees:
            raise FormatError(f"{self.path}: header and manifest disagree; damaged file?")
        return manifest, found.hex()

    def extents(self) -> Iterator[tuple[str, Extent]]:
        """Every extent once, with what it is called; of a shared one, the first name."""
        seen = set()
        for name, entry in self.manifest.tensors.items():
            if entry.extent not in seen:
                seen.add(entry.extent)
                yield name, entry.extent
        yield from self.manifest.documents.items()
        yield from self.manifest.constants.items()

    @cached_property
    def held(self) -> dict[tuple[str, int], int]:
        """Checksum and length of each extent in the file itself, and where it lies."""
        return {(e.sha256, e.bytes): e.offset for _, e in self.extents() if not e.elsewhere}

    @property
    def all_bytes(self) -> int:
        """Of the file, and of what it has elsewhere."""
        elsewhere = {e for _, e in self.extents() if e.elsewhere}
        return self.size + sum(e.bytes for e in elsewhere)

    def refuse_elsewhere(self, option: str) -> None:
        """Raise FormatError if not all bytes are in the file itself, as an option needs them."""
        if self.other is not None:
            raise FormatError(
                f"{self.path}: has bytes in {self.other.path.name}, {option} needs all in one "
                f"file; chalot convert {self.path} -o OUT makes such a file"
            )

    def _open_other(self) -> "MyaiFile | None":
        wanted = {e: name for name, e in self.extents() if e.elsewhere}
        name = self.manifest.other
        if any(e.offset for e in wanted):
            raise FormatError(f"{self.path}: extents elsewhere have offsets; damaged file?")
        if not wanted and not name:
            return None
        if not wanted:
            raise FormatError(f"{self.path}: has nothing in {quoted(name)}; damaged file?")
        check_plain_name(name, self.path)
        real = Path(os.path.realpath(self.path))  # it may be a link
        places = dict.fromkeys(folder / name for folder in (self.path.parent, real.parent))
        errors: list[ChalotError] = []
        for place in places:
            try:
                return self._other_at(place, wanted)
            except ChalotError as error:
                errors.append(error)
        raise errors[0]

    def _other_at(self, place: Path, wanted: dict[Extent, str]) -> "MyaiFile":
        try:
            other = MyaiFile(place, self.mapped, follow=False)
        except ChalotError as error:
            count = sum(e.bytes for e in wanted)
            raise type(error)(
                f"{self.path}: has {count:,} bytes in {place.name}, which must lie beside it: "
                f"{error}"
            ) from None
        lost = [what for e, what in wanted.items() if (e.sha256, e.bytes) not in other.held]
        if lost:
            other.close()
            raise FormatError(
                f"{self.path}: {quoted(lost[0])} is not in {place} any more; bring back the file "
                "that was there, or convert again"
            )
        return other

    @property
    def aliases(self) -> dict[str, str]:
        """The tensors that lie in another one's extent -> the first name of that extent."""
        first: dict[tuple[Extent, str, tuple[int, ...]], str] = {}
        entries = self.manifest.tensors.items()
        found = {n: first.setdefault((e.extent, e.scheme, e.shape), n) for n, e in entries}
        return {name: of for name, of in found.items() if name != of}

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors, each extent counted once."""
        entries = self.manifest.tensors.values()
        held = {e.extent: prod(e.shape) for e in entries}
        return sum(e.bytes for e in held) * 8 / sum(held.values())

    def _check_extents(self) -> None:
        end_of_last = HEADER
        manifest_at = WHERE.unpack_from(self.map, 64)[0]
        for name, e in self._in_order():
            if e.bytes < 0 or e.offset < end_of_last or e.offset % ALIGNMENT:
                raise FormatError(
                    f"{self.path}: extent of {quoted(name)} overlaps or is misaligned"
                )
            if e.offset - end_of_last >= ALIGNMENT:
                raise FormatError(
                    f"{self.path}: {e.offset - end_of_last} bytes before {quoted(name)} belong to "
                    f"nothing, expected fewer than {ALIGNMENT}"
                )
            end_of_last = e.offset + e.bytes
            if end_of_last > manifest_at:
                raise FormatError(
                    f"{self.path}: extent of {quoted(name)} ends at {end_of_last}, "
                    f"payload ends at {manifest_at}; damaged file?"
                )
        if manifest_at - end_of_last >= ALIGNMENT:
            raise FormatError(f"{self.path}: bytes before the manifest belong to nothing")
        first: dict[Extent, tuple[str, TensorEntry]] = {}
        for name, entry in self.manifest.tensors.items():
            of, same = first.setdefault(entry.extent, (name, entry))
            alike = (same.scheme, same.shape) == (entry.scheme, entry.shape)
            if not alike and not entry.extent.elsewhere:  # there equal bytes are one extent
                raise FormatError(
                    f"{self.path}: tensor {quoted(name)} shares the extent of {quoted(of)}, which "
                    "has another scheme or shape; damaged file?"
                )
            self._check_entry(name, entry)

    def _check_entry(self, name: str, entry: TensorEntry) -> None:
        where = f"{self.path}: tensor {quoted(name)}"
        if entry.scheme not in SCHEMES:
            raise SchemeError(f"{where} has scheme {quoted(entry.scheme)}; a newer chalot's file?")
        if not 1 <= len(entry.shape) <= 2 or any(not 1 <= n <= 1 << 28 for n in entry.shape):
            raise FormatError(
                f"{where} has shape {quoted(str(entry.shape[:4]))}; "
                "expected one or two dimensions of 1 to 2^28"
            )
        if entry.activation not in (8, 16):
            raise FormatError(f"{where} asks for {entry.activation}-bit activations; 8 or 16")
        if len(entry.shape) == 1:
            expected = entry.shape[0] * 4 if entry.scheme == "f32" else -1
        else:
            expected = stored_bytes(SCHEMES[entry.scheme], *entry.shape)
        if entry.extent.bytes != expected:
            raise FormatError(
                f"{where}: found {entry.extent.bytes} bytes, expected {expected} "
                f"for {entry.scheme} of shape {entry.shape}"
            )

    def _in_order(self) -> list[tuple[str, Extent]]:
        here = (item for item in self.extents() if not item[1].elsewhere)
        return sorted(here, key=lambda item: item[1].offset)

    def home(self, extent: Extent) -> tuple["MyaiFile", int]:
        """The file that holds an extent, and where it begins there."""
        if not extent.elsewhere:
            return self, extent.offset
        assert self.other is not None
        return self.other, self.other.held[extent.sha256, extent.bytes]

    def view(self, extent: Extent) -> NDArray[np.uint8]:
        """The bytes of an extent, mapped."""
        file, at = self.home(extent)
        return file.data[at : at + extent.bytes]

    def document(self, name: str) -> bytes | None:
        """A document ("tokenizer.json", ...) as it came with the source."""
        extent = self.manifest.documents.get(name)
        return None if extent is None else self.view(extent).tobytes()

    def constant(self, name: str, dtype: str, count: int) -> NDArray[Any]:
        """A table of numbers. Raises FormatError for another length, WeightError for NaN or Inf."""
        extent = self.manifest.constants.get(name)
        if extent is None or extent.bytes != np.dtype(dtype).itemsize * count:
            raise FormatError(f"{self.path}: constant {name} is missing or has a wrong length")
        found = self.view(extent).view(dtype)
        if not np.isfinite(found).all():
            raise WeightError(f"{self.path}: constant {name} has numbers that are NaN or Inf")
        return found

    def matrix(self, name: str) -> Matrix:
        """A matrix as kernels read it: no copy. Raises WeightError for NaN or Inf scales."""
        entry = self.manifest.tensors[name]
        scheme, data = SCHEMES[entry.scheme], self.view(entry.extent)
        shape = (entry.shape[0], entry.shape[1])
        if not scheme.is_coded:
            return Matrix(scheme, shape, data)
        layout = Layout(scheme, *shape)
        factors, *of_rows = layout.parts[1:]
        for scales in (data[factors].view("<f2"), *(data[part].view("<f4") for part in of_rows)):
            if not np.isfinite(scales).all():
                raise WeightError(f"{self.path}: tensor {name} has scales that are NaN or Inf")
        tables = None
        if scheme.has_levels:
            tables = self.constant(f"tables.{scheme}", "i1", 4096).reshape(256, 16)
        return Matrix(scheme, shape, data, tables)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A vector of float32. Raises WeightError for NaN or Inf."""
        values = self.view(self.manifest.tensors[name].extent).view("<f4")
        if not np.isfinite(values).all():
            raise WeightError(f"{self.path}: tensor {name} has numbers that are NaN or Inf")
        return values

    def check_length(self) -> None:
        """Raise FormatError if the file was cut since it was opened, ClosedError if closed."""
        if self.descriptor < 0:
            raise ClosedError("the model is closed; load it again")
        size = os.fstat(self.descriptor).st_size if self.mapped else self.size
        if size < self.size:
            raise FormatError(
                f"{self.path}: was cut from {self.size} to {size} bytes while in use; restore it"
            )
        if self.other is not None:
            self.other.check_length()

    def pieces(self, extent: Extent, size: int = 1 << 24) -> Iterator[NDArray[np.uint8]]:
        """An extent, `size` bytes at a time; before each, the file's length is looked at."""
        for at in range(0, extent.bytes, size):
            self.check_length()
            yield self.view(extent)[at : at + size]

    def is_whole(self, extent: Extent, progress: Callable[[int], None] = lambda _: None) -> bool:
        """Whether an extent has the checksum that it should. `progress` is told bytes as read."""
        digest = hashlib.sha256()
        for piece in self.pieces(extent):
            digest.update(piece.data)
            progress(len(piece))
        return digest.hexdigest() == extent.sha256

    def gaps(self) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """(what follows, the fill before it) wherever there is fill; its bytes should be zero."""
        end = HEADER
        last = ("the manifest", Extent(WHERE.unpack_from(self.map, 64)[0], 0, ""))
        for name, e in [*self._in_order(), last]:
            if e.offset > end:
                yield name, self.data[end : e.offset]
            end = e.offset + e.bytes

    def close(self) -> None:
        """Give back the file. The mapping goes when nothing reads it any more."""
        if self.other is not None:
            self.other.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
