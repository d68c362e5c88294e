"""A Hugging Face folder by what its config.json says of how matrices are stored.

Matrices are given one by one, whatever their names in the files.
"""

from collections.abc import Mapping
from pathlib import Path

from chalot.errors import UnsupportedError
from chalot.formats import bitnet, one_by_one, packed, text_part
from chalot.formats.checkpoint import Checkpoint, TensorInfo
from chalot.formats.documents import parse_json
from chalot.formats.files import quoted
from chalot.formats.safetensors import SafetensorsFolder

INSTEAD = {  # what helps where a method is not read
    "bitsandbytes": "its files hold what only its own kernels read",
    "fp8": "its blocks of 8-bit floats are not read yet",
}


def method_of(config: bytes | None, where: object) -> tuple[str, packed.Settings]:
    """(method, quantization_config); "" for numbers. Raises FormatError, UnsupportedError."""
    parsed = parse_json(config, where) if config is not None else None
    found = parsed.get("quantization_config") if isinstance(parsed, dict) else None
    if not found:
        return "", {}
    method = found.get("quant_method") if isinstance(found, dict) else found
    known = ("bitnet", *packed.METHODS)
    if method not in known:
        why = INSTEAD.get(method, "") if isinstance(method, str) else ""
        raise UnsupportedError(
            f"{where}: the weights are quantised by {quoted(method)}{', ' if why else ''}{why}; "
            f"chalot reads {', '.join(known)}. Convert the original weights instead"
        )
    return method, found


def as_computed(
    tensors: Mapping[str, TensorInfo], config: bytes | None, where: object
) -> Mapping[str, TensorInfo]:
    """The tensors of headers as `open_folder` would give them, before there is a folder."""
    method, settings = method_of(config, f"{where}: config.json")
    if not method:
        return one_by_one.listed(text_part.listed(tensors, config, where), where)
    if method == "bitnet":
        packing = bitnet.read_packing(settings, f"{where}: config.json")
        return bitnet.describe_tensors(tensors, packing, where)
    return packed.computed(tensors, packed.find(tensors, settings, method, where))


def open_folder(path: Path) -> Checkpoint:
    """A Hugging Face folder; matrices in codes are given as the numbers that they stand for."""
    folder = SafetensorsFolder(path)
    try:
        method, settings = method_of(folder.document("config.json"), path / "config.json")
        if not method:
            return one_by_one.apart(text_part.taken(folder))
        if method == "bitnet":
            packing = bitnet.read_packing(settings, path / "config.json")
            return bitnet.BitNetFolder(folder, packing)
        return packed.PackedFolder(folder, packed.find(folder.tensors, settings, method, path))
    except BaseException:
        folder.close()
        raise
