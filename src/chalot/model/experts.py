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


class Experts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The experts of each layer but the dense ones; widths are of their feed-forwards."""

    count: int
    top: int  # that a token takes
    width: int
    normalised: bool = False  # the chosen ones' weights sum to 1
    shared_width: int = 0  # of the one that all tokens take, times the sigmoid of a score; 0: none
    dense_layers: tuple[int, ...] = ()  # ascending; they have a feed-forward as other models

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
