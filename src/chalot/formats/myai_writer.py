"""Writes a `.myai` file extent by extent, whole or not at all, by one process at a time.

The bytes go to `.NAME.partial` beside the target, under an advisory lock that dies with its
process; at the end they are synced and renamed. A killed conversion leaves the partial file, which
the next one writes over.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from chalot.errors import OutputError
from chalot.formats.files import remedy
from chalot.formats.myai import (
    HEADER,
    MAGIC,
    VERSION,
    Extent,
    Manifest,
    Source,
    TensorEntry,
    header_bytes,
)
from chalot.quant.packing import ALIGNMENT

try:
    import fcntl
except ImportError:  # Windows: no lock, the last writer wins
    fcntl = None  # type: ignore[assignment]


def is_other_file(path: Path) -> bool:
    """Whether `path` holds something that is no `.myai` file: the source's own weights, say."""
    if not path.exists():
        return False
    if not path.is_file():
        return True
    with path.open("rb") as file:
        begin = file.read(4)
    return begin not in (b"", MAGIC.to_bytes(4, "little"))


class MyaiWriter:
    """Collects extents; `finish` makes the file appear. Leaving the block without it drops all."""

    def __init__(self, path: Path) -> None:
        """Raises OutputError if the place cannot be written or another process is writing it."""
        self.path = path
        self.tensors: dict[str, TensorEntry] = {}
        self.documents: dict[str, Extent] = {}
        self.constants: dict[str, Extent] = {}
        self.at = HEADER
        try:
            if path.is_dir():
                raise OutputError(f"{path}: is a directory; expected a file name like model.myai")
            if is_other_file(path):
                raise OutputError(
                    f"{path}: is there, and is no .myai file; choose another name, or remove it"
                )
            self.partial = path.with_name(f".{path.name}.partial")
            # a link that someone planted there is not followed
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            self.descriptor = os.open(self.partial, flags, 0o644)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise self.failed(error) from None
        self._lock()
        try:
            os.ftruncate(self.descriptor, 0)
            os.lseek(self.descriptor, HEADER, os.SEEK_SET)
        except OSError as error:
            self.__exit__()
            raise self.failed(error) from None

    def _lock(self) -> None:
        if fcntl is None:
            return
        busy = OutputError(
            f"{self.path}: another conversion is writing it; wait for it, or choose another name"
        )
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.descriptor)
            raise busy from None
        # another process may have finished, and renamed this very file, before the lock was ours
        try:
            same = os.path.samestat(self.partial.stat(), os.fstat(self.descriptor))
        except OSError:
            same = False
        if not same:
            os.close(self.descriptor)
            raise busy

    def failed(self, error: Exception) -> OutputError:
        """The error a user sees when the system refuses to write."""
        reason = getattr(error, "strerror", None) or str(error)
        return OutputError(
            f"{self.path}: cannot be written ({reason}); nothing was left under that name. "
            f"{remedy(error, self.path)}"
        )

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        try:
            while view:
                done = os.write(self.descriptor, view[: 1 << 26])
                view = view[done:]
                self.at += done
        except OSError as error:
            raise self.failed(error) from None

    def extent(self, pieces: Iterable[bytes | NDArray[Any]]) -> Extent:
        """Append an aligned extent from its pieces in order."""
        self.write(b"\0" * (-self.at % ALIGNMENT))
        start, digest = self.at, hashlib.sha256()
        for piece in pieces:
            contiguous = piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).data
            digest.update(contiguous)
            self.write(contiguous)
        return Extent(start, self.at - start, digest.hexdigest())

    def tensor(
        self,
        name: str,
        scheme: str,
        shape: tuple[int, ...],
        pieces: Iterable[bytes | NDArray[Any]],
        activation: int = 8,
    ) -> None:
        """Append a tensor's extent."""
        extent = self.extent(pieces)
        self.tensors[name] = TensorEntry(scheme, shape, extent, activation)

    def note_error(self, name: str, error: float) -> None:
        """Say what storing a tensor cost: its relative squared error."""
        self.tensors[name] = msgspec.structs.replace(self.tensors[name], error=error)

    def finish(
        self, config: Mapping[str, Any], source: Source, check: Callable[[Path], None]
    ) -> None:
        """Write manifest and header, sync, let `check` look at the partial file, and rename."""
        manifest = Manifest(
            VERSION, dict(config), source, self.tensors, self.documents, self.constants
        )
        raw = msgspec.json.encode(manifest)
        self.write(b"\0" * (-self.at % ALIGNMENT))
        where = (self.at, len(raw), self.at + len(raw), hashlib.sha256(raw).digest())
        self.write(raw)
        try:
            os.pwrite(self.descriptor, header_bytes(dict(config), where), 0)
            os.fsync(self.descriptor)
        except OSError as error:
            raise self.failed(error) from None
        check(self.partial)
        try:
            self.partial.replace(self.path)
        except OSError as error:
            raise self.failed(error) from None
        os.close(self.descriptor)
        self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor >= 0:  # not finished: leave nothing
            with suppress(OSError):
                self.partial.unlink()
            os.close(self.descriptor)
            self.descriptor = -1
