"""Writes a `.myai` file extent by extent, whole or not at all (new_file.py)."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

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
from chalot.formats.new_file import NewFile
from chalot.quant.packing import ALIGNMENT


class MyaiWriter(NewFile):
    """Collects extents; `finish` makes the file appear. Leaving the block without it drops all."""

    def __init__(self, path: Path) -> None:
        """Raises OutputError if the place cannot be written or another process is writing it."""
        self.tensors: dict[str, TensorEntry] = {}
        self.documents: dict[str, Extent] = {}
        self.constants: dict[str, Extent] = {}
        super().__init__(path, MAGIC.to_bytes(4, "little"), ".myai", HEADER)

    def extent(self, pieces: Iterable[bytes | NDArray[Any]]) -> Extent:
        """Append an aligned extent from its pieces in order."""
        self.align(ALIGNMENT)
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
        manifest = Manifest(
            VERSION, dict(config), source, self.tensors, self.documents, self.constants
        )
        raw = msgspec.json.encode(manifest)
        self.align(ALIGNMENT)
        where = (self.at, len(raw), self.at + len(raw), hashlib.sha256(raw).digest())
        self.write(raw)
        self.commit(header_bytes(dict(config), where), check)
