"""A model's configuration as the metadata of a GGUF file: the other direction of config.py.

An architecture of llama.cpp computes one function. Where a model's departs from it, that is an
error, or a line that says what is lost; never passed over.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from chalot.errors import UnsupportedError
from chalot.formats.gguf.config import WIDE_LAYERS
from chalot.formats.gguf.writer import Value

BIASES = ("query_key_value_bias", "output_bias", "feed_forward_bias")


class Written(NamedTuple):
    """How llama.cpp's architecture of that name differs from a plain decoder with rope."""

    name: str
    activation: str = "silu"
    biases: tuple[str, ...] = ()  # that it can have
    caps: bool = False
    every: int = 0  # all layers but each n-th have a window; 0: windows are ignored
    local_rope: bool = False  # whether rope has a base of its own in layers with a window
    no_rope: int = 0  # each n-th layer has none
    partial_rope: bool = False
    epsilon: str = "layer_norm_rms_epsilon"
    divisors: bool = False  # whether it reads the tensor of rope's divisors
    square: bool = False  # heads together are as wide as the hidden state


FAMILIES = {
    "llama": Written("llama", biases=BIASES, divisors=True),
    "mistral": Written("llama", biases=BIASES, divisors=True),
    "qwen2": Written("qwen2", biases=BIASES[:1], square=True),
    "qwen3": Written("qwen3"),
    "gemma": Written("gemma", "gelu_tanh"),
    "gemma2": Written("gemma2", "gelu_tanh", caps=True, every=2),
    "gemma3_text": Written("gemma3", "gelu_tanh", every=6, local_rope=True),
    "olmo2": Written("olmo2"),
    "smollm3": Written("smollm3", no_rope=4),
    "stablelm": Written(
        "stablelm", biases=BIASES[:1], partial_rope=True, epsilon="layer_norm_epsilon"
    ),
}
LOCAL_BASE = 10_000.0  # which Gemma 3 of llama.cpp has for layers with a window
YARN_BETAS = (1.0, 32.0)  # slow and fast


def written(config: Mapping[str, Any]) -> Written:
    """The architecture that holds a configuration (ModelConfig's fields).

    Raises UnsupportedError for a family or a feature that GGUF has no place for.
    """
    row = FAMILIES.get(config["family"])
    if row is None:
        raise UnsupportedError(
            f"family {config['family']}: no GGUF is written of it; "
            f"GGUF is written of: {', '.join(FAMILIES)}"
        )
    asked = {
        "activation": config["activation"] != row.activation,
        **{bias: config[bias] and bias not in row.biases for bias in BIASES},
        "logit_cap": bool(config["logit_cap"]) != row.caps,
        "score_cap": bool(config["score_cap"]) != row.caps,
        "score_scale": not _scale_is_usual(config, row),
        "inner_norms": config["inner_norms"],
        "rope_scaling": not _scaling_is_known(config, row),
        "head_dim": row.square and config["heads"] * config["head_dim"] != config["hidden"],
        "windows": row.every and not _windows_are_usual(config, row.every),
        "rope_bases": not _bases_are_usual(config, row),
        "turning": config["turning"] and not row.partial_rope,
    }
    for what, wrong in asked.items():
        if wrong:
            raise UnsupportedError(
                f"{what} is {config[what]!r}: llama.cpp's architecture {row.name} computes without "
                "it, or otherwise; write the model as safetensors instead"
            )
    return row


def _scale_is_usual(config: Mapping[str, Any], row: Written) -> bool:
    usual = config["head_dim"]
    if config["layers"] == WIDE_LAYERS.get(row.name):
        usual = config["hidden"] // config["heads"]
    scale = config["score_scale"] or 1 / math.sqrt(config["head_dim"])
    return bool(abs(scale * math.sqrt(usual) - 1) < 1e-6)


def _windows_are_usual(config: Mapping[str, Any], every: int) -> bool:
    """Whether all layers but each n-th have one and the same window."""
    windows = config["windows"] or (0,) * config["layers"]
    largest = max(windows)
    expected = [0 if (i + 1) % every == 0 else largest for i in range(config["layers"])]
    return largest > 0 and list(windows) == expected


def _bases_are_usual(config: Mapping[str, Any], row: Written) -> bool:
    """Whether each layer has the rope that the architecture gives it."""
    layers = range(config["layers"])
    found = config["rope_bases"] or (None,) * config["layers"]
    local = {i for i in layers if row.local_rope and (i + 1) % row.every}
    none = {i for i in layers if row.no_rope and (i + 1) % row.no_rope == 0}
    expected = [0.0 if i in none else LOCAL_BASE if i in local else None for i in layers]
    return list(found) == expected


def _scaling_is_known(config: Mapping[str, Any], row: Written) -> bool:
    if _scaling(config) == "yarn":  # llama.cpp reads other bounds of few architectures, not these
        scaling = config["rope_scaling"]
        return (scaling["low_freq_factor"], scaling["high_freq_factor"]) == YARN_BETAS
    return _scaling(config) != "llama3" or row.divisors


def _scaling(config: Mapping[str, Any]) -> str:
    return str((config["rope_scaling"] or {}).get("kind", ""))


def lost(config: Mapping[str, Any], row: Written) -> list[str]:
    """A line for what llama.cpp computes otherwise without refusing."""
    windows = [w for w in config["windows"] if 0 < w < config["context"]]
    if row.every or not windows:
        return []
    return [
        f"llama.cpp's {row.name} has no sliding window: past {min(windows):,} tokens it attends "
        "to all, where this model does not"
    ]


def architecture_metadata(config: Mapping[str, Any], row: Written) -> dict[str, Value]:
    """The pairs that say how to compute. `config` has ModelConfig's fields, all of them."""
    heads, head = config["heads"], config["head_dim"]
    found: dict[str, Value | None] = {
        "vocab_size": config["vocabulary"],
        "context_length": config["context"],
        "embedding_length": config["hidden"],
        "block_count": config["layers"],
        "feed_forward_length": config["feed_forward"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["kv_heads"],
        "attention.key_length": head,
        "attention.value_length": head,
        f"attention.{row.epsilon}": float(config["norm_epsilon"]),
        "rope.dimension_count": config["turning"] or head,
        "rope.freq_base": float(config["rope_theta"]),
        "attention.sliding_window": max(config["windows"]) if row.every else None,
        "attn_logit_softcapping": float(config["score_cap"]) if row.caps else None,
        "final_logit_softcapping": float(config["logit_cap"]) if row.caps else None,
        "use_parallel_residual": False if config["centred_norms"] else None,
        **_rope_scaling(config),
    }
    return {f"{row.name}.{key}": value for key, value in found.items() if value is not None}


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, Value | None]:
    """Linear and yarn have keys; llama3's rule is a tensor of divisors."""
    scaling, kind = config["rope_scaling"], _scaling(config)
    if kind not in ("linear", "yarn"):
        return {}
    keys: dict[str, Value | None] = {"type": kind, "factor": float(scaling["factor"])}
    if kind == "yarn":
        # llama.cpp multiplies with this by itself; decimals, the same on every machine
        usual = 1 + Decimal("0.1") * Decimal(max(scaling["factor"], 1.0)).ln()
        more = float(Decimal(scaling["attention_factor"]) / usual)
        keys |= {
            "original_context_length": scaling["original_context"],
            "attn_factor": more if abs(more - 1) > 1e-6 else None,
        }
    return {f"rope.scaling.{key}": value for key, value in keys.items()}
