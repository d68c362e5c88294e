"""Rope: the frequencies a config.json asks for. Su et al., arXiv 2104.09864.

A model has one set of them, or several: layers may have a base of their own, or no rope at all, and
"longrope" has a set for short contexts and one for long ones.
"""

import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, getcontext
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from chalot.errors import UnsupportedError
from chalot.model.settings import LARGEST, MOST, number, shown, whole, wrong

ROPE_KINDS = ("llama3", "linear", "yarn", "longrope")
LEAST_FACTOR = 0.75  # of longrope: below, angles of far positions leave what sines are made for
OLDER_KINDS = {"su": "longrope"}  # as first Phi-3s spell it
LLAMA3 = ("low_freq_factor", "high_freq_factor")
ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "partial_rotary_factor"),
    *("beta_fast", "beta_slow", "attention_factor"),
}
FACTORS = ("short_factor", "long_factor")  # of longrope


class RopeScaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How rope's frequencies are changed for a longer context; `inverse_frequencies` says how.

    "llama3": long wavelengths are stretched, short ones kept, smoothly between. "yarn": the same by
    the pair's number, and scores are sharpened. "linear": all are stretched. "longrope": each pair
    is divided by a factor of its own, which contexts longer than the original one have others of.
    """

    factor: float
    low_freq_factor: float = 0.0  # llama3: turns within the old context; yarn: beta_slow
    high_freq_factor: float = 0.0  # llama3: turns within the old context; yarn: beta_fast
    original_context: int = 1
    kind: str = "llama3"
    attention_factor: float = 1.0  # yarn, longrope: of what turns of queries and keys
    short_factor: tuple[float, ...] = ()  # longrope: of each pair, up to the old context
    long_factor: tuple[float, ...] = ()  # longrope: beyond it

    def __post_init__(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope scaling {self.kind!r}; known: {', '.join(ROPE_KINDS)}")
        for name in ("factor", "attention_factor"):
            value, least = getattr(self, name), 1 if name == "factor" else 1e-6
            if not least <= value <= MOST:
                raise ValueError(f"rope scaling: {name} is {value}; expected {least} or more")
        bounded = self.kind in ("llama3", "yarn")
        if bounded and not (math.isfinite(high) and 0 < low < high):
            raise ValueError(f"rope scaling from {low} to {high}; expected 0 < low < high")
        factors = (self.short_factor, self.long_factor)
        if len(set(map(len, factors))) > 1 or bool(factors[0]) != (self.kind == "longrope"):
            raise ValueError("rope scaling: expected as many short as long factors, for longrope")
        if any(not LEAST_FACTOR <= factor <= MOST for factor in (*factors[0], *factors[1])):
            raise ValueError(f"rope scaling: expected factors from {LEAST_FACTOR} to {MOST:g}")
        if not 1 <= self.original_context <= LARGEST:
            raise ValueError(f"rope scaling of a context of {self.original_context} tokens")


class Rope(NamedTuple):
    """What a configuration says of rope: `scaling` has RopeScaling's fields."""

    theta: float
    scaling: dict[str, Any] | None
    part: float  # of a head's numbers, the first, that turn
    local: float | None = None  # the base in layers with a window, where they have their own


def read_rope(config: Mapping[str, Any], has_local: bool = False) -> Rope:
    """Rope of `rope_parameters` or the older `rope_theta`, `rope_scaling`.

    `has_local`: the family's layers with a window have a rope of their own, unscaled. Where a
    configuration has both spellings, the older one holds, as it does in transformers.
    """
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise wrong("rope_scaling", found, "an object")
    local = read_local(config, found) if has_local else None
    ropes = list(found.values()) if by_kind(found) else []
    if not has_local and any(other != ropes[0] for other in ropes):
        raise UnsupportedError("config.json: rope differs between kinds of layers; known: one")
    if by_kind(found):
        found = found.get("full_attention", {} if has_local else ropes[0])
    theta = number({**config, **found}, "rope_theta", 10000.0, least=1)
    kind = found.get("rope_type", found.get("type", "default"))
    kind = OLDER_KINDS.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ("default", *ROPE_KINDS):
        raise UnsupportedError(
            f"config.json: rope scaling {shown(kind)} is not known; known: default, "
            f"{', '.join(ROPE_KINDS)}"
        )
    for key in sorted(found.keys() - ROPE_KEYS.union(FACTORS if kind == "longrope" else ())):
        if found[key] is not None and (key, found[key]) != ("truncate", True):
            raise UnsupportedError(f"config.json: rope setting {shown(key)} is not known")
    part = number({**config, **found}, "partial_rotary_factor", 1.0)
    if part > 1:
        raise wrong("partial_rotary_factor", part, "1 at most")
    scaling = None if kind == "default" else read_scaling(config, found, kind)
    return Rope(theta, scaling, part, local)


