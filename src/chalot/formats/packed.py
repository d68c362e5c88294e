"""Matrices that other tools quantised, in a Hugging Face folder, as the numbers they stand for.

config.json's `quantization_config` names the method. A matrix X (rows, columns) is held in parts;
codes are whole numbers of b bits, many to an int32, lowest first. A column's group is column //
group_size, or what X.g_idx says where the order of columns was changed. w = scale (code - zero).

gptq: X.qweight (columns b / 32, rows), packed along columns; X.qzeros (groups, rows b / 32), along
    rows; X.scales (groups, rows). Zeros are stored less 1, modulo 2^b, but by "gptq_v2".
awq: X.qweight (columns, rows / 8), X.qzeros (groups, rows / 8), four bits, a word's codes are of
    the rows 0 2 4 6 1 3 5 7; X.scales (groups, rows).
compressed-tensors: "pack-quantized": X.weight_packed (rows, columns b / 32), codes + 2^(b - 1);
    X.weight_scale (rows or 1, groups or 1); X.weight_zero_point (rows b / 32, groups), packed along
    rows. "int-quantized", "naive-quantized": X.weight and X.weight_zero_point int8, not packed.

Sources: AutoGPTQ, nn_modules/qlinear (packing); GPTQModel (version 2 of zeros); AutoAWQ,
utils/packing_utils.py; compressed-tensors, compressors/. Inputs that a method would code as well
(compressed-tensors' input_activations) are chalot's own affair: it codes what its scheme codes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, UnsupportedError
from chalot.formats.checkpoint import TensorInfo
from chalot.formats.files import quoted
from chalot.formats.floats import STORED
from chalot.formats.folder_view import FolderView
from chalot.formats.safetensors import SafetensorsFolder

Floats = NDArray[np.float32]
Words = NDArray[np.int32]
WORD = 32  # bits
AWQ_ROWS = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where in a word the rows 0 to 7 lie
KEPT_BY = {2: "int4", 4: "int6", 8: "int8"}  # by bits; docs/quantized.md has the errors
GROUP = 32  # columns: four bits in groups of no more, with zero in the middle, are kept by int4
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Packed:
    """One matrix: what it is, the parts that hold it, and how its rows are read."""

    info: TensorInfo
    parts: tuple[str, ...]  # names of its tensors
    bits: int
    size: int  # columns of a group
    rows: Callable[[SafetensorsFolder, "Packed", int, int], Floats]
    one: int = 0  # what a stored zero lacks
    signed: bool = False  # codes are int8 as they stand


class Found:
    """The tensors of a checkpoint, asked for by what a part must be."""

    def __init__(self, tensors: Mapping[str, TensorInfo], where: object) -> None:
        self.tensors = tensors
        self.where = where

    def part(self, name: str, types: tuple[str, ...], *shapes: tuple[int, ...]) -> str:
        """The name, of a tensor of one of the types and shapes. Raises FormatError."""
        info = self.tensors.get(name)
        if info is None or info.dtype not in types or (shapes and info.shape not in shapes):
            found = "nothing" if info is None else f"{info.dtype} of shape {info.shape}"
            raise FormatError(
                f"{self.where}: tensor {quoted(name)}: found {found}, expected {' or '.join(types)}"
                + (f" of shape {' or '.join(map(str, shapes))}" if shapes else "")
            )
        return name

    def order(self, name: str, columns: int) -> tuple[str, ...]:
        """The tensor that says each column's group, where there is one."""
        return (self.part(name, ("i32",), (columns,)),) if name in self.tensors else ()

    def stems(self, end: str) -> list[str]:
        """The names that end so, without that end."""
        return [name.removesuffix(end) for name in self.tensors if name.endswith(end)]

    def shape(self, name: str) -> tuple[int, int]:
        """A matrix' rows and columns, none of them zero. Raises FormatError."""
        shape = self.tensors[name].shape
        if len(shape) != 2 or not all(shape):
            raise FormatError(
                f"{self.where}: tensor {quoted(name)} has shape {shape}; expected two dimensions"
            )
        return shape[0], shape[1]

    def matrices(self, end: str) -> list[tuple[str, tuple[int, int]]]:
        """(name without the end, shape) of each matrix whose name ends so. Raises FormatError."""
        return [(stem, self.shape(stem + end)) for stem in self.stems(end)]

    def matrix(self, stem: str, shape: tuple[int, int], method: str, parts: tuple[str, ...],
               scheme: str) -> TensorInfo:  # fmt: skip
        """The matrix by the name that it has in numbers; no tensor may have it already."""
        name = stem + "weight"
        if name in self.tensors and name not in parts:
            raise FormatError(f"{self.where}: has tensor {quoted(name)} twice, packed and not")
        nbytes = sum(self.tensors[part].nbytes for part in parts)
        return TensorInfo(name, method, shape, nbytes, scheme)


