"""What a model is, in numbers; and how each family's `config.json` says it.

A family is a row of `FAMILIES`. What a configuration asks for and no row knows is an error, never
something passed over in silence.
"""

import math
from collections.abc import Mapping
from decimal import Decimal, getcontext
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, UnsupportedError

LARGEST = 1 << 24  # of any dimension; products of three stay far below 2^63 in Python
MOST_LAYERS = 4096  # a list of their tensors stays small


class RopeScaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The "llama3" rule: long wavelengths are stretched, short ones kept, smoothly between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ValueError(f"rope scaling by {self.factor}; expected a positive number")
        if not (math.isfinite(high) and 0 < low < high):
            raise ValueError(f"rope scaling from {low} to {high}; expected 0 < low < high")
        if not 1 <= self.original_context <= LARGEST:
            raise ValueError(f"rope scaling of a context of {self.original_context} tokens")


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A decoder: sizes in numbers of elements, positions in tokens."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    context: int
    norm_epsilon: float
    rope_theta: float
    tied: bool
    query_key_value_bias: bool
    output_bias: bool = False
    feed_forward_bias: bool = False
    activation: str = "silu"
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        sizes = ("hidden", "layers", "heads", "kv_heads", "head_dim", "feed_forward", "vocabulary")
        for name in (*sizes, "context"):
            value = getattr(self, name)
            most = MOST_LAYERS if name == "layers" else LARGEST
            if not 1 <= value <= most:
                raise ValueError(f"{name} is {value}; expected 1 to {most}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key/value heads")
        if self.head_dim % 2 or self.head_dim > 1024:
            raise ValueError(f"head size is {self.head_dim}; expected an even number up to 1024")
        for name in ("norm_epsilon", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; expected a positive number")


class Family(msgspec.Struct, frozen=True):
    """How a family's configuration departs from the common reading."""

    query_key_value_bias: bool | str  # a key of the configuration, or always so
    output_bias: bool | str = False
    feed_forward_bias: bool | str = False


FAMILIES = {
    "llama": Family("attention_bias", "attention_bias", "mlp_bias"),
    "qwen2": Family(True),
}
ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "partial_rotary_factor"),
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a parsed `config.json` describes.

    Raises UnsupportedError for a family or feature that chalot does not know, FormatError for a
    value that is missing or makes no sense.
    """
    family = config.get("model_type")
    row = FAMILIES.get(family) if isinstance(family, str) else None
    if row is None:
        raise UnsupportedError(
            f"config.json: unknown architecture {family!r}; chalot runs: {', '.join(FAMILIES)}"
        )
    if config.get("use_sliding_window"):
        raise UnsupportedError(f"config.json: {family} with sliding-window attention cannot be run")
    if config.get("quantization_config"):
        raise UnsupportedError(
            "config.json: the checkpoint is quantised already; convert the original weights"
        )

    def flag(source: bool | str) -> bool:
        return bool(config.get(source, False)) if isinstance(source, str) else source

    activation = config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UnsupportedError(
            f"config.json: activation {activation!r} is not known; known: {', '.join(ACTIVATIONS)}"
        )
    try:
        heads = config["num_attention_heads"]
        theta, scaling = rope(config)
        fields = {
            "family": family,
            "hidden": config["hidden_size"],
            "layers": config["num_hidden_layers"],
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or config["hidden_size"] // max(int(heads), 1),
            "feed_forward": config["intermediate_size"],
            "vocabulary": config["vocab_size"],
            "context": config.get("max_position_embeddings", 2048),
            "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
            "rope_theta": theta,
            "tied": bool(config.get("tie_word_embeddings", False)),
            "query_key_value_bias": flag(row.query_key_value_bias),
            "output_bias": flag(row.output_bias),
            "feed_forward_bias": flag(row.feed_forward_bias),
            "activation": ACTIVATIONS[activation],
            "rope_scaling": scaling,
        }
        return msgspec.convert(fields, ModelConfig)
    except KeyError as error:
        raise FormatError(f"config.json: {error.args[0]} is missing") from None
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"config.json: {error}") from None


def rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling, from `rope_parameters` or the older `rope_theta`, `rope_scaling`.

    Where a configuration has both, the older one holds, as it does in transformers.
    """
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise ValueError("rope_scaling is no object")
    theta = float(found.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UnsupportedError(
            f"config.json: rope scaling {kind!r} is not known; known: default, llama3"
        )
    for key in sorted(found.keys() - ROPE_KEYS):
        if found[key] is not None:
            raise UnsupportedError(f"config.json: rope setting {key!r} is not known")
    part = found.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part is not None and float(part) != 1:
        raise UnsupportedError(f"config.json: partial_rotary_factor {part} cannot be run; only 1")
    if kind == "default":
        return theta, None
    return theta, {
        "factor": float(found["factor"]),
        "low_freq_factor": float(found["low_freq_factor"]),
        "high_freq_factor": float(found["high_freq_factor"]),
        "original_context": found["original_max_position_embeddings"],
    }


def inverse_frequencies(config: ModelConfig) -> NDArray[np.float32]:
    """(head_dim / 2,) float32: theta^(-2 i / head_dim), scaled; exact decimals, rounded once.

    Rope: Su et al., arXiv 2104.09864. "llama3" scaling: a wavelength above context / low is divided
    by `factor`, one below context / high is kept, between them the two are mixed linearly.
    """
    getcontext().prec = 40
    theta = Decimal(config.rope_theta)
    scaling = config.rope_scaling
    two_pi = Decimal("6.283185307179586476925286766559005768394")
    out = []
    for i in range(0, config.head_dim, 2):
        f = theta ** (-Decimal(i) / config.head_dim)
        if scaling is not None:
            low, high = Decimal(scaling.low_freq_factor), Decimal(scaling.high_freq_factor)
            turns = scaling.original_context * f / two_pi  # of this pair within the old context
            keep = min(max((turns - low) / (high - low), Decimal(0)), Decimal(1))
            f = (1 - keep) * f / Decimal(scaling.factor) + keep * f
        out.append(float(f))
    return np.array(out, np.float32)
