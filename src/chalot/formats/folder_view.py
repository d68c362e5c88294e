"""A Hugging Face folder seen through how its matrices are stored."""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from chalot.errors import UnsupportedError
from chalot.formats.checkpoint import TensorInfo
from chalot.formats.files import quoted
from chalot.formats.safetensors import SafetensorsFolder
from chalot.formats.view import CheckpointView


class FolderView(CheckpointView):
    """A view of a folder whose matrices may be in codes; its readers add `float32`."""

    def __init__(self, folder: SafetensorsFolder, infos: Mapping[str, TensorInfo]) -> None:
        super().__init__(folder, infos)
        self.folder = folder

    def raw(self, name: str) -> NDArray[Any]:
        """See Checkpoint. Raises UnsupportedError for a matrix in codes: ask for `float32`."""
        if name in self.infos and self.infos[name].scheme:
            raise UnsupportedError(f"{self.path}: tensor {quoted(name)} is packed; read its floats")
        return self.folder.raw(name)
