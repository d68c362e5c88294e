"""Rope: the frequencies a config.json asks for. Su et al., arXiv 2104.09864."""

import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, getcontext
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from chalot.errors import UnsupportedError
from chalot.model.settings import LARGEST, MOST, number, shown, whole, wrong

ROPE_KINDS = ("llama3", "linear", "yarn")
LLAMA3 = ("low_freq_factor", "high_freq_factor")
ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "partial_rotary_factor"),
    *("beta_fast", "beta_slow", "attention_factor"),
}


class RopeScaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How rope's frequencies are changed for a longer context; `inverse_frequencies` says how.

    "llama3": long wavelengths are stretched, short ones kept, smoothly between. "yarn": the same by
    the pair's number, and scores are sharpened. "linear": all are stretched.
    """

    factor: float
    low_freq_factor: float = 0.0  # llama3: turns within the old context; yarn: beta_slow
    high_freq_factor: float = 0.0  # llama3: turns within the old context; yarn: beta_fast
    original_context: int = 1
    kind: str = "llama3"
    attention_factor: float = 1.0  # yarn: of queries and of keys

    def __post_init__(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope scaling {self.kind!r}; known: {', '.join(ROPE_KINDS)}")
        for name in ("factor", "attention_factor"):
            value, least = getattr(self, name), 1 if name == "factor" else 1e-6
            if not least <= value <= MOST:
                raise ValueError(f"rope scaling: {name} is {value}; expected {least} or more")
        if self.kind != "linear" and not (math.isfinite(high) and 0 < low < high):
            raise ValueError(f"rope scaling from {low} to {high}; expected 0 < low < high")
        if not 1 <= self.original_context <= LARGEST:
            raise ValueError(f"rope scaling of a context of {self.original_context} tokens")


def read_rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling, from `rope_parameters` or the older `rope_theta`, `rope_scaling`.

    Where a configuration has both, the older one holds, as it does in transformers.
    """
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise wrong("rope_scaling", found, "an object")
    if found and all(isinstance(v, Mapping) for v in found.values()):  # by kind of layer
        one, *others = found.values()
        if any(other != one for other in others):
            raise UnsupportedError("config.json: rope differs between kinds of layers; known: one")
        found = one
    theta = number({**config, **found}, "rope_theta", 10000.0, least=1)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", *ROPE_KINDS):
        raise UnsupportedError(
            f"config.json: rope scaling {shown(kind)} is not known; known: default, "
            f"{', '.join(ROPE_KINDS)}"
        )
    for key in sorted(found.keys() - ROPE_KEYS):
        if found[key] is not None and (key, found[key]) != ("truncate", True):
            raise UnsupportedError(f"config.json: rope setting {shown(key)} is not known")
    part = number({**config, **found}, "partial_rotary_factor", 1.0)
    if part != 1:
        raise UnsupportedError(f"config.json: partial_rotary_factor {part} cannot be run; only 1")
    if kind == "default":
        return theta, None
    scaling: dict[str, Any] = {"kind": kind, "factor": number(found, "factor", least=1)}
    if kind != "linear":
        low, high = ("beta_slow", "beta_fast") if kind == "yarn" else LLAMA3
        usual = {"beta_slow": 1.0, "beta_fast": 32.0} if kind == "yarn" else {}
        scaling["low_freq_factor"] = number(found, low, usual.get(low))
        scaling["high_freq_factor"] = number(found, high, usual.get(high))
        old = "original_max_position_embeddings"
        longest = whole(config, "max_position_embeddings", 2048)
        scaling["original_context"] = whole(config, old, whole(found, old, longest))
    if kind == "yarn":
        getcontext().prec = 40
        sharper = 1 + Decimal("0.1") * Decimal(max(scaling["factor"], 1.0)).ln()
        scaling["attention_factor"] = number(found, "attention_factor", float(sharper))
    return theta, scaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> NDArray[np.float32]:
    """(head_dim / 2,) float32: theta^(-2 i / head_dim), scaled; exact decimals, rounded once.

    Rope: Su et al., arXiv 2104.09864. "llama3" scaling: a wavelength above context / low is divided
    by `factor`, one below context / high is kept, between them the two are mixed linearly. "yarn"
    (arXiv 2309.00071) mixes linearly in i, between the pairs that turn `high` and `low` times.
    """
    getcontext().prec = 40
    base = Decimal(theta)
    out = []
    for i in range(0, head_dim, 2):
        f = base ** (-Decimal(i) / head_dim)
        if scaling is not None:
            keep = kept(scaling, head_dim, base, i // 2, f)
            f = (1 - keep) * f / Decimal(scaling.factor) + keep * f
        out.append(float(f))
    return np.array(out, np.float32)


def kept(
    scaling: RopeScaling, head_dim: int, theta: Decimal, pair: int, frequency: Decimal
) -> Decimal:
    """How much of a pair's own frequency stays, 0 to 1; the rest is divided by the factor."""
    two_pi = Decimal("6.283185307179586476925286766559005768394")
    if scaling.kind == "linear":
        return Decimal(0)
    low, high = Decimal(scaling.low_freq_factor), Decimal(scaling.high_freq_factor)
    if scaling.kind == "llama3":
        turns = scaling.original_context * frequency / two_pi  # within the old context
        return min(max((turns - low) / (high - low), Decimal(0)), Decimal(1))

    def pair_of(turns: Decimal) -> Decimal:
        """The pair that turns so often within the old context, as a fraction."""
        period = (scaling.original_context / (turns * two_pi)).ln()
        return head_dim * period / (2 * theta.ln())

    first = max(pair_of(high).to_integral_value(ROUND_FLOOR), Decimal(0))
    last = min(pair_of(low).to_integral_value(ROUND_CEILING), Decimal(head_dim - 1))
    last += Decimal("0.001") if first == last else 0
    return 1 - min(max((pair - first) / (last - first), Decimal(0)), Decimal(1))
