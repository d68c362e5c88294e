"""What the rest of the package knows of a checkpoint: names, shapes, floats, small documents.

A reader of another format implements `Checkpoint` and adds one line to `open_checkpoint`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError


class TensorInfo(NamedTuple):
    """A tensor as its file's header describes it. `dtype` is "bf16", "f16" or "f32"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Checkpoint(Protocol):
    """A model's weights and documents, opened and checked; read when asked for."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint by its own name."""

    def raw(self, name: str) -> NDArray[Any]:
        """Stored values as a mapped, read-only view: uint16 bits for bf16, else floats."""

    def float32(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """Rows `first:last` of a tensor as float32. Raises FormatError if the name is not there."""

    def document(self, name: str) -> bytes | None:
        """A small file of the checkpoint ("config.json", "tokenizer.json", ...), if there."""

    def check_unchanged(self) -> None:
        """Raise FormatError if a file changed size or date since it was opened."""

    def close(self) -> None:
        """Give back file handles and mappings."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint on disk. Raises FormatError when `path` holds none that is known."""
    from chalot.formats.safetensors import SafetensorsFolder

    if path.is_dir():
        return SafetensorsFolder(path)
    found = "a file" if path.exists() else "nothing"
    raise FormatError(
        f"{path}: found {found}, expected a Hugging Face folder with config.json and *.safetensors"
    )