def by_kind(found: Mapping[str, Any]) -> bool:
    """Whether there is a rope for each kind of layer."""
    return bool(found) and all(isinstance(v, Mapping) for v in found.values())


def read_local(config: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """The base of rope in layers with a window."""
    own = found.get("sliding_attention", {}) if by_kind(found) else {}
    others = [key for key in own.keys() - {"rope_theta", "rope_type", "type"} if own[key]]
    if others or own.get("rope_type", own.get("type", "default")) != "default":
        raise UnsupportedError("config.json: rope of windows is scaled; known: default")
    key = "rope_local_base_freq" if "rope_local_base_freq" in config else "rope_theta"
    usual = number(config, key, 10000.0, least=1)
    return number(own, "rope_theta", usual, least=1)


def read_scaling(config: Mapping[str, Any], found: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """RopeScaling's fields of a rope that is scaled."""
    old = "original_max_position_embeddings"
    longest = whole(config, "max_position_embeddings", 2048)
    original = whole(config, old, whole(found, old, longest))
    if kind == "longrope":
        return read_longrope(found, original, max(longest / original, 1.0))
    scaling: dict[str, Any] = {"kind": kind, "factor": number(found, "factor", least=1)}
    if kind != "linear":
        low, high = ("beta_slow", "beta_fast") if kind == "yarn" else LLAMA3
        usual = {"beta_slow": 1.0, "beta_fast": 32.0} if kind == "yarn" else {}
        scaling["low_freq_factor"] = number(found, low, usual.get(low))
        scaling["high_freq_factor"] = number(found, high, usual.get(high))
        scaling["original_context"] = original
    if kind == "yarn":
        getcontext().prec = 40
        sharper = 1 + Decimal("0.1") * Decimal(max(scaling["factor"], 1.0)).ln()
        scaling["attention_factor"] = number(found, "attention_factor", float(sharper))
    return scaling


def read_longrope(found: Mapping[str, Any], original: int, longer: float) -> dict[str, Any]:
    """Ding et al., arXiv 2402.13753; what turns grows by sqrt(1 + ln factor / ln context)."""
    lists = {key: found.get(key) for key in FACTORS}
    for key, factors in lists.items():
        if not isinstance(factors, list) or not factors:
            raise wrong(f"rope scaling: {key}", factors, "a list of numbers, one for each pair")
        lists[key] = [number({key: factor}, key, least=LEAST_FACTOR) for factor in factors]
    factor = number(found, "factor", longer, least=1)
    getcontext().prec = 40
    sharper = Decimal(1)
    if factor > 1 and original > 1:
        sharper = (1 + Decimal(factor).ln() / Decimal(original).ln()).sqrt()
    return {
        "kind": "longrope",
        "factor": factor,
        "original_context": original,
        "attention_factor": number(found, "attention_factor", float(sharper)),
        **lists,
    }


def frequencies(turning: int, theta: float, scaling: RopeScaling | None) -> NDArray[np.float32]:
    """(sets, turning / 2) float32: theta^(-2 i / turning), scaled; exact decimals, rounded once.

    `turning` are the numbers of a head that rope turns. Two sets, for short and for long contexts,
    of "longrope"; else one.

    Rope: Su et al., arXiv 2104.09864. "llama3" scaling: a wavelength above context / low is divided
    by `factor`, one below context / high is kept, between them the two are mixed linearly. "yarn"
    (arXiv 2309.00071) mixes linearly in i, between the pairs that turn `high` and `low` times.
    """
    getcontext().prec = 40
    base = Decimal(theta)
    plain = [base ** (-Decimal(i) / turning) for i in range(0, turning, 2)]
    if scaling is not None and scaling.kind == "longrope":
        sets = (scaling.short_factor, scaling.long_factor)
        scaled = [[f / Decimal(d) for f, d in zip(plain, s, strict=True)] for s in sets]
        return np.array([[float(f) for f in of_set] for of_set in scaled], np.float32)
    out = []
    for i, f in enumerate(plain):
        if scaling is not None:
            keep = kept(scaling, turning, base, i, f)
            f = (1 - keep) * f / Decimal(scaling.factor) + keep * f
        out.append(float(f))
    return np.array([out], np.float32)


def turning_order(head_dim: int, turning: int) -> NDArray[np.intp]:
    """(head_dim,): a head's numbers such that i and i + head_dim / 2 turn together, or not at all.

    Rope turns i and i + turning / 2 of the first `turning` numbers.
    """
    pairs, rest = turning // 2, head_dim // 2 - turning // 2
    first = [*range(pairs), *range(turning, turning + rest)]
    return np.array([*first, *range(pairs, turning), *range(turning + rest, head_dim)], np.intp)


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
