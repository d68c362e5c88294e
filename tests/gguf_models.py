"""Tiny models of every architecture as GGUF files without a tokenizer, larger than gguf_files.py's.

Weights are wide, norms and biases vary and are large, so that an error in any shows in the logits.
"""

import math
import re
from collections.abc import Callable

import numpy as np

from chalot.formats.gguf.names import PERMUTED
from gguf_files import interleaved, pack

LAYERS, HEADS, KV_HEADS, HEAD = 2, 4, 2, 32
HIDDEN, FEED, WORDS = 128, 256, 64
IDS = [int(i) for i in np.random.default_rng(0).integers(0, WORDS, 50)]

Tensors = dict[str, np.ndarray]


def matrices(draw: np.random.Generator, layers: int) -> Tensors:
    """Every matrix of a tied model."""
    query, key = HEADS * HEAD, KV_HEADS * HEAD
    shapes = {
        "attn_q": (query, HIDDEN), "attn_k": (key, HIDDEN), "attn_v": (key, HIDDEN),
        "attn_output": (HIDDEN, query), "ffn_gate": (FEED, HIDDEN), "ffn_up": (FEED, HIDDEN),
        "ffn_down": (HIDDEN, FEED),
    }  # fmt: skip
    named = {f"blk.{n}.{k}.weight": s for n in range(layers) for k, s in shapes.items()}
    return {
        name: draw.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in {"token_embd.weight": (WORDS, HIDDEN), **named}.items()
    }


def vectors(
    draw: np.random.Generator, mean: float, sizes: dict[str, int], layers: int = LAYERS
) -> Tensors:
    """A vector of each layer for each name."""
    return {
        f"blk.{n}.{name}": draw.normal(mean, 0.3, size).astype(np.float32)
        for n in range(layers)
        for name, size in sizes.items()
    }


