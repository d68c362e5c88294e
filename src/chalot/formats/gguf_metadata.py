"""A model's configuration as the metadata of a GGUF file: the other direction of gguf_config.py.

An architecture of llama.cpp computes one function. Where a model's departs from it, that is an
error, or a line that says what is lost; never passed over.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from chalot.errors import UnsupportedError
from chalot.formats.gguf_writer import Value

BIASES = ("query_key_value_bias", "output_bias", "feed_forward_bias")


class Written(NamedTuple):
    """How llama.cpp's architecture of that name differs from a plain decoder with rope."""

    name: str
    activation: str = "silu"
    biases: tuple[str, ...] = ()  # that it can have
    caps: bool = False
    windows: bool = False  # every other layer has one; the others ignore windows
    divisors: bool = False  # whether it reads the tensor of rope's divisors
    square: bool = False  # heads together are as wide as the hidden state


FAMILIES = {
    "llama": Written("llama", biases=BIASES, divisors=True),
    "mistral": Written("llama", biases=BIASES, divisors=True),
    "qwen2": Written("qwen2", biases=BIASES[:1], square=True),
    "qwen3": Written("qwen3"),
    "gemma": Written("gemma", "gelu_tanh"),
    "gemma2": Written("gemma2", "gelu_tanh", caps=True, windows=True),
}
YARN_BETAS = (1.0, 32.0)  # slow and fast
GEMMA2_27B_LAYERS = 46  # whose scores llama.cpp scales by hidden / heads instead of the head's size


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
        "windows": row.windows and not _alternating(config["windows"]),
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
    if row.name == "gemma2" and config["layers"] == GEMMA2_27B_LAYERS:
        usual = config["hidden"] // config["heads"]
    scale = config["score_scale"] or 1 / math.sqrt(config["head_dim"])
    return bool(abs(scale * math.sqrt(usual) - 1) < 1e-6)


def _alternating(windows: Any) -> bool:
    """Whether every other layer, from the first, has one and the same window."""
    whole, others = set(windows[0::2]), set(windows[1::2])
    return len(whole) == 1 and 0 not in whole and not any(others)


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
    if row.windows or not windows:
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
        "attention.layer_norm_rms_epsilon": float(config["norm_epsilon"]),
        "rope.dimension_count": head,
        "rope.freq_base": float(config["rope_theta"]),
        "attention.sliding_window": max(config["windows"]) if row.windows else None,
        "attn_logit_softcapping": float(config["score_cap"]) if row.caps else None,
        "final_logit_softcapping": float(config["logit_cap"]) if row.caps else None,
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
