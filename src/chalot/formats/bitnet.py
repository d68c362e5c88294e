"""BitNet's ternary weights in a Hugging Face folder, as the numbers that are computed with.

config.json's `quantization_config` with `quant_method` "bitnet" says how matrices are stored:

- offline: `X.weight` holds -1, 0 and 1, four rows a byte, and `X.weight_scale` one number s. Byte
  row i of R holds the rows i, i + R, i + 2R and i + 3R, two bits each, lowest first, a weight + 1.
  The numbers are weight / s ("bitlinear", the default) or weight x s ("autobitlinear", which may
  also hold the three values as floats).
- online: `X.weight` is what training works on. With s = 1 / mean |w|, over the whole matrix, the
  numbers are clip(round(w s), -1, 1) / s.

Source: transformers, integrations/bitnet.py; the method: arXiv 2402.17764. Which matrices: those
with a scale; online, all but the head. Transformers also codes these matrices' inputs in eight bits
for each token; chalot in eight bits for each 128 columns, where it stores the matrix coded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, UnsupportedError, WeightError
from chalot.formats.checkpoint import TensorInfo
from chalot.formats.files import quoted
from chalot.formats.floats import STORED
from chalot.formats.folder_view import FolderView
from chalot.formats.safetensors import SafetensorsFolder

ROWS_A_BYTE = 4
LEAST_MEAN = np.float32(1e-5)
DTYPE = "bitnet"  # of a matrix, whatever holds it
SCHEME = "ternary"  # which keeps all of it
RUN = 1 << 22  # numbers in memory at once
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Packing:
    """How quantization_config says that matrices are stored."""

    divided: bool  # by their scale, not multiplied
    online: bool


def read_packing(found: Mapping[str, Any], where: object) -> Packing:
    """What a quantization_config says. Raises UnsupportedError."""
    linear = found.get("linear_class", "bitlinear")
    mode = found.get("quantization_mode", "offline")
    known = linear in ("bitlinear", "autobitlinear") and mode in ("offline", "online")
    if not known or (linear, mode) == ("bitlinear", "online") or found.get("use_rms_norm"):
        raise UnsupportedError(
            f"{where}: quantization_config: linear_class {quoted(linear)}, quantization_mode "
            f"{quoted(mode)}, use_rms_norm {quoted(found.get('use_rms_norm', False))}; chalot "
            "reads bitlinear offline, autobitlinear offline and online, without use_rms_norm"
        )
    left = found.get("modules_to_not_convert")
    if mode == "online" and left not in (None, ["lm_head"]):
        raise UnsupportedError(
            f"{where}: quantization_config: modules_to_not_convert is {quoted(left)}; chalot reads "
            "online checkpoints where it is null or names lm_head alone"
        )
    return Packing(linear == "bitlinear", mode == "online")


def describe_tensors(
    tensors: Mapping[str, TensorInfo], packing: Packing, where: object
) -> dict[str, TensorInfo]:
    """Tensors as they are computed with: ternary ones by their true shape, scales left out.

    Raises FormatError where a packed matrix has no scale of one number.
    """
    out: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name.endswith(".weight_scale"):
            continue
        scale = tensors.get(name + "_scale")
        shape = info.shape
        if info.dtype == "u8" and len(shape) == 2:
            shape = (shape[0] * ROWS_A_BYTE, shape[1])
            if scale is None:
                raise FormatError(f"{where}: tensor {quoted(name)} is packed; its scale is missing")
        elif scale is None and not (packing.online and name.endswith("_proj.weight")):
            out[name] = info
            continue
        elif info.dtype not in STORED or (scale is not None and packing.divided):
            raise FormatError(
                f"{where}: tensor {quoted(name)} is {info.dtype} of shape {shape}; expected u8"
            )
        if scale is not None and (math.prod(scale.shape) != 1 or scale.dtype not in STORED):
            raise FormatError(
                f"{where}: tensor {quoted(scale.name)} is {scale.dtype} of shape {scale.shape}; "
                "expected one number"
            )
        out[name] = TensorInfo(name, DTYPE, shape, info.nbytes, SCHEME)
    return out


class BitNetFolder(FolderView):
    """A `Checkpoint` over a folder whose matrices are ternary; `float32` gives what they stand for.

    Raises FormatError for codes or scales that mean nothing, as `SafetensorsFolder` for the rest.
    """

    def __init__(self, folder: SafetensorsFolder, packing: Packing) -> None:
        super().__init__(folder, describe_tensors(folder.tensors, packing, folder.path))
        self.packing = packing
        self._units: dict[str, np.float32] = {}

    def float32(self, name: str, first: int = 0, last: int | None = None) -> Floats:
        """See Checkpoint: rows of numbers, 0 and plus or minus one number for the whole matrix."""
        if not self._is_ternary(name):
            return self.folder.float32(name, first, last)
        last = self.end(name, first, last)
        out: Floats = self._signs(name, first, last) * self._unit(name)
        return out

    def _is_ternary(self, name: str) -> bool:
        return name in self.infos and self.infos[name].dtype == DTYPE

    def _signs(self, name: str, first: int, last: int) -> Floats:
        """(rows, columns) of -1, 0 and 1."""
        if self.folder.tensors[name].dtype != "u8":
            values = self.folder.float32(name, first, last)
            if self.packing.online:
                with np.errstate(over="ignore"):
                    scaled = np.rint(values * (np.float32(1) / self._unit(name)))
                return np.asarray(np.clip(scaled, np.float32(-1), np.float32(1)), np.float32)
            if not np.isin(values, np.array([-1, 0, 1], np.float32)).all():
                raise self._strange(name)
            return values
        quarter, columns = self.folder.tensors[name].shape
        out = np.empty((last - first, columns), np.float32)
        for part in range(ROWS_A_BYTE):
            begin, end = max(first, part * quarter), min(last, (part + 1) * quarter)
            if begin >= end:
                continue
            held = self.folder.integers(name, begin - part * quarter, end - part * quarter)
            codes = (held >> (2 * part)) & 3
            if (codes == 3).any():
                raise self._strange(name)
            out[begin - first : end - first] = codes.astype(np.float32) - np.float32(1)
        return out

    def _strange(self, name: str) -> FormatError:
        return FormatError(
            f"{self.path}: tensor {quoted(name)} has a weight that is none of -1, 0 and 1; "
            "is config.json's quantization_config the one that belongs to these weights?"
        )

    def _unit(self, name: str) -> np.float32:
        """What 1 stands for in a matrix."""
        if name not in self._units:
            one = np.float32(1)
            if name + "_scale" in self.folder.tensors:
                scale = self.folder.float32(name + "_scale").reshape(-1)[0]
                if not (np.isfinite(scale) and scale > 0 and np.isfinite(one / scale)):
                    raise WeightError(
                        f"{self.path}: tensor {quoted(name + '_scale')} is {scale}; expected a "
                        "positive number"
                    )
                self._units[name] = one / scale if self.packing.divided else scale
            else:
                scale = one / max(self._mean(name), LEAST_MEAN)
                self._units[name] = one / scale
        return self._units[name]

    def _mean(self, name: str) -> np.float32:
        """Mean |w|: rows are added one after another, then columns, in float64."""
        rows, columns = self.infos[name].shape
        total = np.zeros(columns)
        size = max(1, RUN // columns)
        for first in range(0, rows, size):
            for row in self.folder.float32(name, first, min(first + size, rows)):
                total += np.abs(row)
        mean = np.float32(np.add.accumulate(total)[-1] / (rows * columns))
        if not np.isfinite(mean):
            raise WeightError(
                f"{self.path}: tensor {quoted(name)} has NaN or Inf among its weights; take "
                "another checkpoint"
            )
        return mean