def setting(settings: Settings, key: str, known: tuple[Any, ...], where: object) -> Any:
    """A value of quantization_config. Raises UnsupportedError for others than the known."""
    value = settings.get(key)
    if not any(value is k or (value == k and type(value) is type(k)) for k in known):
        raise UnsupportedError(
            f"{where}: quantization_config: {key} is {said(value)}; chalot reads "
            f"{', '.join(map(str, known))}. Convert the original weights instead"
        )
    return value


def said(value: object) -> str:
    """A value of a configuration, safe to print and short."""
    plain = value is None or isinstance(value, (bool, float))
    small = isinstance(value, int) and abs(value) < 1 << 64
    return repr(value) if plain or small else quoted(value)


def group_size(settings: Settings, columns: int, where: object) -> int:
    """Columns of a group: -1 and null are all."""
    size = settings.get("group_size")
    if size in (-1, None):
        return columns
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise FormatError(
            f"{where}: quantization_config: group_size is {said(size)}; expected 1 or more"
        )
    return size


def kept_by(bits: int, plain: bool, size: int) -> str:
    """The scheme that loses least of codes at about their size; plain: zero in the middle."""
    return "int4" if bits == 4 and plain and size <= GROUP else KEPT_BY[bits]


# ---- gptq and awq: columns first


