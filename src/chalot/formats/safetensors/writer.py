"""Writes safetensors: a folder of one file, or of several with an index; whole or not at all.

    length of the header u64 | header, JSON, padded to 8 | payload

Types and shapes are known before the first weight is, so each file's header goes first and all that
follows once, in order. https://github.com/huggingface/safetensors, README, "Format"; the index is
transformers' model.safetensors.index.json: {"metadata": {"total_size"}, "weight_map"}.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from numpy.typing import NDArray

from chalot.formats.files import quoted
from chalot.formats.floats import STORED
from chalot.formats.new_file import NewFile, NewFolder
from chalot.formats.safetensors.header import INDEX

FORMAT = MappingProxyType({"format": "pt"})  # transformers looks for it
FULL = 5_000_000_000  # bytes of a file's tensors; one that is larger has a file of its own


class TensorPlan(NamedTuple):
    """A tensor to come; `dtype` is one of STORED's."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * STORED[self.dtype].itemsize


def header(tensors: Sequence[TensorPlan], metadata: Mapping[str, str] = FORMAT) -> bytes:
    """Everything before the payload. Raises ValueError for a name that is there twice."""
    out: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        if tensor.name in out:
            raise ValueError(f"tensor {quoted(tensor.name)} is given twice")
        begin, end = end, end + tensor.nbytes
        out[tensor.name] = {
            "dtype": tensor.dtype.upper(),
            "shape": [*map(int, tensor.shape)],
            "data_offsets": (begin, end),
        }
    text = json.dumps(out, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shared_out(tensors: Sequence[TensorPlan], full: int) -> list[list[TensorPlan]]:
    """Tensors by file, in order, the widest type of a file first: so all are aligned."""
    files: list[list[TensorPlan]] = [[]]
    room = full
    for tensor in tensors:
        if tensor.nbytes > room and files[-1]:
            files.append([])
            room = full
        files[-1].append(tensor)
        room -= tensor.nbytes
    return [sorted(file, key=lambda t: -STORED[t.dtype].itemsize) for file in files]


class SafetensorsWriter(NewFolder):
    """Takes the tensors of `order`, then documents; `commit` makes the folder appear."""

    def __init__(self, path: Path, tensors: Sequence[TensorPlan], full: int = FULL) -> None:
        """Files take some `full` bytes each. Raises OutputError."""
        self.files = shared_out(tensors, full)
        self.order = [tensor for file in self.files for tensor in file]
        self.current: NewFile | None = None
        self.coming: list[tuple[str, list[TensorPlan]]] = []
        super().__init__(path)
        count = len(self.files)
        for number, file in enumerate(self.files):
            name = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self.coming.append((name if count > 1 else "model.safetensors", list(file)))
        self.index = {
            "metadata": {"total_size": sum(t.nbytes for t in self.order)},
            "weight_map": {t.name: name for name, file in self.coming for t in file},
        }

    def tensor(self, plan: TensorPlan, pieces: Iterable[NDArray[Any]]) -> None:
        """Append the next tensor's stored numbers from pieces in order."""
        name, left = self.coming[0]
        if self.current is None:
            self.current = self.file(name)
            self.current.write(header(left))
        end = self.current.at + plan.nbytes
        for piece in pieces:
            self.current.write(piece)
        if left.pop(0) != plan or self.current.at != end:
            raise ValueError(f"{plan}: is out of order, or has another size than announced")
        if not left:
            self.current.commit()
            self.current = None
            self.coming.pop(0)

    def document(self, name: str, content: bytes) -> None:
        """A small file."""
        with self.file(name) as file:
            file.write(content)
            file.commit()

    def commit(self) -> None:
        """Write the index of several files, sync, and rename to the folder's own name."""
        if self.coming:
            raise ValueError(f"{self.coming[0][1][0]}: is still to come")
        if len(self.files) > 1:
            self.document(INDEX, json.dumps(self.index, indent=1).encode())
        super().commit()

    def __exit__(self, *_: object) -> None:
        if self.current is not None:
            self.current.__exit__()
        super().__exit__()
