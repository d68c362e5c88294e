"""Writes a GGUF file, version 3, tensor by tensor, whole or not at all (new_file.py).

    "GGUF" | 3 u32 | tensors u64 | pairs u64 | pairs | tensor infos | padding | payload

Types and shapes are known before the first weight is, so the header goes first and everything
after it once, in order. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError
from chalot.formats.files import quoted
from chalot.formats.gguf.blocks import BlockType
from chalot.formats.new_file import NewFile

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # value types
NUMBERS = {np.dtype("<i4"): I32, np.dtype("<f4"): F32}
Value = str | bool | int | float | list[str] | NDArray[Any]


class TensorPlan(NamedTuple):
    """A tensor to come: GGUF's name and type, and its shape with rows first."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks."""
        return math.prod(self.shape) // self.kind.weights * self.kind.nbytes

    @property
    def padded(self) -> int:
        """Bytes up to where the next tensor begins."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


def header(metadata: Mapping[str, Value], tensors: Sequence[TensorPlan]) -> bytes:
    """Everything before the payload, padded. Raises FormatError for text that is not Unicode."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        try:
            parts += (_text(key), _value(value))
        except UnicodeEncodeError:
            raise FormatError(
                f"metadata {quoted(key)} holds half a surrogate pair, which no UTF-8 has; take it "
                "out of the source's documents"
            ) from None
    at = 0
    for tensor in tensors:
        sizes = tuple(reversed(tensor.shape))
        parts.append(_text(tensor.name))
        parts.append(struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor.kind.number, at))
        at += tensor.padded
    raw = b"".join(parts)
    return raw + bytes(-len(raw) % ALIGNMENT)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    """A value with its type: whole numbers as u32, others as f32, arrays by what they hold."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    return struct.pack("<IIQ", ARRAY, NUMBERS[value.dtype], len(value)) + value.tobytes()


class GgufWriter(NewFile):
    """Takes the tensors that `header` announced, in its order; `commit` makes the file appear."""

    def __init__(self, path: Path, begin: bytes, tensors: Sequence[TensorPlan]) -> None:
        """`begin` is the header of these tensors. Raises OutputError."""
        super().__init__(path, MAGIC, ".gguf")
        self.coming = list(reversed(tensors))
        try:
            self.write(begin)
        except BaseException:
            self.__exit__()
            raise

    def tensor(self, name: str, pieces: Iterable[NDArray[Any]]) -> None:
        """Append a tensor's blocks from its pieces in order."""
        plan = self.coming.pop()
        end = self.at + plan.nbytes
        for piece in pieces:
            self.write(piece)
        if plan.name != name or self.at != end:
            raise ValueError(f"{name}: ends at {self.at}, announced were {plan} to {end}")
        self.align(ALIGNMENT)
