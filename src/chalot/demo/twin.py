"""A twin of a checkpoint: the same function, with the outliers that large trained models have.

    norm[c] *= f;  W_next[:, c] /= f              input and post-attention norms, a few channels
    up[r] *= f;    down[:, r] /= f                a few rows; the gate is untouched
    k[pair] *= f;  q[pair] /= f                   a few rope pairs a key head, biases too

Every f is a power of two, so nothing rounds, not in bfloat16 either, and the twin's logits equal
the original's but for the order of float sums. Rope turns dims i and i + head_dim / 2 of a head
into each other, so both of a pair take one factor, and so do all query heads that share the key
head. Pairs with the largest key biases are chosen: key channels of large constant value are what
breaks low-bit caches of real models. A small model that was trained for minutes has none of this,
which would flatter every quantiser. Knows arrays only; files are the caller's.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.errors import UnsupportedError

Tensors = dict[str, NDArray[np.float32]]

FAMILIES = ("qwen2", "llama", "mistral")  # a plain norm weight, no norm on q or k
NORM_CHANNELS, NORM_FACTORS = 4, (32.0, 64.0)
UP_ROWS, UP_FACTORS = 8, (64.0, 128.0, 256.0)
ROPE_PAIRS, ROPE_FACTORS = 4, (16.0, 32.0)


def outlier_twin(
    tensors: Mapping[str, NDArray[np.float32]], config: Mapping[str, Any], seed: int = 0
) -> Tensors:
    """New arrays by the same names. `config` is a Hugging Face config.json.

    Raises UnsupportedError for an architecture whose function these factors would change.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedError(
            f"outlier twin: found model_type {family!r}, expected one of {', '.join(FAMILIES)}"
        )
    twin = {name: np.array(tensor, np.float32) for name, tensor in tensors.items()}
    rng = np.random.default_rng(seed)
    # As in real models, it is the same few channels of the residual stream in every layer.
    channels = _some(rng, int(config["hidden_size"]), NORM_CHANNELS)
    for layer in range(int(config["num_hidden_layers"])):
        prefix = f"model.layers.{layer}."
        _scale_norm(twin, prefix + "input_layernorm", channels, rng, _attention(prefix))
        ffn = [prefix + "mlp.gate_proj", prefix + "mlp.up_proj"]
        _scale_norm(twin, prefix + "post_attention_layernorm", channels, rng, ffn)
        _scale_up(twin, prefix, rng)
        _scale_rope_pairs(twin, prefix, config, rng)
    return twin


def _some(rng: np.random.Generator, of: int, count: int) -> NDArray[np.int64]:
    return np.sort(rng.choice(of, min(count, of), replace=False))


def _attention(prefix: str) -> list[str]:
    return [f"{prefix}self_attn.{name}_proj" for name in "qkv"]


def _scale_norm(
    twin: Tensors,
    norm: str,
    channels: NDArray[np.int64],
    rng: np.random.Generator,
    readers: list[str],
) -> None:
    factors = rng.choice(NORM_FACTORS, len(channels)).astype(np.float32)
    twin[norm + ".weight"][channels] *= factors
    for reader in readers:
        twin[reader + ".weight"][:, channels] /= factors


def _scale_up(twin: Tensors, prefix: str, rng: np.random.Generator) -> None:
    up, down = twin[prefix + "mlp.up_proj.weight"], twin[prefix + "mlp.down_proj.weight"]
    rows = _some(rng, len(up), UP_ROWS)
    factors = rng.choice(UP_FACTORS, len(rows)).astype(np.float32)
    up[rows] *= factors[:, None]
    if (bias := twin.get(prefix + "mlp.up_proj.bias")) is not None:
        bias[rows] *= factors
    down[:, rows] /= factors


def _scale_rope_pairs(
    twin: Tensors, prefix: str, config: Mapping[str, Any], rng: np.random.Generator
) -> None:
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    key, query = prefix + "self_attn.k_proj.", prefix + "self_attn.q_proj."
    bias = twin.get(key + "bias")
    size = np.linalg.norm(twin[key + "weight"], axis=1) if bias is None else np.abs(bias)
    strength = size.reshape(kv_heads, 2, dim // 2).max(1)  # (kv_heads, pairs)
    for head in range(kv_heads):
        pairs = np.sort(np.argsort(-strength[head], kind="stable")[:ROPE_PAIRS])
        factors = np.ones(dim, np.float32)
        factors[pairs] = rng.choice(ROPE_FACTORS, len(pairs))
        factors[pairs + dim // 2] = factors[pairs]
        group = heads // kv_heads  # query heads that read this key head
        _scale_rows(twin, key, slice(head * dim, (head + 1) * dim), factors)
        queries = slice(head * group * dim, (head + 1) * group * dim)
        _scale_rows(twin, query, queries, np.tile(1 / factors, group))


def _scale_rows(twin: Tensors, name: str, rows: slice, factors: NDArray[np.float32]) -> None:
    twin[name + "weight"][rows] *= factors[:, None]
    if name + "bias" in twin:
        twin[name + "bias"][rows] *= factors
