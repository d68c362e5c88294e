"""Mixtures of experts: what a config.json says of them, and what a model keeps of that.

Each token goes to the `top` experts that its router scores highest, and takes the sum of what they
make, weighted by the scores' softmax. Shazeer et al., arXiv 1701.06538; the families are of
Mixtral (2401.04088), Qwen2-MoE (2407.10671), Qwen3-MoE (2505.09388) and OLMoE (2409.02060).
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from chalot.model.settings import LARGEST, Settings, flag, whole, wrong

COUNTS = ("num_experts", "num_local_experts")  # two spellings of one number
MOST = 1024  # experts of a layer
MOST_MATRICES = 1 << 16  # layers x experts: a list of their tensors stays small


SLICES = "chalot_slices"  # in config.json: slices of the feed-forward, of any family


class Experts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The experts of each layer but the dense ones; widths are of their feed-forwards."""

    count: int
    top: int  # that a token takes
    width: int
    normalised: bool = False  # the chosen ones' weights sum to 1
    shared_width: int = 0  # of the one that all tokens take, times the sigmoid of a score; 0: none
    dense_layers: tuple[int, ...] = ()  # ascending; they have a feed-forward as other models
    ones: bool = False  # slices of a dense model: all count whole, the shared one too

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST:
            raise ValueError(f"{self.count} experts; expected 1 to {MOST}")
        if not 1 <= self.top <= self.count:
            raise ValueError(f"a token takes {self.top} of {self.count} experts; expected 1 to all")
        if not 1 <= self.width <= LARGEST or not 0 <= self.shared_width <= LARGEST:
            raise ValueError(
                f"experts of width {self.width}, shared {self.shared_width}; expected 1 to "
                f"{LARGEST}"
            )
        if any(a >= b for a, b in zip(self.dense_layers, self.dense_layers[1:], strict=False)):
            raise ValueError("dense_layers: expected ascending numbers of layers")
        if self.ones and self.normalised:
            raise ValueError("experts that count whole have no weights to be normalised")

    @property
    def routing(self) -> str:
        """What scores become: one of kernels' ROUTINGS."""
        return "chosen" if self.normalised else "ones" if self.ones else "softmax"

    def check(self, layers: int) -> None:
        """Raise ValueError where they do not go with so many layers."""
        if any(not 0 <= i < layers for i in self.dense_layers):
            raise ValueError(f"dense_layers: expected numbers from 0 to {layers - 1}")
        if layers * self.count > MOST_MATRICES:
            raise ValueError(
                f"{layers} layers of {self.count} experts; expected at most {MOST_MATRICES:,} "
                "experts"
            )


class ExpertKeys(msgspec.Struct, frozen=True):
    """How a family's config.json says it: keys, or what is always so."""

    width: str
    normalised: bool | str
    shared: str = ""  # the key of the shared expert's width; "": there is none
    sparse: bool = False  # decoder_sparse_step and mlp_only_layers say which layers are dense
    usual: int = 0  # experts where it does not say how many


def read_experts(config: Settings, keys: ExpertKeys | None) -> dict[str, Any] | None:
    """The fields of `Experts`; None for a family, or a configuration, without them.

    Raises KeyError for what is missing, ValueError for what makes no sense.
    """
    if config.get(SLICES) is not None:
        if keys is not None:
            raise wrong(SLICES, config[SLICES], "none in a family of mixtures")
        return read_slices(config)
    if keys is None:
        return None
    counts = {whole(config, key) for key in COUNTS if config.get(key) is not None}
    if len(counts) > 1:
        raise wrong(COUNTS[0], config[COUNTS[0]], f"what {COUNTS[1]} says: {config[COUNTS[1]]}")
    count = counts.pop() if counts else keys.usual
    dense = dense_layers(config) if keys.sparse else ()
    return {
        "count": count,
        "top": whole(config, "num_experts_per_tok"),
        "width": whole(config, keys.width),
        "normalised": flag(config, keys.normalised)
        if isinstance(keys.normalised, str)
        else keys.normalised,
        "shared_width": whole(config, keys.shared) if keys.shared else 0,
        "dense_layers": dense,
    }


def read_slices(config: Settings) -> dict[str, Any]:
    """The fields of `Experts` for slices of a dense model's feed-forward."""
    said = config[SLICES]
    if not isinstance(said, Mapping) or said.keys() - {"routed", "shared", "top_k"}:
        raise wrong(SLICES, said, "routed, shared and top_k")
    routed = whole(said, "routed")
    shared = said.get("shared", 0) and whole(said, "shared")
    width, rest = divmod(whole(config, "intermediate_size"), routed + shared)
    if rest:
        raise wrong(SLICES, said, f"a number of slices that divides {config['intermediate_size']}")
    return {
        "count": routed,
        "top": whole(said, "top_k"),
        "width": width,
        "shared_width": shared * width,
        "ones": True,
    }


def dense_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers without experts: those named, and all but each `decoder_sparse_step`-th."""
    layers, step = whole(config, "num_hidden_layers"), whole(config, "decoder_sparse_step", 1)
    named = config.get("mlp_only_layers") or []
    if not isinstance(named, list) or any(isinstance(i, bool) for i in named):
        raise wrong("mlp_only_layers", named, "a list of layers")
    if any(not isinstance(i, int) or not 0 <= i < layers for i in named):
        raise wrong("mlp_only_layers", named, f"numbers from 0 to {layers - 1}")
    chosen = set(named)
    return tuple(i for i in range(layers) if i in chosen or (i + 1) % step)
