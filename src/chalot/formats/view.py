"""What checkpoints that are seen as other ones share: what is not changed passes through."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from chalot.errors import FormatError
from chalot.formats.checkpoint import Checkpoint, TensorInfo
from chalot.formats.files import quoted


class CheckpointView:
    """A `Checkpoint` over `held`, which it closes with itself, but for `raw` and `float32`."""

    def __init__(self, held: Checkpoint, infos: Mapping[str, TensorInfo]) -> None:
        self.held = held
        self.path: Path = held.path
        self.infos = infos

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor as it is seen, by its name; read-only."""
        return MappingProxyType(self.infos)

    def end(self, name: str, first: int, last: int | None) -> int:
        """The row behind rows `first:last`. Raises FormatError, and IndexError for missing rows."""
        if name not in self.infos:
            raise FormatError(f"{self.path}: has no tensor {quoted(name)}")
        rows = self.infos[name].shape[0]
        last = rows if last is None else last
        if not 0 <= first <= last <= rows:
            raise IndexError(f"{name}: rows {first}:{last} of {rows}")
        return last

    def document(self, name: str) -> bytes | None:
        """See Checkpoint."""
        return self.held.document(name)

    def check_unchanged(self) -> None:
        """See Checkpoint."""
        self.held.check_unchanged()

    def close(self) -> None:
        """See Checkpoint."""
        self.held.close()