def divisors(theta: float) -> np.ndarray:
    """What llama3's rule with factor 8 divides rope's frequencies by."""
    found = []
    for i in range(HEAD // 2):
        turns = 8192 * theta ** (-2 * i / HEAD) / (2 * math.pi)
        keep = min(max((turns - 1) / 3, 0), 1)
        found.append(1 / ((1 - keep) / 8 + keep))
    return np.array(found, np.float32)


def untied(draw: np.random.Generator) -> Tensors:
    return {"output.weight": draw.normal(0, 0.3, (WORDS, HIDDEN)).astype(np.float32)}


def biases(draw: np.random.Generator) -> Tensors:
    sizes = {"attn_q.bias": HEADS * HEAD, "attn_k.bias": KV_HEADS * HEAD}
    return vectors(draw, 0, sizes | {"attn_v.bias": KV_HEADS * HEAD})


def head_norms(draw: np.random.Generator) -> Tensors:
    return vectors(draw, 1, {"attn_q_norm.weight": HEAD, "attn_k_norm.weight": HEAD})


def post_norms(draw: np.random.Generator) -> Tensors:
    return vectors(draw, 1, {"post_attention_norm.weight": HIDDEN, "post_ffw_norm.weight": HIDDEN})


def inner_norms(draw: np.random.Generator) -> Tensors:
    return vectors(draw, 1, {"attn_sub_norm.weight": HEADS * HEAD, "ffn_sub_norm.weight": FEED})


def layer_norms(draw: np.random.Generator) -> Tensors:
    norms = vectors(draw, 0, {"attn_norm.bias": HIDDEN, "ffn_norm.bias": HIDDEN})
    norms["output_norm.bias"] = draw.normal(0, 0.3, HIDDEN).astype(np.float32)
    return norms | biases(draw) | untied(draw)


def gemma3_norms(draw: np.random.Generator) -> Tensors:
    behind = {"post_attention_norm.weight": HIDDEN, "post_ffw_norm.weight": HIDDEN}
    heads = {"attn_q_norm.weight": HEAD, "attn_k_norm.weight": HEAD}
    return vectors(draw, 1, behind | heads, GEMMA3["block_count"])


def olmo2_norms(draw: np.random.Generator) -> Tensors:
    whole = {"attn_q_norm.weight": HEADS * HEAD, "attn_k_norm.weight": KV_HEADS * HEAD}
    return post_norms(draw) | vectors(draw, 1, whole) | untied(draw)


def fused(draw: np.random.Generator) -> Tensors:
    """Phi-3's: q, k and v in one matrix, gate and up in another; factors of rope."""
    query, key = HEADS * HEAD, KV_HEADS * HEAD
    shapes = {"attn_qkv": (query + 2 * key, HIDDEN), "ffn_up": (2 * FEED, HIDDEN)}
    out = {
        f"blk.{n}.{k}.weight": draw.normal(0, 0.3, shape).astype(np.float32)
        for n in range(LAYERS)
        for k, shape in shapes.items()
    }
    for name in ("short", "long"):
        factors = draw.uniform(1, 8, PHI3["rope.dimension_count"] // 2).astype(np.float32)
        out[f"rope_factors_{name}.weight"] = factors
    return out | untied(draw)


NOTHING: Callable[[np.random.Generator], Tensors] = lambda _: {}  # noqa: E731
THETA = {"rope.freq_base": 500_000.0}
STABLELM = {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 8} | {
    "use_parallel_residual": True  # what files say of StableLM that has no such thing
}
GEMMA3 = {"block_count": 7, "attention.sliding_window": 16, "rope.freq_base": 200_000.0} | {
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 4.0,
}
PHI3 = {"context_length": 1024, "rope.scaling.original_context_length": 512} | {
    "rope.dimension_count": 24,
    "rope.scaling.attn_factor": 1.19,
    "attention.sliding_window": 1024,
}
GRANITE = {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0} | {
    "attention.scale": 0.125
}
CAPS = {
    "attn_logit_softcapping": 20.0,
    "final_logit_softcapping": 10.0,
    "attention.sliding_window": 16,
}
CASES = {  # name -> (architecture, further tensors, further metadata)
    "llama": ("llama", NOTHING, {}),
    "llama-untied": ("llama", untied, {}),
    "llama3": ("llama", lambda _: {"rope_freqs.weight": divisors(500_000.0)}, THETA),
    "qwen2": ("qwen2", biases, {}),
    "qwen3": ("qwen3", head_norms, {}),
    "gemma": ("gemma", NOTHING, {}),
    "gemma2": ("gemma2", post_norms, CAPS),
    "bitnet": ("bitnet", inner_norms, {}),
    "gemma3": ("gemma3", gemma3_norms, GEMMA3),
    "olmo2": ("olmo2", olmo2_norms, {}),
    "stablelm": ("stablelm", layer_norms, STABLELM),
    "smollm3": ("smollm3", NOTHING, {"block_count": 5, **THETA}),
    "phi3": ("phi3", fused, PHI3),
    "granite": ("granite", NOTHING, GRANITE),
}


def model_file(name: str) -> bytes:
    """One of CASES as a whole GGUF file."""
    architecture, further, metadata = CASES[name]
    draw = np.random.default_rng(7)
    layers = metadata.get("block_count", LAYERS)
    tensors = matrices(draw, layers)
    tensors["output_norm.weight"] = draw.normal(1, 0.3, HIDDEN).astype(np.float32)
    if architecture != "olmo2":
        before = {"attn_norm.weight": HIDDEN, "ffn_norm.weight": HIDDEN}
        tensors |= vectors(draw, 1, before, layers)
    tensors |= further(draw)
    if architecture == "phi3":
        apart = re.compile(r"blk\.\d+\.(attn_[qkv]|ffn_gate)\.weight")
        tensors = {k: v for k, v in tensors.items() if not apart.fullmatch(k)}
    stored = []
    for tensor, values in tensors.items():
        turned = architecture in PERMUTED and ("attn_q" in tensor or "attn_k" in tensor)
        written = interleaved(values, HEAD) if turned else values
        stored.append((tensor, written, 0, tuple(reversed(values.shape))))
    found = {
        "context_length": 64,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": FEED,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": HEAD,
        "rope.freq_base": 10_000.0,
        "vocab_size": WORDS,
        **metadata,
    }
    pairs = {f"{architecture}.{key}": value for key, value in found.items()}
    named = {"general.architecture": architecture, "tokenizer.ggml.model": "no_vocab"}
    return pack(named | pairs, stored)
