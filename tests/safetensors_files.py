"""Safetensors files byte by byte, as no writer would make them; and the check of a refusal."""

import json
import tracemalloc
from pathlib import Path

import pytest

from chalot.errors import ChalotError
from chalot.formats.safetensors import SafetensorsFolder

INDEX = "model.safetensors.index.json"


def pack(header: object, payload: bytes = b"") -> bytes:
    """A safetensors file with any header: bytes as they are, else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def folder_with(path: Path, content: bytes, name: str = "model.safetensors") -> Path:
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(content)
    return path


def two_shards(path: Path) -> dict[str, str]:
    for name, file in {"a": "one.safetensors", "b": "two.safetensors"}.items():
        folder_with(path, pack({name: entry(0, 4)}, b"\0\0\x80\x3f"), file)
    return {"a": "one.safetensors", "b": "two.safetensors"}


def with_index(path: Path, weight_map: object) -> Path:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def refuse(folder: Path, message: str, file: str = "model.safetensors", memory: int = 90_000_000):
    """Opening raises one clear line that names the file, without much memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ChalotError) as caught:
            SafetensorsFolder(folder)
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert message in text and file in text and "\n" not in text and len(text) < 600
