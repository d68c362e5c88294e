"""What copies and slices share: a dense checkpoint seen as another one, read when asked for."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.formats.checkpoint import Checkpoint, TensorInfo
from chalot.formats.floats import STORED
from chalot.formats.view import CheckpointView

Floats = NDArray[np.float32]
PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def dense_name(layer: int, part: str) -> str:
    """A dense checkpoint's name of "gate", "up" or "down"."""
    return f"model.layers.{layer}.mlp.{PARTS[part]}.weight"


def numbers(name: str, shape: tuple[int, ...], dtype: str = "f32") -> TensorInfo:
    """A tensor that is made up, or changed, as it is read; of f32 where the type has codes."""
    dtype = dtype if dtype in STORED else "f32"
    return TensorInfo(name, dtype, shape, STORED[dtype].itemsize * int(np.prod(shape)))


class View(CheckpointView):
    """A `Checkpoint` (see formats/checkpoint.py) over another one; it closes that one with itself.

    Tensors that it does not know pass through under their own names.
    """

    def __init__(self, source: Checkpoint, config: bytes) -> None:
        self.infos: dict[str, TensorInfo] = {}
        super().__init__(source, self.infos)
        self.config = config
        self.aliases: dict[str, str] = {}  # tensors that are another one

    def raw(self, name: str) -> NDArray[Any]:
        """As `float32`: what is seen need not be stored anywhere."""
        return self.float32(name)

    def float32(self, name: str, first: int = 0, last: int | None = None) -> Floats:
        """Rows `first:last` as float32. Raises FormatError, and IndexError for missing rows."""
        last = self.end(name, first, last)
        return self.rows(self.aliases.get(name, name), first, last)

    def rows(self, name: str, first: int, last: int) -> Floats:
        """Rows of a tensor that is there."""
        return self.held.float32(name, first, last)

    def document(self, name: str) -> bytes | None:
        """A document of the source; config.json is the view's own."""
        return self.config if name == "config.json" else self.held.document(name)
