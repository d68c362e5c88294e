"""Experts that are copies of a dense model's feed-forward ("sparse up-cycling", arXiv 2212.05055).

The router's weights of the chosen experts sum to 1, so that equal copies give what the dense model
gives. They are then one tensor with many names: `aliases`. With noise each copy is its own:

    w[e] = w + noise * deviation(w) * bell, rounded to the source's own type

The families of mixtures, as Hugging Face names them, follow from the dense one's: `MIXTURES`.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from chalot.checking import RUN, check_shapes, read_config
from chalot.errors import UnsupportedError, WeightError
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.documents import parse_json
from chalot.formats.files import quoted
from chalot.formats.floats import narrowed, widened
from chalot.model.config import ModelConfig, from_hugging_face
from chalot.upcycle.numbers import bell, key
from chalot.upcycle.settings import Settings, UpcycleError
from chalot.upcycle.view import PARTS, Floats, View, dense_name, numbers

NOTHING = 16  # columns of a shared expert that gives zero, where the family has one always


class Mixture(NamedTuple):
    """A family of mixtures: its name, its class, and how its config.json says experts."""

    family: str
    architecture: str
    number: str  # the key of the number of experts
    width: str  # and of their width
    more: Mapping[str, Any] = {}
    shared: bool = False  # whether it has a shared expert


SPARSE: dict[str, Any] = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
MIXTRAL = Mixture("mixtral", "MixtralForCausalLM", "num_local_experts", "intermediate_size")
MIXTURES = {  # a dense family -> the mixture that has its attention
    "llama": MIXTRAL,
    "mistral": MIXTRAL,
    "qwen2": Mixture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "num_experts",
        "moe_intermediate_size",
        SPARSE | {"shared_expert_intermediate_size": NOTHING},
        shared=True,
    ),
    "qwen3": Mixture(
        "qwen3_moe", "Qwen3MoeForCausalLM", "num_experts", "moe_intermediate_size", SPARSE
    ),
}
SAID = {
    "head_dim": "head_dim",
    "kv_heads": "num_key_value_heads",
    "feed_forward": "intermediate_size",
    "context": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
LEFT_OUT = ("mlp_bias", "pretraining_tp", "quantization_config", "_name_or_path")


def mixture_of(checkpoint: Checkpoint, config: ModelConfig) -> Mixture:
    """The family that a dense model becomes. Raises UnsupportedError for one that becomes none."""
    found = MIXTURES.get(config.family)
    if found is None:
        raise UnsupportedError(
            f"{checkpoint.path}: no family of mixtures has the attention and norms of "
            f"{config.family}; copies are made of: {', '.join(MIXTURES)}; --slice takes others too"
        )
    return found


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's config.json, which was read before."""
    parsed: dict[str, Any] = parse_json(
        checkpoint.document("config.json") or b"{}", f"{checkpoint.path}: config.json"
    )
    return parsed


def config_of(checkpoint: Checkpoint, config: ModelConfig, asked: Settings) -> bytes:
    """config.json of the mixture. Raises UnsupportedError where it would be another model."""
    mixture = mixture_of(checkpoint, config)
    said = {k: v for k, v in settings_of(checkpoint).items() if k not in LEFT_OUT}
    if said.get("rope_parameters") is None and said.get("rope_theta") is None:
        said["rope_theta"] = config.rope_theta
    said |= {theirs: getattr(config, ours) for ours, theirs in SAID.items()}  # defaults differ
    if config.family == "mistral":  # which has a window where nothing is said
        said["sliding_window"] = max(config.windows, default=0) or None
    said |= {
        "model_type": mixture.family,
        "architectures": [mixture.architecture],
        mixture.number: asked.experts,
        mixture.width: config.feed_forward,
        "num_experts_per_tok": asked.top,
        **mixture.more,
    }
    if config.windows and mixture != MIXTRAL:  # Qwen's mixtures have them in other layers
        raise UnsupportedError(
            f"{checkpoint.path}: some layers have windows, which {mixture.family} would have in "
            "others; --slice keeps a model's own family"
        )
    again = from_hugging_face(said)
    for name in ModelConfig.__struct_fields__:
        if name not in ("family", "experts") and getattr(again, name) != getattr(config, name):
            raise UnsupportedError(
                f"{checkpoint.path}: {name} is {getattr(config, name)!r:.60}, and the family "
                f"{mixture.family} has no word for that; --slice keeps a model's own family"
            )
    return json.dumps(said, indent=2).encode()


