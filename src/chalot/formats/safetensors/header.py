"""The header of a safetensors file and the index over several: text in, checked extents out.

Knows no files: bytes come from a folder (safetensors.py) or from the hub (hub.py), and are hostile
until they have passed here. Format: https://github.com/huggingface/safetensors, README, "Format".
"""

import math
from typing import Any, NamedTuple

from chalot.errors import FormatError, UnsupportedError
from chalot.formats.checkpoint import TensorInfo, pickled
from chalot.formats.documents import parse_json
from chalot.formats.files import check_plain_name, quoted

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_HEADER = 100_000_000  # bytes, as the reference implementation
MAX_RANK = 16
MAX_SHARDS = 500  # each holds a file descriptor; 1,024 is a common limit

# bits of an element; chalot computes with BF16, F16 and F32, the rest is checked and listed only
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


class Extent(NamedTuple):
    """A tensor and where its bytes lie, counted from the start of the payload."""

    info: TensorInfo
    begin: int
    end: int


def parse_header(header: bytes, payload: int, where: object) -> dict[str, Extent]:
    """Check a safetensors header against the `payload` bytes that follow it.

    Returns every tensor by name. Raises FormatError that begins with `where`.
    """
    entries = parse_json(header, where)
    if not isinstance(entries, dict):
        raise FormatError(f"{where}: header is {quoted(entries)}, expected a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{where}: __metadata__ is not a map from strings to strings")
    extents = {name: _extent(name, entry, where) for name, entry in entries.items()}
    reached = 0
    for name, extent in sorted(extents.items(), key=lambda item: item[1][1:]):
        if extent.begin != reached:
            what = "overlaps the tensor before it" if extent.begin < reached else "leaves a hole"
            raise FormatError(
                f"{where}: tensor {quoted(name)} begins at {extent.begin}, {what}; "
                f"expected {reached}; do not use this file"
            )
        reached = extent.end
    if reached != payload:
        raise FormatError(
            f"{where}: tensors end at {reached:,} bytes of payload, file has {payload:,}; "
            + (
                "truncated download?"
                if reached > payload
                else "expected no bytes past the last one"
            )
        )
    return extents


def _extent(name: str, entry: Any, where: object) -> Extent:
    """One entry of a header, checked by itself: types, known dtype, size = shape x dtype."""
    at = f"{where}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{at}: expected dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FormatError(f"{at}: unknown dtype {quoted(dtype)}; known are {', '.join(BITS)}")
    if not _counts(shape) or len(shape) > MAX_RANK:
        raise FormatError(f"{at}: shape is not a list of at most {MAX_RANK} counts below 2^63")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{at}: data_offsets are not two ascending counts below 2^63")
    bits = math.prod(shape) * BITS[dtype]  # Python integers do not overflow
    begin, end = offsets
    if (end - begin) * 8 != bits:
        raise FormatError(
            f"{at}: {dtype} of shape {shape} takes {bits / 8:g} bytes, its extent has {end - begin}"
        )
    return Extent(TensorInfo(name, dtype.lower(), tuple(shape), end - begin), begin, end)


def _counts(values: Any) -> bool:
    """Whether this is a list of integers 0 .. 2^63 - 1; booleans, which are ints too, are not."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def header_length(start: bytes, file_size: int, where: object) -> int:
    """The header's length out of a file's first 8 bytes, checked against the file's size."""
    if start.startswith(b"version "):
        raise FormatError(f"{where}: is a git-lfs pointer, not the weights; run `git lfs pull`")
    if len(start) < 8 or file_size < 10:
        raise FormatError(
            f"{where}: found {file_size} bytes, too short for safetensors; truncated?"
        )
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER or length > file_size - 8:
        raise FormatError(
            f"{where}: header of {length:,} bytes, expected at most {MAX_HEADER:,} and the file's "
            f"{file_size - 8:,}; not a safetensors file, or a truncated download"
        )
    return length


def weight_files(names: list[str], where: object) -> list[str]:
    """Which files of a folder or repository to read, for `names` in it: [] where the index decides.

    Raises UnsupportedError for pickles or an adapter only, FormatError where there are no weights.
    """
    if SINGLE in names:
        return [SINGLE]
    if INDEX in names:
        return []
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if found == ["adapter_model.safetensors"]:
        raise UnsupportedError(f"{where}: holds a LoRA adapter only; merge it into its base model")
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if not found and pickles:
        raise UnsupportedError(pickled(where, pickles[0]))
    if not found:
        raise FormatError(f"{where}: holds no *.safetensors; expected a model's folder")
    return found


def parse_index(content: bytes, where: object) -> dict[str, str]:
    """Tensor -> file out of a `model.safetensors.index.json`; files have plain names."""
    index = parse_json(content, where)
    promised = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(promised, dict) or not promised:
        raise FormatError(f"{where}: has no weight_map; expected a map from tensors to files")
    for name in promised.values():
        if not check_plain_name(name, where).endswith(".safetensors"):
            raise FormatError(f"{where}: names {quoted(name)}; expected *.safetensors files only")
    if (count := len(set(promised.values()))) > MAX_SHARDS:
        raise FormatError(f"{where}: names {count} files; expected at most {MAX_SHARDS}")
    return promised


def merge(
    shards: dict[str, dict[str, Extent]], promised: dict[str, str], where: object
) -> dict[str, str]:
    """Tensor -> file over all files, each tensor in one file only, and where the index says.

    `shards` are the checked headers by file, `promised` the index or {}. Raises FormatError.
    """
    places: dict[str, str] = {}
    for file, extents in shards.items():
        for tensor in extents:
            if tensor in places:
                raise FormatError(
                    f"{where}: tensor {quoted(tensor)} is in {places[tensor]} and in {file}; "
                    "expected it once"
                )
            places[tensor] = file
    for tensor, file in promised.items():
        if places.get(tensor) != file:
            raise FormatError(
                f"{where}: {INDEX} says that {file} holds tensor {quoted(tensor)}, and it does "
                "not; download the folder again"
            )
    return places
