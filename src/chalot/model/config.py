"""What a model is, in numbers; and how each family's `config.json` says it.

A family is a row of `FAMILIES` (families.py). What a configuration asks for and no row knows is an
error, never something passed over in silence.
"""

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, UnsupportedError, one_line
from chalot.model.experts import Experts, read_experts
from chalot.model.families import FAMILIES, GATES, OPTIONAL, Family, unfamiliar
from chalot.model.regions import Region, Regions, check_regions, default_regions
from chalot.model.rope import Rope, RopeScaling, frequencies, read_rope
from chalot.model.settings import (
    LARGEST,
    LEAST,
    MOST,
    Settings,
    flag,
    number,
    positive,
    shown,
    whole,
    wrong,
)

MOST_LAYERS = 4096  # a list of their tensors stays small
ACTIVATIONS = ("silu", "gelu_tanh", "relu2")


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A decoder: sizes in numbers of elements, positions in tokens.

    Defaults are left out of files, so that a model which needs no newer field stays readable by
    versions that do not know it.
    """

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
    embedding_scale: float = 1.0  # of the embedding's rows, not of a tied head
    head_norms: bool = False  # of queries and keys, head by head, before rope
    post_norms: bool = False  # of what attention and feed-forward give, before it is added
    inner_norms: bool = False  # of what output and down are multiplied with
    score_scale: float = 0.0  # of attention's scores; 0: 1 / sqrt(head_dim)
    score_cap: float = 0.0  # attention's scores become cap * tanh(score / cap); 0: they stay
    logit_cap: float = 0.0
    windows: tuple[int, ...] = ()  # positions that a query of a layer sees; 0: all; (): all layers
    sinks: tuple[int, ...] = ()  # first positions that it sees besides; (): none (model/window.py)
    named_regions: tuple[Region, ...] = ()  # (): see `regions`
    whole_norms: bool = False  # of queries and keys, all heads of a token together, before rope
    experts: Experts | None = None
    logit_divisor: float = 1.0
    pre_norms: bool = True  # of what attention and feed-forward read
    centred_norms: bool = False  # LayerNorm, with biases, instead of norms by the mean square alone
    turning: int = 0  # numbers of a head that rope turns, the first ones; 0: all
    # bases of rope, unscaled, of layers that have their own; 0: no rope; None: the model's; (): all
    rope_bases: tuple[float | None, ...] = ()

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
        needed = ("norm_epsilon", "embedding_scale", "logit_divisor")
        for name in (*needed, "score_scale", "score_cap", "logit_cap"):
            value = getattr(self, name)
            if not (LEAST <= value <= MOST or (value == 0 and name not in needed)):
                raise ValueError(f"{name} is {value}; expected a positive number")
        if not 1 <= self.rope_theta <= MOST:  # below 1, angles would leave what sines are made for
            raise ValueError(f"rope_theta is {self.rope_theta}; expected 1 to {MOST:g}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"{len(self.windows)} windows for {self.layers} layers")
        if any(not 0 <= w <= LARGEST for w in self.windows):
            raise ValueError(f"windows: expected 0 to {LARGEST} positions")
        of_layers = zip(self.sinks, self.windows, strict=False)
        if self.sinks and (
            len(self.sinks) != len(self.windows)
            or any(not 0 <= sinks <= min(256, max(window - 1, 0)) for sinks, window in of_layers)
            or len({(s, w) for s, w in zip(self.sinks, self.windows, strict=True) if s}) > 1
        ):
            raise ValueError("sinks: expected one number, fewer than its layers' one window")
        if self.rope_scaling and self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta}; expected more than 1 with yarn")
        self._check_rope()
        if not (self.pre_norms or self.post_norms):
            raise ValueError("expected norms before or behind attention and feed-forward")
        others = self.head_norms or self.whole_norms or self.post_norms or self.inner_norms
        if self.centred_norms and others:
            raise ValueError("norms with biases go with no other norms")
        if self.experts is not None:
            self.experts.check(self.layers)
            if self.feed_forward_bias or self.post_norms or self.inner_norms:
                raise ValueError("experts go with no biases and norms of feed-forwards")
        if self.head_norms and self.whole_norms:
            raise ValueError("queries and keys have norms of heads or of all heads, not both")
        if self.named_regions:
            check_regions(self.named_regions, self.layers)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")

    def _check_rope(self) -> None:
        """Raise ValueError for a rope that does not fit heads and layers."""
        if self.turning % 2 or not 0 <= self.turning <= self.head_dim:
            raise ValueError(
                f"rope turns {self.turning} of a head of {self.head_dim}; expected even"
            )
        if self.rope_bases and len(self.rope_bases) != self.layers:
            raise ValueError(f"{len(self.rope_bases)} bases of rope for {self.layers} layers")
        if any(base and not 1 <= base <= MOST for base in self.rope_bases):
            raise ValueError(f"rope_bases: expected null, 0, or 1 to {MOST:g}")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "longrope":
            pairs = (self.turning or self.head_dim) // 2
            if len(scaling.short_factor) != pairs:
                raise ValueError(f"{len(scaling.short_factor)} factors of rope for {pairs} pairs")
        if self.rope_bases and self.rope_factor != 1:
            raise ValueError("rope with a factor goes with one base for all layers")

    @property
    def usual_context(self) -> int:
        """Positions of a text unless more are asked for: with longrope those of short factors."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "longrope":
            return self.context
        return min(self.context, scaling.original_context)

    def is_long(self, positions: int) -> bool:
        """Whether texts of up to so many positions need the long factors of longrope."""
        return self.usual_context < positions and self.usual_context < self.context

    @property
    def own_bases(self) -> tuple[float, ...]:
        """The different bases of layers that have their own."""
        return tuple(dict.fromkeys(base for base in self.rope_bases if base is not None))

    def rope_set(self, layer: int) -> int:
        """Which of `inverse_frequencies` a layer has; 0: the model's."""
        base = self.rope_bases[layer] if self.rope_bases else None
        return 0 if base is None else 1 + self.own_bases.index(base)

    @property
    def rope_shape(self) -> tuple[int, int]:
        """Sets of frequencies, and pairs that each turns."""
        two = self.rope_scaling is not None and self.rope_scaling.kind == "longrope"
        return 1 + two + len(self.own_bases), (self.turning or self.head_dim) // 2

    @property
    def rope_factor(self) -> float:
        """What sines and cosines are multiplied with; yarn's, where all turns, is in `scale`."""
        scaling = self.rope_scaling
        apart = scaling is not None and (scaling.kind == "longrope" or self.turning > 0)
        return scaling.attention_factor if scaling is not None and apart else 1.0

    @property
    def regions(self) -> Regions:
        """The layers by name, in order: those of the file, or the usual ones."""
        return self.named_regions or default_regions(self.layers)

    def sinks_of(self, layer: int) -> int:
        """First positions that a query sees in that layer besides its window."""
        return self.sinks[layer] if self.sinks else 0

    def window(self, layer: int) -> int:
        """Positions that a query sees in that layer, its own included; 0: all."""
        return self.windows[layer] if self.windows else 0

    def experts_of(self, layer: int) -> Experts | None:
        """The experts of that layer; None where it is dense."""
        found = self.experts
        return None if found is None or layer in found.dense_layers else found

    def scale(self, layer: int) -> float:
        """What scores are multiplied with in that layer; a rope of its own has no factor."""
        scaled = self.rope_scaling is not None and self.rope_set(layer) == 0
        sharper = self.rope_scaling.attention_factor if self.rope_scaling and scaled else 1.0
        both = 1.0 if self.rope_factor != 1 else sharper**2  # of queries and of keys
        return (self.score_scale or 1 / math.sqrt(self.head_dim)) * both


