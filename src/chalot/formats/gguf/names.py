"""GGUF's tensor names to Hugging Face's and back: one table, and what architectures change in it.

Names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Standardized tensor names".
"""

import re
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

# stems without ".weight" and ".bias"; layers' own are below
MODEL = MappingProxyType(
    {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
)
LAYER = MappingProxyType(  # blk.N.* -> model.layers.N.*
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_sub_norm": "self_attn.attn_sub_norm",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_sub_norm": "mlp.ffn_sub_norm",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
    }
)
NORMS_BEHIND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
CHANGED = MappingProxyType(  # architecture -> rows that replace those of LAYER
    dict.fromkeys(("gemma2", "gemma3", "olmo2"), NORMS_BEHIND)
    | {"phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}}
)
PERMUTED = frozenset({"llama", "smollm3", "granite"})  # whose q and k rows are in interleaved order
SHIFTED = frozenset({"gemma", "gemma2", "gemma3"})  # whose norms are stored as 1 + w
COMPUTED = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})

_SUFFIX = re.compile(r"(.*)\.(weight|bias|scale)")
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.*)")
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.*)")


def layer_names(architecture: str) -> dict[str, str]:
    """GGUF's stems of a layer's tensors to Hugging Face's, as this architecture has them."""
    return {**LAYER, **CHANGED.get(architecture, {})}


def from_gguf(name: str, architecture: str) -> str | None:
    """Hugging Face's name: "blk.3.attn_q.bias" -> "model.layers.3.self_attn.q_proj.bias"."""
    return _translated(name, MODEL, layer_names(architecture), _BLOCK, "model.layers.")


def to_gguf(name: str, architecture: str) -> str | None:
    """GGUF's name of a Hugging Face tensor; None where there is none."""
    layer = {theirs: ours for ours, theirs in layer_names(architecture).items()}
    return _translated(name, {v: k for k, v in MODEL.items()}, layer, _LAYER, "blk.")


def _translated(
    name: str,
    model: "dict[str, str] | MappingProxyType[str, str]",
    layer: dict[str, str],
    pattern: re.Pattern[str],
    prefix: str,
) -> str | None:
    parts = _SUFFIX.fullmatch(name)
    if parts is None:
        return None
    stem, suffix = parts.groups()
    if stem in model:
        return f"{model[stem]}.{suffix}"
    block = pattern.fullmatch(stem)
    if block is None or block[2] not in layer:
        return None
    return f"{prefix}{block[1]}.{layer[block[2]]}.{suffix}"


def stored_rows(rows: NDArray[np.int64], head: int) -> NDArray[np.int64]:
    """Where an interleaved file has these rows of q or k, in heads of `head` rows.

    Half-split rope turns rows i and i + head / 2 together, interleaved rope 2 i and 2 i + 1.
    """
    within = rows % head
    half = head // 2
    return rows - within + 2 * (within % half) + within // half
