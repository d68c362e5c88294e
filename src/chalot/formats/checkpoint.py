"""What the rest of the package knows of a checkpoint: names, shapes, floats, small documents.

A reader of another format implements `Checkpoint` and adds one line to `open_checkpoint`.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, UnsupportedError
from chalot.formats.files import quoted


class TensorInfo(NamedTuple):
    """A tensor as its file's header describes it.

    `dtype` is "bf16", "f16", "f32", or the format's own name of a quantised type; `scheme` is
    chalot's scheme that loses least of such a type, "" for numbers. `error` is the relative squared
    error that quantising already cost, where the file says so.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    scheme: str = ""
    error: float | None = None


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


PICKLED = b"/data.pkl"  # the first member of such a zip file
READERS = (  # how a file begins -> where its reader is
    (b"GGUF", "chalot.formats.gguf", "open_gguf"),
    (b"IAYM", "chalot.formats.myai.source", "open_myai"),  # both versions
    (b"PK\x03\x04", "chalot.formats.npz", "NpzModel"),
    (b"{", "chalot.formats.npz", "NpzModel"),  # its manifest
)


def pickled(where: object, name: str) -> str:
    """What is said of weights that are a pickle."""
    return (
        f"{where}: weights are pickled ({quoted(name)}), which can run code when loaded; "
        "expected *.safetensors: take a revision that has them, or save the model again with "
        "save_pretrained(..., safe_serialization=True)"
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint on disk. Raises FormatError when `path` holds none that is known."""
    if path.is_dir():
        from chalot.formats.folders import open_folder

        manifests = sorted(path.glob("*_manifest_*.json"))
        if len(manifests) != 1 or any(path.glob("*.safetensors")):
            return open_folder(path)
        path = manifests[0]  # of an NPZ
    try:
        with path.open("rb") as file:
            begin = file.read(64).lstrip(b" \t\r\n")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    if begin.startswith(b"PK") and PICKLED in begin:  # what torch.save writes
        raise UnsupportedError(pickled(path, path.name))
    for magic, module, reader in READERS:
        if begin.startswith(magic):
            opened: Checkpoint = getattr(import_module(module), reader)(path)
            return opened
    raise FormatError(
        f"{path}: found a file that begins with {begin[:8]!r}, expected a Hugging Face folder, "
        "a .gguf or .myai file, or an .npz with its manifest"
    )
