"""Shapes of models people know, and checkpoints that are nothing but headers of such shapes."""

import json
from math import prod
from pathlib import Path

from chalot.formats.names import hugging_face
from chalot.model.config import from_hugging_face
from chalot.model.layers import model_tensors
from hub_server import HeaderOnly

LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "max_position_embeddings": 4096}


def shape(hidden: int, layers: int, heads: tuple[int, int], inner: int, vocabulary: int,
          **more: object) -> dict[str, object]:  # fmt: skip
    """A `config.json`."""
    return LLAMA | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": inner,
        "vocab_size": vocabulary,
    } | more  # fmt: skip


LLAMA2_7B = shape(4096, 32, (32, 32), 11008, 32000)
SHAPES = {  # short name -> configuration, of families that differ from llama only in names
    "tinyllama": shape(2048, 22, (32, 4), 5632, 32000),
    "llama2-7b": LLAMA2_7B,
    "mistral-7b": shape(4096, 32, (32, 8), 14336, 32768),
    "llama3.1-8b": shape(4096, 32, (32, 8), 14336, 128256),
    "llama3.2-1b": shape(2048, 16, (32, 8), 8192, 128256, tie_word_embeddings=True),
    "llama3.2-3b": shape(3072, 28, (24, 8), 8192, 128256, tie_word_embeddings=True),
    "qwen2.5-0.5b": shape(
        896, 24, (14, 2), 4864, 151936, tie_word_embeddings=True, model_type="qwen2"
    ),
    "qwen2.5-1.5b": shape(
        1536, 28, (12, 2), 8960, 151936, tie_word_embeddings=True, model_type="qwen2"
    ),
    "qwen2.5-3b": shape(
        2048, 36, (16, 2), 11008, 151936, tie_word_embeddings=True, model_type="qwen2"
    ),
    "qwen2.5-7b": shape(3584, 28, (28, 4), 18944, 152064, model_type="qwen2"),
}


def headers(raw: dict[str, object], shards: int) -> dict[str, bytes]:
    """A repository of bf16 weights in so many files, of which only the headers are there."""
    files: dict[str, bytes] = {"config.json": json.dumps(raw).encode()}
    tensors = model_tensors(from_hugging_face(raw))
    where = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        header, payload = _header([t for n, t in enumerate(tensors) if n % shards == i])
        files[name] = HeaderOnly.of(header, payload)
        where |= {hugging_face(t.name): name for n, t in enumerate(tensors) if n % shards == i}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    return files


def zeros(path: Path, raw: dict[str, object]) -> Path:
    """A folder of bf16 weights that are all zero, and take no room on most disks."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(raw))
    header, payload = _header(model_tensors(from_hugging_face(raw)))
    with (path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + payload)
    return path


def _header(tensors: list) -> tuple[bytes, int]:
    """A safetensors file's beginning, and the bytes that follow it."""
    at, entries = 0, {}
    for t in tensors:
        end = at + prod(t.shape) * 2
        entries[hugging_face(t.name)] = {
            "dtype": "BF16", "shape": list(t.shape), "data_offsets": [at, end],
        }  # fmt: skip
        at = end
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text, at
