"""A `.myai` file as a checkpoint: what is stored in codes comes back as float32 under HF's names.

Rows of version 3 may have powers of two folded in (model/calibration.py): tensors differ from those
of the file's source, and compute the same function. What quantising lost stays lost.
"""

import json
import struct
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, UnsupportedError
from chalot.formats.checkpoint import Checkpoint, TensorInfo
from chalot.formats.files import quoted
from chalot.formats.myai import MyaiFile
from chalot.formats.myai.manifest import Extent
from chalot.formats.names import hugging_face
from chalot.quant import codes, packing
from chalot.quant.scheme import PANEL

PIECE = 1 << 18  # numbers decoded at a time; the arrays on the way take some ten bytes for each
CONFIG = {  # of the manifest -> of config.json
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "feed_forward": "intermediate_size",
    "vocabulary": "vocab_size",
    "context": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tied": "tie_word_embeddings",
    "query_key_value_bias": "attention_bias",
    "feed_forward_bias": "mlp_bias",
}
FOLLOWS = {"family", "activation", "rope_scaling"} | {  # said otherwise, or by the family's name
    *("output_bias", "head_norms", "post_norms", "inner_norms"),
    "named_regions",  # carried by whoever converts (chalot.convert.storing)
}
ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
SHIFTED = ("gemma", "gemma2", "gemma3_text")  # families whose checkpoints hold norm weights less 1


def open_myai(path: Path) -> Checkpoint:
    """A `.myai` file of either version. Raises FormatError if it is damaged."""
    try:
        with path.open("rb") as file:
            begin = file.read(8)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    if len(begin) == 8 and struct.unpack("<2I", begin)[1] == 2:
        opened: Checkpoint = import_module("chalot.formats.myai.v2").MyaiV2(path)
        return opened
    return MyaiSource(path)


