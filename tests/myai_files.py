"""Small checkpoints and `.myai` files for tests; and files taken apart and put together again."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from chalot.formats import safetensors
from chalot.formats.myai.manifest import HEADER, WHERE, Source, header_bytes
from chalot.formats.myai.writer import MyaiWriter
from chalot.formats.names import hugging_face
from chalot.model.config import ModelConfig, from_hugging_face, inverse_frequencies
from chalot.model.layers import model_tensors
from chalot.quant.grids import tables_of
from chalot.quant.packing import Layout, stored_bytes
from chalot.quant.scheme import SCHEMES, Scheme

NOTHING: Mapping[str, bytes] = {}
SMALL = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 130,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def checkpoint(path: Path, dtype: str = "f32", **changes: object) -> Path:
    """A Hugging Face folder of random weights, without a tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    raw = {**SMALL, **changes}
    config = from_hugging_face(raw)
    rng = np.random.default_rng(0)
    tensors = [
        (hugging_face(t.name), dtype, t.shape, rng.standard_normal(t.shape, np.float32))
        for t in model_tensors(config)
    ]
    safetensors.write(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(raw))
    return path


def random_file(
    path: Path, config: ModelConfig, scheme: str, documents: Mapping[str, bytes] = NOTHING
) -> Path:
    """A well-formed file of random codes and small scales, as fast as the disk writes."""
    rng, s = np.random.default_rng(0), Scheme.parse(scheme)
    with MyaiWriter(path) as writer:
        for spec in model_tensors(config):
            if spec.kind == "vector":
                writer.tensor(spec.name, "f32", spec.shape, [np.ones(spec.shape, "<f4")])
                continue
            rows, columns = spec.shape
            data = rng.integers(0, 255, stored_bytes(s, rows, columns), np.uint8, endpoint=True)
            if s.is_coded:
                layout = Layout(s, rows, columns)
                data[layout.segments_at : layout.row_scale_at].view("<f2")[:] = 1
                for of_rows in layout.parts[2:]:
                    data[of_rows].view("<f4")[:] = 1e-4
            else:
                data[:] = 0
            writer.tensor(spec.name, scheme, spec.shape, [data])
        frequencies = inverse_frequencies(config)
        writer.constants["rope.inverse_frequency"] = writer.extent([frequencies.astype("<f4")])
        for t in {SCHEMES["nl4"], s}:
            if t.has_levels:
                writer.constants[f"tables.{t}"] = writer.extent([tables_of(t)])
        for name, content in documents.items():
            writer.documents[name] = writer.extent([content])
        source = Source("random", "0" * 64, "tests", "0")
        writer.finish(msgspec.to_builtins(config), source, lambda _: None)
    return path


def manifest_of(content: bytes) -> Any:
    """The manifest of a file."""
    offset, length, _, _ = WHERE.unpack_from(content, 64)
    return json.loads(content[offset : offset + length])


def with_manifest(content: bytes, manifest: bytes | Any, fill: int = 0) -> bytes:
    """The file with another manifest (bytes as they are, else JSON); header and checksum fit it."""
    offset = WHERE.unpack_from(content, 64)[0] + fill
    config = manifest_of(content)["config"]
    if not isinstance(manifest, bytes):
        config = manifest.get("config") if isinstance(manifest, dict) else config
        manifest = json.dumps(manifest).encode()
    where = (offset, len(manifest), offset + len(manifest), hashlib.sha256(manifest).digest())
    try:
        header = header_bytes(config, where)
    except Exception:  # a configuration that has no header gets that of another
        header = header_bytes(manifest_of(content)["config"], where)
    return header + content[HEADER : offset - fill] + bytes(fill) + manifest


def edited(content: bytes, edit: Callable[[Any], Any]) -> bytes:
    """The file after `edit` changed its manifest in place."""
    manifest = manifest_of(content)
    edit(manifest)
    return with_manifest(content, manifest)


def set_at(*path_and_value: object) -> Callable[[Any], None]:
    """An edit: set_at("config", "layers", 7); a value of `...` takes the field out."""
    *path, last, value = path_and_value

    def edit(manifest: Any) -> None:
        for key in path:
            manifest = manifest[key]
        if value is ...:
            del manifest[last]
        else:
            manifest[last] = value

    return edit
