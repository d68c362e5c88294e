"""A Hugging Face folder seen through how its matrices are stored."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from chalot.errors import UnsupportedError
from chalot.formats.checkpoint import TensorInfo
from chalot.formats.files import quoted
from chalot.formats.safetensors import SafetensorsFolder


class FolderView:
    """What a `Checkpoint` over a folder is, but for `float32`, which its readers add."""

    def __init__(self, folder: SafetensorsFolder, tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self.path: Path = folder.path
        self._tensors = tensors

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor as it is computed with, by its name in numbers; read-only."""
        return MappingProxyType(self._tensors)

    def raw(self, name: str) -> NDArray[Any]:
        """See Checkpoint. Raises UnsupportedError for a matrix in codes: ask for `float32`."""
        if name in self._tensors and self._tensors[name].scheme:
            raise UnsupportedError(f"{self.path}: tensor {quoted(name)} is packed; read its floats")
        return self.folder.raw(name)

    def document(self, name: str) -> bytes | None:
        """See Checkpoint."""
        return self.folder.document(name)

    def check_unchanged(self) -> None:
        """See Checkpoint."""
        self.folder.check_unchanged()

    def close(self) -> None:
        """See Checkpoint."""
        self.folder.close()
