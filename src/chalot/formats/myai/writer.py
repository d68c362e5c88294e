"""Writes a `.myai` file extent by extent, whole or not at all (new_file.py).

What an interruption leaves behind has a journal (journal.py) of the tensors that are whole. Who
makes the same again is given those, each after its bytes were compared with their digest.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from chalot.errors import LimitError, OutputError
from chalot.formats.journal import Finished, Journal
from chalot.formats.myai import MyaiFile
from chalot.formats.myai.manifest import (
    HEADER,
    MAGIC,
    VERSION,
    Extent,
    Manifest,
    Source,
    TensorEntry,
    header_bytes,
)
from chalot.formats.new_file import NewFile
from chalot.quant.packing import ALIGNMENT

WORTH = 1 << 24  # bytes: fewer are made again in a second or two
PIECE = 1 << 22  # bytes of one read
SHARED = 1 << 12  # bytes: fewer are not worth another file
KEPT_AFTER = (KeyboardInterrupt, OutputError, LimitError)  # none says that the source is bad


class MyaiWriter(NewFile):
    """Collects extents; `finish` makes the file appear. Leaving the block without it drops all.

    Not where it would be a loss: an interruption, a full disk or too little memory leave more than
    WORTH bytes for who goes on, and the error has a note that says so. So does a kill, any number.
    """

    def __init__(self, path: Path, making: str = "", share: MyaiFile | None = None) -> None:
        """`making` says all but the weights that decides the file's bytes; "" keeps nothing.

        What the file `share` holds, which is to lie beside this one, is not written again.
        Raises OutputError if the place cannot be written or another process is writing it.
        """
        self.tensors: dict[str, TensorEntry] = {}
        self.documents: dict[str, Extent] = {}
        self.constants: dict[str, Extent] = {}
        self.journal: Journal | None = None
        self.kept = 0  # tensors that were there
        self.share = share
        magic = MAGIC.to_bytes(4, "little")
        super().__init__(path, magic, ".myai", HEADER, anew=not making)
        if making:
            try:
                self.journal = Journal(self.partial.with_suffix(".journal"), making)
            except OSError as error:
                self.__exit__()
                raise self.failed(error) from None

    @property
    def left(self) -> Finished | None:
        """What may come next of what is there."""
        return self.journal.left[-1][0] if self.journal and self.journal.left else None

    def take(self, name: str, made_of: str) -> Finished | None:
        """The tensor that is there, if it comes next, is made of the same, and is undamaged."""
        found = self.left
        if found is None or (found.name, found.made_of) != (name, made_of):
            return None
        assert self.journal is not None
        extent = found.entry.extent
        if not extent.elsewhere:
            start = self.at + -self.at % ALIGNMENT
            if extent != Extent(start, extent.bytes, self._digest(start, extent.bytes)):
                return None
            self.align(ALIGNMENT)
            self.at = start + extent.bytes
        elif not self._is_elsewhere(extent):
            return None
        self.tensors[name] = found.entry
        self.journal.take()
        self.kept += 1
        return found

    def _digest(self, start: int, count: int) -> str:
        """The SHA-256 of bytes that are there, "" if they are not."""
        digest = hashlib.sha256()
        for at in range(start, start + count, PIECE):
            piece = os.pread(self.descriptor, min(PIECE, start + count - at), at)
            if not piece:  # the file ends before, however much the journal says
                return ""
            digest.update(piece)
        return digest.hexdigest()

    def _is_elsewhere(self, extent: Extent) -> bool:
        """Whether the other file has it, undamaged."""
        if self.share is None or extent.bytes < SHARED:
            return False
        at = self.share.held.get((extent.sha256, extent.bytes))
        return at is not None and self.share.is_whole(Extent(at, extent.bytes, extent.sha256))

    def finished(self, finished: Finished) -> None:
        """Note that a tensor is whole."""
        if self.journal is not None:
            try:
                self.journal.add(finished)
            except OSError as error:
                raise self.failed(error) from None

    def notes(self) -> list[str]:
        """A line on what was there, if anything was; another on what is elsewhere."""
        found = self.journal.found if self.journal else 0
        others = "; the others are damaged, or of another source, setting or version"
        said = f"{self.kept} of {found} tensors that an interrupted conversion finished were kept"
        out = [said + others * (self.kept < found)] if found else []
        if self.share is not None:
            name, count = self.share.path.name, self.elsewhere
            taken = f"{count:,} bytes are in {name}, which has to stay beside it"
            out.append(taken if count else f"{name} has nothing of it; it stands alone")
        return out

    def extent(self, pieces: Iterable[bytes | NDArray[Any]]) -> Extent:
        """Append an aligned extent from its pieces in order."""
        self.align(ALIGNMENT)
        start, digest = self.at, hashlib.sha256()
        for piece in pieces:
            contiguous = piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).data
            digest.update(contiguous)
            self.write(contiguous)
        extent = Extent(start, self.at - start, digest.hexdigest())
        if not self._is_elsewhere(extent):
            return extent
        self.at = start  # what comes next is written over it
        return Extent(0, extent.bytes, extent.sha256, elsewhere=True)

    @property
    def elsewhere(self) -> int:
        """Bytes that the other file has, each once."""
        parts = (self.documents.values(), self.constants.values())
        extents = chain((entry.extent for entry in self.tensors.values()), *parts)
        return sum(e.bytes for e in {e for e in extents if e.elsewhere})

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

    def alias(self, name: str, of: str, activation: int = 8) -> None:
        """Give a tensor the extent of another one, which holds the same weights."""
        self.tensors[name] = msgspec.structs.replace(self.tensors[of], activation=activation)

    def note_error(self, name: str, error: float) -> None:
        """Say what storing a tensor cost: its relative squared error."""
        self.tensors[name] = msgspec.structs.replace(self.tensors[name], error=error)

    def finish(
        self, config: Mapping[str, Any], source: Source, check: Callable[[Path], None]
    ) -> None:
        """Write manifest and header, sync, let `check` look at the partial file, and rename."""
        other = self.share.path.name if self.share is not None and self.elsewhere else ""
        manifest = Manifest(
            VERSION, dict(config), source, self.tensors, self.documents, self.constants, other
        )
        raw = msgspec.json.encode(manifest)
        self.align(ALIGNMENT)
        where = (self.at, len(raw), self.at + len(raw), hashlib.sha256(raw).digest())
        self.write(raw)

        def last(partial: Path) -> None:
            check(partial)
            if self.journal is not None:
                self.journal.remove()

        self.commit(header_bytes(dict(config), where), last)

    def __exit__(self, _: object = None, error: object = None, *__: object) -> None:
        if self.journal is not None and self.descriptor >= 0:
            if isinstance(error, KEPT_AFTER) and self.journal.lines and self.at >= WORTH:
                error.add_note(
                    f"{self.journal.lines} finished tensors are kept in {self.partial}: the same "
                    "command goes on from there; or remove that file"
                )
                self.journal.close()
                os.close(self.descriptor)
                self.descriptor = -1
            self.journal.remove()
        super().__exit__()
