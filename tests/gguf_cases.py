"""What tests of GGUF and the script that records their oracles share."""

import hashlib
import json
from functools import cache
from typing import Any

import numpy as np

from chalot.demo import FOLDER
from chalot.formats.gguf.blocks import BY_NAME, BlockType
from chalot.formats.gguf.names import to_gguf
from chalot.formats.safetensors import SafetensorsFolder
from gguf_files import model_metadata

BLOCKS = 64  # of each type
TEXTS = (
    "Hello world",
    "  two spaces  here",
    "tabs\tand\nnewlines\n\n\n end",
    "don't we'll I'M THEY'RE it's",
    "3.14159 1,000,000 2024-01-02 x1y22z333 12345678",
    "",
    " ",
    "def f(x):\n    return x**2  # ok\r\n\r\n  y",
    "½ café 你好世界, こんにちは. 🙂👩‍👩‍👧 Größe Ελλάδα Привет नमस्ते ไทย",
    "...!!! ???--==>> $5 + <b>a</b> ~^|`",
    "trailing   ",
    "CamelCaseAndUPPER lower_snake $dollar",
)


def random_blocks(kind: BlockType) -> np.ndarray:
    """Bytes of some blocks, the same everywhere."""
    raw = hashlib.shake_256(kind.name.encode()).digest(BLOCKS * kind.nbytes)
    return np.frombuffer(raw, np.uint8)


def decoded_hash(values: np.ndarray) -> str:
    """A hash of float32 values in which every NaN is the same."""
    plain = np.ascontiguousarray(values, np.float32).reshape(-1)
    return hashlib.sha256(np.where(np.isnan(plain), 7, plain).tobytes()).hexdigest()[:32]


@cache
def bundled() -> Any:
    """The bundled model's tokenizer.json, parsed."""
    return json.loads((FOLDER / "tokenizer.json").read_text("utf-8"))


def bundled_vocabulary(pre: str) -> dict[str, Any]:
    """The bundled vocabulary as metadata, as if it split as `pre` says."""
    vocab = bundled()["model"]["vocab"] | {t["content"]: t["id"] for t in bundled()["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = np.ones(len(tokens), "<i4")
    kinds[[t["id"] for t in bundled()["added_tokens"]]] = 3
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in bundled()["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": vocab["<|im_end|>"],
        "tokenizer.ggml.bos_token_id": vocab["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
    }


def bundled_model() -> tuple[dict[str, Any], list[tuple[str, np.ndarray, int, tuple[int, ...]]]]:
    """The bundled model's metadata and tensors as an f16 GGUF has them."""
    source = SafetensorsFolder(FOLDER)
    config = json.loads(source.document("config.json") or b"")
    changed = {
        "qwen2.context_length": config["max_position_embeddings"],
        "qwen2.embedding_length": config["hidden_size"],
        "qwen2.block_count": config["num_hidden_layers"],
        "qwen2.feed_forward_length": config["intermediate_size"],
        "qwen2.attention.head_count": config["num_attention_heads"],
        "qwen2.attention.head_count_kv": config["num_key_value_heads"],
        "qwen2.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "qwen2.rope.freq_base": config["rope_theta"],
    }
    tensors = []
    for name in source.tensors:
        weight = source.float32(name)
        stored = weight if weight.ndim == 1 else weight.astype(np.float16)
        kind = BY_NAME["F32" if weight.ndim == 1 else "F16"].number
        tensors.append((to_gguf(name, "qwen2") or "", stored, kind, tuple(reversed(weight.shape))))
    source.close()
    return model_metadata("qwen2", **changed) | bundled_vocabulary("qwen2"), tensors