def gptq(found: Found, settings: Settings) -> list[Packed]:
    """GPTQ's matrices. Raises UnsupportedError, FormatError."""
    bits = setting(settings, "bits", (2, 4, 8), found.where)
    form = setting(settings, "checkpoint_format", (None, "gptq", "gptq_v2"), found.where)
    one = 0 if form == "gptq_v2" else 1
    plain = settings.get("sym") is True and settings.get("desc_act") is not True
    return [
        across(found, stem, "gptq", bits, (words * WORD // bits, rows), settings, plain, one)
        for stem, (words, rows) in found.matrices("qweight")
    ]


def awq(found: Found, settings: Settings) -> list[Packed]:
    """AWQ's matrices. Raises UnsupportedError, FormatError."""
    bits = setting(settings, "bits", (4,), found.where)
    setting(settings, "version", (None, "gemm", "GEMM"), found.where)
    return [
        across(found, stem, "awq", bits, (columns, words * WORD // bits), settings, False, 0)
        for stem, (columns, words) in found.matrices("qweight")
    ]


def across(
    found: Found,
    stem: str,
    method: str,
    bits: int,
    shape: tuple[int, int],
    settings: Settings,
    plain: bool,
    one: int,
) -> Packed:
    """A matrix that is stored as (columns, rows), its groups of columns first."""
    columns, rows = shape
    size = group_size(settings, columns, found.where)
    groups, each = -(-columns // size), WORD // bits
    packed_rows = (groups, -(-rows // each))
    parts = (
        found.part(stem + "qweight", ("i32",)),
        found.part(stem + "qzeros", ("i32",), packed_rows),
        found.part(stem + "scales", tuple(STORED), (groups, rows)),
        *found.order(stem + "g_idx", columns),
    )
    if method == "awq" and (rows % each or len(parts) > 3):
        raise FormatError(f"{found.where}: {quoted(stem)}: {rows} rows; expected eights, no g_idx")
    info = found.matrix(stem, (rows, columns), method, parts, kept_by(bits, plain, size))
    read = awq_rows if method == "awq" else gptq_rows
    return Packed(info, parts, bits, size, read, one)


def gptq_rows(folder: SafetensorsFolder, packed: Packed, first: int, last: int) -> Floats:
    """(rows, columns) of a matrix of GPTQ's."""
    weights, zeros, scales, *order = packed.parts
    bits, each = packed.bits, WORD // packed.bits
    codes = unpacked(folder.held(weights)[:, first:last], bits, axis=0)
    begin = first // each
    nulls = unpacked(folder.held(zeros)[:, begin : -(-last // each)], bits, axis=1)
    nulls = nulls[:, first - begin * each :][:, : last - first]
    nulls = (nulls + packed.one) & ((1 << bits) - 1)
    of_group = folder.float32(scales)[:, first:last]
    group = groups_of(folder, packed, order[0] if order else None, len(of_group))
    return ((codes - nulls[group]).astype(np.float32) * of_group[group]).T.copy()


def awq_rows(folder: SafetensorsFolder, packed: Packed, first: int, last: int) -> Floats:
    """(rows, columns) of a matrix of AWQ's."""
    weights, zeros, scales = packed.parts
    begin, end = first // 8, -(-last // 8)

    def rows(name: str) -> Words:
        words = folder.held(name)[:, begin:end]
        codes = unpacked(words, 4, axis=1).reshape(len(words), -1, 8)[:, :, AWQ_ROWS]
        return codes.reshape(len(words), -1)[:, first - begin * 8 :][:, : last - first]

    of_group = folder.float32(scales)[:, first:last]
    group = groups_of(folder, packed, None, len(of_group))
    return ((rows(weights) - rows(zeros)[group]).astype(np.float32) * of_group[group]).T.copy()


# ---- compressed-tensors: rows first


def compressed(found: Found, settings: Settings) -> list[Packed]:
    """compressed-tensors' matrices. Raises UnsupportedError, FormatError."""
    forms = ("pack-quantized", "int-quantized", "naive-quantized")
    form = setting(settings, "format", forms, found.where)
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    ways = [s.get("weights") if isinstance(s, Mapping) else None for s in schemes]
    weights = ways[0] if ways else None
    if not isinstance(weights, Mapping) or any(way != weights for way in ways):
        raise UnsupportedError(
            f"{found.where}: quantization_config: config_groups is {said(groups)}; chalot reads "
            "one way of storing weights. Convert the original weights instead"
        )
    setting(weights, "type", ("int",), found.where)
    packs = form == "pack-quantized"
    bits = setting(weights, "num_bits", (2, 4, 8) if packs else (8,), found.where)
    plain = weights.get("symmetric") is True and not weights.get("actorder")
    out = []
    for stem in found.stems("weight_packed" if packs else "weight_scale"):
        name, stored = ("weight_packed", "i32") if packs else ("weight", "i8")
        first = found.part(stem + name, (stored,))
        rows, columns = found.shape(first)
        columns *= WORD // bits if packs else 1
        size = group_size(weights, columns, found.where)
        scales = ((rows, -(-columns // size)), (1, 1), (1,))
        parts = [first, found.part(stem + "weight_scale", tuple(STORED), *scales)]
        if stem + "weight_zero_point" in found.tensors:
            parts.append(zero_point(found, stem, rows, parts[1], bits, packs))
        if stem + "weight_shape" in found.tensors:
            parts.append(found.part(stem + "weight_shape", ("i64", "i32"), (2,)))
        parts += found.order(stem + "weight_g_idx", columns)
        scheme = kept_by(bits, plain, size)
        info = found.matrix(stem, (rows, columns), "compressed", tuple(parts), scheme)
        out.append(Packed(info, tuple(parts), bits, size, compressed_rows, signed=not packs))
    return out


def zero_point(found: Found, stem: str, rows: int, scale: str, bits: int, packs: bool) -> str:
    """The tensor of zero points, packed along rows like the matrix along columns."""
    shape = found.tensors[scale].shape
    if packs:
        each = WORD // bits
        return found.part(stem + "weight_zero_point", ("i32",), (-(-rows // each), *shape[1:]))
    return found.part(stem + "weight_zero_point", ("i8",), shape)


def compressed_rows(folder: SafetensorsFolder, packed: Packed, first: int, last: int) -> Floats:
    """(rows, columns) of a matrix of compressed-tensors'."""
    weights, scale, *rest = packed.parts
    half = 1 << (packed.bits - 1)
    held = folder.held(weights)[first:last]
    codes = held.astype(np.int32) if packed.signed else unpacked(held, packed.bits, axis=1) - half
    codes = codes[:, : packed.info.shape[1]]
    scales = folder.float32(scale).reshape(-1, folder.tensors[scale].shape[-1])
    scales = scales[first:last] if len(scales) > 1 else scales
    named = {name.rsplit(".", 1)[1]: name for name in rest}
    shape = named.get("weight_shape")
    if shape and tuple(folder.held(shape)) != packed.info.shape:
        raise FormatError(
            f"{folder.path}: tensor {quoted(shape)} says {folder.held(shape).tolist()}, and "
            f"{quoted(weights)} holds {list(packed.info.shape)}"
        )
    group = groups_of(folder, packed, named.get("weight_g_idx"), scales.shape[1])
    if zeros := named.get("weight_zero_point"):
        nulls = folder.held(zeros)
        if not packed.signed:
            nulls = unpacked(nulls, packed.bits, axis=0) - half
        nulls = nulls.reshape(len(nulls), -1).astype(np.int32)
        codes = codes - (nulls[first:last] if len(nulls) > 1 else nulls)[:, group]
    out: Floats = codes.astype(np.float32) * scales[:, group]
    return out


# ---- what all share


def unpacked(words: Words, bits: int, axis: int) -> Words:
    """Codes (0 to 2^bits - 1) of words, lowest first, along an axis of a matrix."""
    shifts = np.arange(0, WORD, bits, dtype=np.uint32)
    codes = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    if axis == 0:
        codes = codes.transpose(0, 2, 1).reshape(-1, words.shape[1])
    else:
        codes = codes.reshape(len(words), -1)
    return codes.astype(np.int32)


def groups_of(
    folder: SafetensorsFolder, packed: Packed, order: str | None, groups: int
) -> NDArray[np.intp]:
    """(columns,): each column's group. Raises FormatError where a column has none."""
    columns = packed.info.shape[1]
    if order:
        group = folder.held(order).astype(np.intp)
        if group.min() < 0 or group.max() >= groups:
            raise FormatError(
                f"{folder.path}: tensor {quoted(order)} has groups {group.min()} to "
                f"{group.max()}; expected 0 to {groups - 1}"
            )
        return group
    return np.minimum(np.arange(columns, dtype=np.intp) // packed.size, groups - 1)


METHODS: Mapping[str, Callable[[Found, Settings], list[Packed]]] = MappingProxyType(
    {"gptq": gptq, "awq": awq, "compressed-tensors": compressed}
)


class PackedFolder(FolderView):
    """A `Checkpoint` over a folder whose matrices are packed; `float32` gives what they stand for.

    Raises FormatError for parts that do not fit together, as `SafetensorsFolder` for the rest.
    """

    def __init__(self, folder: SafetensorsFolder, packed: Mapping[str, Packed]) -> None:
        super().__init__(folder, computed(folder.tensors, packed))
        self.packed = packed

    def float32(self, name: str, first: int = 0, last: int | None = None) -> Floats:
        """See Checkpoint."""
        packed = self.packed.get(name)
        if packed is None:
            return self.folder.float32(name, first, last)
        last = self.end(name, first, last)
        if first == last:
            return np.empty((0, packed.info.shape[1]), np.float32)
        return packed.rows(self.folder, packed, first, last)


def find(
    tensors: Mapping[str, TensorInfo], settings: Settings, method: str, where: object
) -> dict[str, Packed]:
    """The packed matrices by name. Raises UnsupportedError, FormatError."""
    packed = METHODS[method](Found(tensors, where), settings)
    if not packed:
        raise FormatError(f"{where}: quantization_config says {method}, and no matrix is packed so")
    return {p.info.name: p for p in packed}


def computed(
    tensors: Mapping[str, TensorInfo], packed: Mapping[str, Packed]
) -> dict[str, TensorInfo]:
    """Tensors as they are computed with: packed ones by their true shape, their parts left out."""
    parts = {part for p in packed.values() for part in p.parts}
    left = {name: info for name, info in tensors.items() if name not in parts}
    return left | {name: p.info for name, p in packed.items()}
