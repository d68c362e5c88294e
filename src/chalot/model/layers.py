"""Which tensors a decoder has: chalot's own names, shapes, and the kind that schemes go by."""

from typing import NamedTuple

from chalot.model.config import ModelConfig
from chalot.model.experts import Experts
from chalot.model.families import FAMILIES

# of matrices; vectors are never quantised, routers only where that is asked for by name
KINDS = ("embedding", "head", "attention", "ffn", "router")


class TensorSpec(NamedTuple):
    """A tensor of a model. `kind` is one of KINDS, or "vector".

    A checkpoint holds it less `offset`: what is stored and computed with is value + offset.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: float = 0.0


def ffn_norm(config: ModelConfig) -> str:
    """The name of the norm before the feed-forward; checkpoints with norms behind have another."""
    return "ffn_pre_norm" if config.post_norms else "ffn_norm"


def layer_tensors(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """The tensors of one layer, in the order they are used."""
    c, p = config, f"layers.{layer}."
    offset = norm_offset(c)
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    rows = {"query": queries, "key": keys, "value": keys}
    out: list[TensorSpec] = []

    def norm(name: str, size: int, there: bool = True) -> None:
        if there:
            out.append(TensorSpec(p + name, (size,), "vector", offset))

    def matrix(name: str, shape: tuple[int, int], kind: str) -> None:
        out.append(TensorSpec(p + name, shape, kind))

    def bias(name: str, size: int, there: bool) -> None:
        if there:
            out.append(TensorSpec(f"{p}{name}.bias", (size,), "vector"))

    norm("attention_norm", c.hidden, c.pre_norms)
    bias("attention_norm", c.hidden, c.centred_norms)
    for name, size in rows.items():
        matrix(name, (size, c.hidden), "attention")
    for name, size in rows.items():
        bias(name, size, c.query_key_value_bias)
    norm("query_norm", queries if c.whole_norms else c.head_dim, c.head_norms or c.whole_norms)
    norm("key_norm", keys if c.whole_norms else c.head_dim, c.head_norms or c.whole_norms)
    norm("attention_inner_norm", queries, c.inner_norms)
    matrix("output", (c.hidden, queries), "attention")
    bias("output", c.hidden, c.output_bias)
    norm("attention_post_norm", c.hidden, c.post_norms)
    norm(ffn_norm(c), c.hidden, c.pre_norms)
    bias(ffn_norm(c), c.hidden, c.centred_norms)
    experts = c.experts_of(layer)
    if experts is not None:
        return out + [t._replace(name=p + t.name) for t in expert_tensors(c, experts)]
    for name in ("gate", "up"):
        matrix(name, (c.feed_forward, c.hidden), "ffn")
        bias(name, c.feed_forward, c.feed_forward_bias)
    norm("ffn_inner_norm", c.feed_forward, c.inner_norms)
    matrix("down", (c.hidden, c.feed_forward), "ffn")
    bias("down", c.hidden, c.feed_forward_bias)
    norm("ffn_post_norm", c.hidden, c.post_norms)
    return out


def expert_tensors(c: ModelConfig, experts: Experts) -> list[TensorSpec]:
    """The router, the experts and the shared one, by their names within a layer."""
    out = [TensorSpec("router", (experts.count, c.hidden), "router")]
    each = [(f"experts.{e}.", experts.width) for e in range(experts.count)]
    if experts.shared_width:
        each.append(("shared.", experts.shared_width))
    for p, width in each:
        out += [TensorSpec(p + name, (width, c.hidden), "ffn") for name in ("gate", "up")]
        out.append(TensorSpec(p + "down", (c.hidden, width), "ffn"))
    if experts.shared_width and not experts.ones:
        out.append(TensorSpec("shared_router", (1, c.hidden), "router"))
    return out


def norm_offset(config: ModelConfig) -> float:
    """What checkpoints of the family leave out of norm weights."""
    return FAMILIES[config.family].norm_offset if config.family in FAMILIES else 0.0


def model_tensors(config: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the model. A tied head is the embedding, and is not listed."""
    out = [TensorSpec("embedding", (config.vocabulary, config.hidden), "embedding")]
    for layer in range(config.layers):
        out += layer_tensors(config, layer)
    out.append(TensorSpec("final_norm", (config.hidden,), "vector", norm_offset(config)))
    if config.centred_norms:
        out.append(TensorSpec("final_norm.bias", (config.hidden,), "vector"))
    if not config.tied:
        out.append(TensorSpec("head", (config.vocabulary, config.hidden), "head"))
    return out