class Copies(View):
    """A dense checkpoint as a mixture of copies."""

    def __init__(self, source: Checkpoint, asked: Settings) -> None:
        """Raises FormatError for a checkpoint that is not whole, UnsupportedError, UpcycleError."""
        config = read_config(source)
        refuse_mixture(source, config)
        check_shapes(config, source)
        super().__init__(source, config_of(source, config, asked))
        self.asked, self.hidden = asked, config.hidden
        self.mixture = mixture_of(source, config)
        self.deviations: dict[str, np.float32] = {}
        self.copied: dict[str, str] = {}  # an expert's tensor -> the dense one
        self.routers: set[str] = set()
        self.zeros: set[str] = set()
        parts = {dense_name(i, p): (i, p) for i in range(config.layers) for p in PARTS}
        for name, info in source.tensors.items():
            if name in parts:
                self._copies(name, *parts[name])
            else:
                self.infos[name] = info
        for i in range(config.layers):
            self._routing(i)

    def _copies(self, name: str, layer: int, part: str) -> None:
        info = self.held.tensors[name]
        for e in range(self.asked.experts):
            own = f"model.layers.{layer}.mlp.experts.{e}.{PARTS[part]}.weight"
            self.copied[own] = name
            if self.asked.noise:
                self.infos[own] = numbers(own, info.shape, info.dtype)
                continue
            self.infos[own] = info._replace(name=own)
            if e:
                self.aliases[own] = own.replace(f".experts.{e}.", ".experts.0.")

    def _routing(self, layer: int) -> None:
        p = f"model.layers.{layer}.mlp."
        self.routers.add(p + "gate.weight")
        shapes = {p + "gate.weight": (self.asked.experts, self.hidden)}
        if self.mixture.shared:  # what it adds is zero
            wide = (NOTHING, self.hidden)
            shapes |= {p + "shared_expert_gate.weight": (1, self.hidden)}
            for part, shape in (("gate", wide), ("up", wide), ("down", wide[::-1])):
                shapes[f"{p}shared_expert.{PARTS[part]}.weight"] = shape
            self.zeros |= shapes.keys() - self.routers
        dtype = self.held.tensors[dense_name(layer, "gate")].dtype
        for name, shape in shapes.items():
            self.infos[name] = numbers(name, shape, dtype if name in self.zeros else "f32")

    def rows(self, name: str, first: int, last: int) -> Floats:
        """Rows of a tensor that is there."""
        columns = self.infos[name].shape[-1]
        if name in self.zeros:
            return np.zeros((last - first, columns), np.float32)
        if name in self.routers:
            drawn = bell(key(self.asked.seed, name), first * columns, (last - first) * columns)
            return drawn.reshape(-1, columns) * np.float32(self.hidden**-0.5)
        if name not in self.copied:
            return super().rows(name, first, last)
        dense = self.copied[name]
        values = self.held.float32(dense, first, last)
        if self.asked.noise:
            drawn = bell(key(self.asked.seed, name), first * columns, (last - first) * columns)
            values += drawn.reshape(-1, columns) * self._deviation(dense)
            values = self._rounded(name, values)
        return values

    def _rounded(self, name: str, values: Floats) -> Floats:
        """Numbers of the type that the source has."""
        dtype = self.infos[name].dtype
        try:
            return widened(narrowed(values, dtype)).astype(np.float32)
        except OverflowError:
            raise WeightError(
                f"{self.path}: --noise {self.asked.noise} makes weights of {quoted(name)} too "
                f"large for {dtype}; choose less"
            ) from None

    def _deviation(self, name: str) -> np.float32:
        """The noise's size in a tensor: its standard deviation times --noise."""
        if name not in self.deviations:
            found = deviation(self.held, name) * self.asked.noise
            self.deviations[name] = np.float32(found)
        return self.deviations[name]


def deviation(checkpoint: Checkpoint, name: str) -> float:
    """A matrix's standard deviation, by sums one after another: no machine's own order."""
    rows, columns = checkpoint.tensors[name].shape
    size = max(1, (RUN // 8) // columns)
    total, squares = 0.0, 0.0
    for first in range(0, rows, size):
        values = checkpoint.float32(name, first, min(first + size, rows)).ravel()
        exact = values.astype(np.float64)
        total += float(np.add.accumulate(exact)[-1])
        squares += float(np.add.accumulate(exact * exact)[-1])
    mean = total / (rows * columns)
    return float(np.sqrt(max(squares / (rows * columns) - mean * mean, 0.0)))


def refuse_mixture(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise UpcycleError for what is a mixture already."""
    if getattr(config, "experts", None) is not None:
        raise UpcycleError(
            f"{checkpoint.path}: is a mixture of experts already ({config.family}); expected a "
            "dense model"
        )