class MyaiSource:
    """A `Checkpoint` (see formats/checkpoint.py) in a `.myai` file of version 3."""

    def __init__(self, path: Path) -> None:
        """Raises FormatError for a file that is damaged, or has tensors that no model has."""
        self.path = path
        self.file = MyaiFile(path)
        self._own: dict[str, str] = {}  # Hugging Face's name -> the file's
        try:
            self._tensors = self._infos()
        except BaseException:
            self.close()
            raise
        self._stamp = _stamp(path)
        self._read: set[str] = set()  # extents whose checksum was right

    def _infos(self) -> dict[str, TensorInfo]:
        out = {}
        for name, entry in self.file.manifest.tensors.items():
            try:
                known = hugging_face(name)
            except (KeyError, IndexError):
                raise FormatError(
                    f"{self.path}: tensor {quoted(name)} has no place in a model; damaged file?"
                ) from None
            self._own[known] = name
            scheme = "" if entry.scheme in packing.DENSE else entry.scheme
            out[known] = TensorInfo(
                known, entry.scheme, entry.shape, entry.extent.bytes, scheme, entry.error
            )
        return out

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by Hugging Face's name; read-only."""
        return MappingProxyType(self._tensors)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tensors that are another one, by Hugging Face's names: see MyaiFile.aliases."""
        known = {own: name for name, own in self._own.items()}
        return {known[name]: known[of] for name, of in self.file.aliases.items()}

    def raw(self, name: str) -> NDArray[Any]:
        """Stored values of a dense tensor, mapped. Raises UnsupportedError for one in codes."""
        info = self._info(name)
        if info.scheme:
            raise UnsupportedError(f"{self.path}: tensor {quoted(name)} is stored as {info.scheme}")
        self._check(name)
        if len(info.shape) == 1:
            return self.float32(name)
        view = self.file.view(self.file.manifest.tensors[self._own[name]].extent)
        stored = view.view(packing.DENSE[info.dtype])
        return stored.reshape(info.shape[0], -1)[:, : info.shape[1]]

    def float32(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """Rows `first:last` as a new array. Raises FormatError, IndexError for missing rows."""
        info = self._info(name)
        self._check(name)
        last = info.shape[0] if last is None else last
        if not 0 <= first <= last <= info.shape[0]:
            raise IndexError(f"{name}: rows {first}:{last} of {info.shape[0]}")
        if len(info.shape) == 1:
            values = self.file.vector(self._own[name])[first:last]
            shifted = self.file.manifest.config.get("family") in SHIFTED
            return values - np.float32(shifted and name.endswith("norm.weight"))
        matrix = self.file.matrix(self._own[name])
        columns = info.shape[1]
        out = np.empty((last - first, columns), np.float32)
        size = max(PANEL, PIECE // columns // PANEL * PANEL)
        for start in range(first // PANEL * PANEL, last, size):
            self.file.check_length()
            end = min(start + size, info.shape[0])
            rows = decoded(matrix, start, end)[max(first - start, 0) : last - start]
            at = max(start - first, 0)
            out[at : at + len(rows)] = rows
        return out

    def document(self, name: str) -> bytes | None:
        """A document as it came with the file's source; config.json is made up if it is missing."""
        if name in self.file.manifest.documents:
            self._whole(name, self.file.manifest.documents[name])
        found = self.file.document(name)
        if found is None and name == "config.json":
            return json.dumps(config_of(self.file.manifest.config, self.path)).encode()
        return found

    def _check(self, name: str) -> None:
        """Raise FormatError if a tensor is not as it was written: what is made of it would be."""
        own = self._own[name]
        self._whole(own, self.file.manifest.tensors[own].extent)

    def _whole(self, name: str, extent: Extent) -> None:
        self.file.check_length()
        if name not in self._read and not self.file.is_whole(extent):
            raise FormatError(
                f"{self.path}: {quoted(name)} is damaged (wrong checksum); take another copy of "
                "the file, or convert its source again; `chalot verify` lists all damage"
            )
        self._read.add(name)

    def check_unchanged(self) -> None:
        """Raise FormatError if the file changed size or date since it was opened."""
        if _stamp(self.path) != self._stamp:
            raise FormatError(f"{self.path}: changed since it was opened; start again")

    def close(self) -> None:
        """Give back the file."""
        self.file.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise FormatError(f"{self.path}: has no tensor {quoted(name)}")
        return self._tensors[name]


def decoded(matrix: packing.Matrix, first: int, last: int) -> NDArray[np.float32]:
    """Rows `first:last` of a packed matrix; `first` is a multiple of 16."""
    columns = matrix.shape[1]
    if not matrix.scheme.is_coded:
        row = matrix.data.size // matrix.shape[0]
        part = packing.Matrix(
            matrix.scheme, (last - first, columns), matrix.data[first * row : last * row]
        )
        return packing.numbers(part)[:, :columns]
    whole = packing.Layout(matrix.scheme, *matrix.shape)
    few = packing.Layout(matrix.scheme, last - first, columns)
    data = packing.take_panels(matrix.data, whole, few, first // PANEL)
    coded = packing.unpack(data, matrix.scheme, (last - first, columns))
    return codes.dequantize(coded, matrix.tables)


def config_of(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A config.json that says what a manifest's `config` says. Raises UnsupportedError."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("kind", "llama3")
    unknown = sorted(
        k for k in config.keys() - CONFIG.keys() - FOLLOWS if config[k] not in (0, 1, None, (), [])
    )
    if unknown or kind not in ("llama3", "linear"):
        raise UnsupportedError(
            f"{path}: has no config.json, and its manifest's {quoted((unknown or [kind])[0])} "
            "cannot be said in one; convert the model's original"
        )
    out = {theirs: config[ours] for ours, theirs in CONFIG.items() if ours in config}
    if scaling:
        renamed = {"original_context": "original_max_position_embeddings", "kind": "rope_type"}
        out["rope_scaling"] = {renamed.get(k, k): v for k, v in scaling.items()}
        out["rope_scaling"]["rope_type"] = kind
    activation = config.get("activation", "silu")
    return out | {
        "model_type": config["family"],
        "hidden_act": ACTIVATIONS.get(activation, activation),
    }


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