def from_hugging_face(config: Settings) -> ModelConfig:
    """The model that a parsed `config.json` describes.

    Raises UnsupportedError for a family or feature that chalot does not know, FormatError for a
    value that is missing or makes no sense.
    """
    family = config.get("model_type")
    row = FAMILIES.get(family) if isinstance(family, str) else None
    if row is None:
        beyond = unfamiliar(config)
        raise UnsupportedError(
            f"config.json: unknown architecture {shown(family)}; chalot runs: {', '.join(FAMILIES)}"
            + (f"; settings that none of them has: {shown(beyond)}" if beyond else "")
        )
    check_supported(config, row)
    config = {**row.defaults, **config}

    def bias(source: bool | str) -> bool:
        return flag(config, source) if isinstance(source, str) else source

    try:
        layers = whole(config, "num_hidden_layers", most=MOST_LAYERS)  # before all else
        heads, hidden = whole(config, "num_attention_heads"), whole(config, "hidden_size")
        if config.get("head_dim") is None and hidden % heads:
            raise wrong("hidden_size", hidden, f"a multiple of the {heads} heads, or a head_dim")
        head = whole(config, "head_dim", hidden // heads)
        rope = read_rope(config, row.local_rope)
        sizes = windows(config, row)
        epsilon = "layer_norm_eps" if row.centred_norms else "rms_norm_eps"
        scalar = positive(config, "query_pre_attn_scalar")
        fields = {
            "family": family,
            "hidden": hidden,
            "layers": layers,
            "heads": heads,
            "kv_heads": whole(config, "num_key_value_heads", heads),
            "head_dim": head,
            "feed_forward": whole(config, "intermediate_size"),
            "vocabulary": whole(config, "vocab_size"),
            "context": whole(config, "max_position_embeddings", 2048),
            "norm_epsilon": number(config, epsilon, 1e-6),
            "rope_theta": rope.theta,
            "tied": flag(config, "tie_word_embeddings"),
            "query_key_value_bias": bias(row.query_key_value_bias),
            "output_bias": bias(row.output_bias),
            "feed_forward_bias": bias(row.feed_forward_bias),
            "activation": activation(config, row),
            "rope_scaling": rope.scaling,
            "embedding_scale": embedding_scale(config) if row.embedding_scaled else 1.0,
            "pre_norms": row.pre_norms,
            "centred_norms": row.centred_norms,
            "head_norms": row.head_norms,
            "post_norms": row.post_norms,
            "inner_norms": row.inner_norms,
            "whole_norms": row.whole_norms,
            "experts": read_experts(config, row.experts),
            "score_scale": 1 / math.sqrt(scalar) if scalar else 0.0,
            "score_cap": positive(config, "attn_logit_softcapping"),
            "logit_cap": positive(config, "final_logit_softcapping"),
            "windows": sizes,
            "turning": turning(config, row, rope, head),
            "rope_bases": rope_bases(config, row, rope, sizes),
        }
        if row.multiplied:
            fields |= multipliers(config, number(config, "rms_norm_eps", 1e-6))
        return msgspec.convert(fields, ModelConfig)
    except KeyError as error:
        raise FormatError(f"config.json: {error.args[0]} is missing") from None
    except (msgspec.ValidationError, ArithmeticError, TypeError, ValueError) as error:
        raise FormatError(f"config.json: {one_line(error)}") from None


def multipliers(config: Settings, epsilon: float) -> dict[str, float]:
    """Granite's four factors, without an operation of their own.

    With r = residual_multiplier, h / r is computed instead of h: what attention and feed-forward
    give is then added as it is, the embedding's factor is divided by r, and a norm is the same with
    its epsilon divided by r^2, since rms_norm(h, e) = rms_norm(h / r, e / r^2).
    """
    r = number(config, "residual_multiplier", 1.0)
    return {
        "embedding_scale": number(config, "embedding_multiplier", 1.0) / r,
        "norm_epsilon": epsilon / (r * r),
        "score_scale": number(config, "attention_multiplier", 1.0),
        "logit_divisor": number(config, "logits_scaling", 1.0),
    }


def check_supported(config: Settings, row: Family) -> None:
    """Raise UnsupportedError where a setting asks for what the family's row does not do."""
    for key in sorted(OPTIONAL - row.defaults.keys()):
        if config.get(key):
            raise UnsupportedError(
                f"config.json: {key} is {shown(config[key])}, which chalot does not know of the "
                f"family {config['model_type']}; expected none"
            )


def activation(config: Settings, row: Family) -> str:
    """The gate's function; of two spellings both must say the same. Raises UnsupportedError."""
    keys = [k for k in ("hidden_act", "hidden_activation") if config.get(k) is not None]
    given = [config[k] for k in keys] or ["silu"]
    names = GATES | dict(row.activations)
    found = {names.get(str(name)) for name in given}
    if len(found) > 1 or None in found:
        raise UnsupportedError(
            f"config.json: activation {shown(given[0])} is not known; known: {', '.join(names)}"
        )
    return str(found.pop())


def embedding_scale(config: Settings) -> float:
    """sqrt(hidden) in the type of the checkpoint's numbers, as it was trained and is computed."""
    exact = np.float32(math.sqrt(positive(config, "hidden_size") or 1))
    stored = config.get("dtype") or config.get("torch_dtype")
    if stored == "bfloat16":  # the upper half of a float32, to nearest even
        bits = int(exact.view(np.uint32))
        exact = np.uint32((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).view(np.float32)
    return float(np.float16(exact) if stored == "float16" else exact)


def windows(config: Settings, row: Family) -> tuple[int, ...]:
    """Each layer's window, 0 where it has none; () if no layer has one."""
    layers, kinds = whole(config, "num_hidden_layers"), config.get("layer_types")
    rule = row.windowed or (lambda config, layer: False)
    given = config.get("sliding_window")
    if given == 0 and not config.get("use_sliding_window", True):  # as transformers 5 saves it
        given = None
    size = 0 if given is None else whole(config, "sliding_window")
    chosen = by_rule = [size != 0 and rule(config, i) for i in range(layers)]
    if kinds is not None:
        by_kind = {"full_attention": False, "sliding_attention": True}
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise wrong("layer_types", kinds, f"a list of {layers}")
        if any(kind not in by_kind for kind in map(str, kinds)):
            raise UnsupportedError(f"config.json: layer_types: known: {', '.join(by_kind)}")
        chosen = [by_kind[kind] for kind in kinds]
        on = size != 0 and bool(config.get("use_sliding_window", row.windowed))
        if any(chosen) and not on:
            raise UnsupportedError("config.json: layer_types has windows that are switched off")
        if "layer_types" not in row.defaults and chosen != by_rule:
            raise UnsupportedError(
                f"config.json: layer_types are not those of the family {config['model_type']}"
            )
    return tuple(size if windowed else 0 for windowed in chosen) if any(chosen) else ()


def turning(config: Settings, row: Family, rope: Rope, head: int) -> int:
    """How many of a head's numbers rope turns; 0: all. Raises UnsupportedError."""
    if rope.part != 1 and not row.partial_rope:
        raise UnsupportedError(
            f"config.json: partial_rotary_factor {rope.part} is not known of the family "
            f"{config['model_type']}; only 1"
        )
    found = int(head * rope.part)
    if rope.part != 1 and (found % 2 or not found):
        raise wrong("partial_rotary_factor", rope.part, f"one that turns pairs of a head of {head}")
    return found if found < head else 0


def rope_bases(
    config: Settings, row: Family, rope: Rope, sizes: tuple[int, ...]
) -> tuple[float | None, ...]:
    """Each layer's own base of rope, 0 for none, None for the model's; () if no layer has one."""
    turns = row.turned or (lambda config, layer: True)
    layers = range(whole(config, "num_hidden_layers"))
    same = rope.scaling is None and rope.local == rope.theta
    own = [rope.local if sizes and sizes[i] and not same else None for i in layers]
    found = [base if turns(config, i) else 0.0 for i, base in zip(layers, own, strict=True)]
    return tuple(found) if any(base is not None for base in found) else ()


def inverse_frequencies(config: ModelConfig) -> NDArray[np.float32]:
    """(sets, pairs) float32: by what a pair of a head turns from one position to the next.

    `ModelConfig.rope_set` says which set a layer has; `for_context` chooses between longrope's.
    """
    size = config.turning or config.head_dim
    found = frequencies(size, config.rope_theta, config.rope_scaling)
    own = [
        frequencies(size, base, None) if base else np.zeros((1, size // 2), np.float32)
        for base in config.own_bases
    ]
    return np.concatenate([found, *own])


def for_context(
    config: ModelConfig, frequencies: NDArray[np.float32], positions: int
) -> NDArray[np.float32]:
    """The frequencies for texts of up to so many positions: longrope has two sets, others one."""
    if config.rope_scaling is None or config.rope_scaling.kind != "longrope":
        return frequencies
    return frequencies[1:] if config.is_long(positions) else frequencies[:1]
