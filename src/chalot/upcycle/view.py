"""What copies and slices share: a dense checkpoint seen as another one, read when asked for."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError
from chalot.formats.checkpoint import Checkpoint, TensorInfo
from chalot.formats.files import quoted
from chalot.formats.floats import STORED

Floats = NDArray[np.float32]
PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def dense_name(layer: int, part: str) -> str:
    """A dense checkpoint's name of "gate", "up" or "down"."""
    return f"model.layers.{layer}.mlp.{PARTS[part]}.weight"


def numbers(name: str, shape: tuple[int, ...], dtype: str = "f32") -> TensorInfo:
    """A tensor that is made up, or changed, as it is read; of f32 where the type has codes."""
    dtype = dtype if dtype in STORED else "f32"
    return TensorInfo(name, dtype, shape, STORED[dtype].itemsize * int(np.prod(shape)))


class View:
    """A `Checkpoint` (see formats/checkpoint.py) over another one; it closes that one with itself.

    Tensors that it does not know pass through under their own names.
    """

    def __init__(self, source: Checkpoint, config: bytes) -> None:
        self.source = source
        self.path: Path = source.path
        self.config = config
        self.infos: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}  # tensors that are another one

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name; read-only."""
        return MappingProxyType(self.infos)

    def raw(self, name: str) -> NDArray[Any]:
        """As `float32`: what is seen need not be stored anywhere."""
        return self.float32(name)

    def float32(self, name: str, first: int = 0, last: int | None = None) -> Floats:
        """Rows `first:last` as float32. Raises FormatError, and IndexError for missing rows."""
        info = self.infos.get(name)
        if info is None:
            raise FormatError(f"{self.path}: has no tensor {quoted(name)}")
        last = info.shape[0] if last is None else last
        if not 0 <= first <= last <= info.shape[0]:
            raise IndexError(f"{name}: rows {first}:{last} of {info.shape[0]}")
        return self.rows(self.aliases.get(name, name), first, last)

    def rows(self, name: str, first: int, last: int) -> Floats:
        """Rows of a tensor that is there."""
        return self.source.float32(name, first, last)

    def document(self, name: str) -> bytes | None:
        """A document of the source; config.json is the view's own."""
        return self.config if name == "config.json" else self.source.document(name)

    def check_unchanged(self) -> None:
        """Raise FormatError if the source changed since it was opened."""
        self.source.check_unchanged()

    def close(self) -> None:
        """Give back the source's files."""
        self.source.close()
