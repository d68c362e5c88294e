"""Which tensors a decoder has: chalot's own names, shapes, and the kind that schemes go by."""

from typing import NamedTuple

from chalot.model.config import ModelConfig

KINDS = ("embedding", "head", "attention", "ffn")  # of matrices; vectors are never quantised


class TensorSpec(NamedTuple):
    """A tensor of a model. `kind` is one of KINDS, or "vector"."""

    name: str
    shape: tuple[int, ...]
    kind: str


def layer_tensors(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """The tensors of one layer, in the order they are used."""
    c, p = config, f"layers.{layer}."
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    rows = {"query": queries, "key": keys, "value": keys}
    out = [TensorSpec(p + "attention_norm", (c.hidden,), "vector")]
    out += [TensorSpec(p + n, (r, c.hidden), "attention") for n, r in rows.items()]
    if c.query_key_value_bias:
        out += [TensorSpec(f"{p}{n}.bias", (r,), "vector") for n, r in rows.items()]
    out.append(TensorSpec(p + "output", (c.hidden, queries), "attention"))
    if c.output_bias:
        out.append(TensorSpec(p + "output.bias", (c.hidden,), "vector"))
    out.append(TensorSpec(p + "ffn_norm", (c.hidden,), "vector"))
    feed = {"gate": (c.feed_forward, c.hidden), "up": (c.feed_forward, c.hidden)}
    feed["down"] = (c.hidden, c.feed_forward)
    for name, shape in feed.items():
        out.append(TensorSpec(p + name, shape, "ffn"))
        if c.feed_forward_bias:
            out.append(TensorSpec(f"{p}{name}.bias", shape[:1], "vector"))
    return out


def model_tensors(config: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the model. A tied head is the embedding, and is not listed."""
    out = [TensorSpec("embedding", (config.vocabulary, config.hidden), "embedding")]
    for layer in range(config.layers):
        out += layer_tensors(config, layer)
    out.append(TensorSpec("final_norm", (config.hidden,), "vector"))
    if not config.tied:
        out.append(TensorSpec("head", (config.vocabulary, config.hidden), "head"))
    return out
