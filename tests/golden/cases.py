"""Tiny random checkpoints as data: Hugging Face folders made again, byte for byte, from a seed.

Weights are sums of whole random numbers, rounded to the stored type, so that they need not be kept:
the golden files hold only logits and a digest of the folder they belong to. numpy only; tensor
names and shapes are written out here a second time, as a check of chalot's own.

Norm weights vary, biases are large and scores are spread wide, so that an error in any of them
shows in the logits. It is the function that is compared: the models have learnt nothing.
"""

import hashlib
import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEW_TOKENS = 24  # that follow the text greedily
PAGE = 256  # positions that chalot's cache keeps together


def qwen2(**changes: Any) -> dict[str, Any]:
    """A config.json as Qwen2 and Qwen2.5 ship it."""
    usual = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 256,
        "max_position_embeddings": 1024,
        "max_window_layers": 2,
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 128,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 512,
    }
    return usual | changes


def llama(**changes: Any) -> dict[str, Any]:
    """A config.json as Llama 2 and 3 ship it."""
    usual = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": 96,
        "intermediate_size": 256,
        "max_position_embeddings": 1024,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 512,
    }
    return usual | changes


def mistral(**changes: Any) -> dict[str, Any]:
    """A config.json as Mistral 7B ships it; later ones have no window."""
    config = llama(architectures=["MistralForCausalLM"], model_type="mistral")
    gone = ("attention_bias", "mlp_bias", "pretraining_tp", "rope_scaling")
    return without(config, *gone) | {"sliding_window": 24} | changes


def qwen3(**changes: Any) -> dict[str, Any]:
    """A config.json as Qwen3 ships it."""
    usual = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 48}
    none = {"attention_bias": False, "rope_scaling": None, "sliding_window": None}
    return qwen2(**usual, **none) | changes


def gemma(**changes: Any) -> dict[str, Any]:
    """A config.json as Gemma ships it: the head is tied without a word, "gelu" is its tanh form."""
    usual = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu"}
    sizes = {"hidden_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}
    tokens = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "torch_dtype": "bfloat16"}
    gone = ("mlp_bias", "pretraining_tp", "tie_word_embeddings")
    return without(llama(**usual, **sizes, **tokens, rms_norm_eps=1e-6), *gone) | changes


def gemma2(**changes: Any) -> dict[str, Any]:
    """A config.json as Gemma 2 ships it, with a window shorter than the text."""
    usual = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "sliding_window": 40}
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    act = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    scale = {"query_pre_attn_scalar": 24, "num_hidden_layers": 3}
    return gemma(**usual, **caps, **sizes, **act, **scale) | changes


def bitnet(linear: str, mode: str = "offline", **changes: Any) -> dict[str, Any]:
    """A config.json as BitNet b1.58 ships it. 128 wide, so that a token is one block of codes."""
    usual = {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "hidden_act": "relu2"}
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}
    rest = {"num_key_value_heads": 2, "rope_theta": 500000.0, "tie_word_embeddings": True}
    packed = {"quant_method": "bitnet", "linear_class": linear, "quantization_mode": mode}
    gone = ("mlp_bias", "pretraining_tp", "rope_scaling")
    config = without(llama(**usual, **sizes, **rest), *gone)
    return config | {"quantization_config": packed} | changes


def mixtral(**changes: Any) -> dict[str, Any]:
    """A config.json as Mixtral 8x7B ships it."""
    usual = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "rms_norm_eps": 1e-5}
    sizes = {"intermediate_size": 80, "num_local_experts": 6, "num_experts_per_tok": 2}
    rest = {"sliding_window": None, "router_aux_loss_coef": 0.02, "output_router_logits": False}
    return without(mistral(**usual, **sizes, **rest), "mlp_bias") | changes


def phi3(**changes: Any) -> dict[str, Any]:
    """A config.json as Phi-3-mini-4k ships it; q, k and v, and gate and up, lie in one matrix."""
    usual = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "rms_norm_eps": 1e-5}
    sizes = {"sliding_window": 2047, "original_max_position_embeddings": 1024}
    rest = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "rope_scaling": None, "pad_token_id": None}
    gone = ("mlp_bias", "pretraining_tp")
    return without(llama(**usual, **sizes, **rest), *gone) | changes


def olmo2(**changes: Any) -> dict[str, Any]:
    """A config.json as OLMo 2 7B ships it: norms behind attention and feed-forward alone."""
    usual = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "rms_norm_eps": 1e-6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "rope_theta": 500000.0}
    return without(llama(**usual, **heads), "mlp_bias", "pretraining_tp") | changes


def olmo3(**changes: Any) -> dict[str, Any]:
    """A config.json as OLMo 3 7B ships it: windows on three of four layers, yarn on the fourth."""
    usual = {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": 20}
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    scaling = YARN | {"rope_type": "yarn", "attention_factor": 1.2, "beta_fast": 32.0}
    layers = {"num_hidden_layers": 4, "layer_types": kinds, "rope_scaling": scaling}
    return olmo2(**usual, **layers) | changes


def smollm3(**changes: Any) -> dict[str, Any]:
    """A config.json as SmolLM3 ships it: each fourth layer has no rope."""
    usual = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
    layers = {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4}
    window = {"sliding_window": None, "use_sliding_window": False, "pad_token_id": None}
    kinds = {"layer_types": ["full_attention"] * 4, "max_window_layers": 28}
    rest = {"rope_theta": 5000000.0, "tie_word_embeddings": True}
    return without(llama(**usual, **layers, **window, **kinds, **rest), "pretraining_tp") | changes


def gemma3(**changes: Any) -> dict[str, Any]:
    """A config.json as Gemma 3 1B ships it; its head is tied without a word."""
    usual = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    rope = {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None}
    sizes = {"num_hidden_layers": 7, "head_dim": 64, "sliding_window": 20}
    rest = {"sliding_window_pattern": 6, "query_pre_attn_scalar": 24}
    none = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    return without(gemma2(**usual, **rope, **sizes, **rest, **none), "hidden_act") | changes


def stablelm(**changes: Any) -> dict[str, Any]:
    """A config.json as StableLM 2 1.6B ships it: LayerNorm, and rope on a quarter of each head."""
    usual = {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm"}
    norm = {"layer_norm_eps": 1e-5, "qk_layernorm": False, "use_parallel_residual": False}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 128}
    rest = {"partial_rotary_factor": 0.25, "use_qkv_bias": True, "hidden_dropout": 0.0}
    gone = ("attention_bias", "mlp_bias", "pretraining_tp", "rms_norm_eps")
    return without(llama(**usual, **norm, **heads, **rest), *gone) | changes


def granite(**changes: Any) -> dict[str, Any]:
    """A config.json as Granite 3.1 2B ships it."""
    usual = {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
    factors = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
    rest = {"attention_multiplier": 0.015625, "rope_theta": 5000000.0, "tie_word_embeddings": True}
    return without(llama(**usual, **factors, **rest), "pretraining_tp") | changes


MOE = {"moe_intermediate_size": 48, "num_experts": 7, "num_experts_per_tok": 3} | {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
}


def qwen2_moe(**changes: Any) -> dict[str, Any]:
    """A config.json as Qwen1.5-MoE and Qwen2-57B-A14B ship it."""
    usual = {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}
    return qwen2(**usual, **MOE, shared_expert_intermediate_size=72) | changes


def qwen3_moe(**changes: Any) -> dict[str, Any]:
    """A config.json as Qwen3-30B-A3B ships it."""
    usual = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    return qwen3(**usual, **MOE | {"norm_topk_prob": True}) | changes


def olmoe(**changes: Any) -> dict[str, Any]:
    """A config.json as OLMoE ships it."""
    usual = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "clip_qkv": None}
    sizes = {"intermediate_size": 56, "num_experts": 8, "num_experts_per_tok": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "norm_topk_prob": False}
    return without(llama(**usual, **sizes, **heads), "mlp_bias", "pretraining_tp") | changes


@dataclass(frozen=True)
class Case:
    """A checkpoint: its config.json, how its tensors are stored, and how long the text is."""

    name: str
    config: dict[str, Any]
    stored: str = "bf16"  # of matrices: bf16, f16 or f32
    vectors: str = ""  # of norm weights and biases; the same if empty
    shards: int = 1
    tokens: int = 70

    @property
    def scheme(self) -> str:
        """chalot's scheme that loses nothing."""
        return "f32" if "quantization_config" in self.config else self.stored

    @property
    def positions(self) -> list[int]:
        """Positions whose logits are recorded: both ends, between, and where cache pages meet."""
        last = self.tokens + NEW_TOKENS - 1
        wanted = {0, 1, 7, 23, 40, 69, self.tokens - 1, last, PAGE - 1, PAGE, PAGE + 1}
        return sorted(p for p in wanted if p <= last)


ODD = {"hidden_size": 320, "num_attention_heads": 5, "num_key_value_heads": 1} | {
    "intermediate_size": 200,
    "vocab_size": 1003,
    "tie_word_embeddings": False,
}
# Of 32 or 24 frequencies some are kept, some mixed, some divided.
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 128
}
OLD = {"rope_theta": 500000.0, "rope_scaling": SCALING | {"rope_type": "llama3"}}
OLDER = {"rope_scaling": SCALING | {"type": "llama3", "factor": 32.0}}
NEW = {"rope_parameters": SCALING | {"rope_type": "llama3", "rope_theta": 500000.0}}
BIASES = {"attention_bias": True, "mlp_bias": True}
SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
YARN = {"type": "yarn", "factor": 4.0, "beta_fast": 16.0, "original_max_position_embeddings": 256}


def longrope(pairs: int) -> dict[str, Any]:
    """Rope as Phi-3.5 and Phi-4-mini have it: factors of each pair, for short and long texts."""
    short, long = [1 + i / 16 for i in range(pairs)], [1.25 + i * i / 2 for i in range(pairs)]
    scaling = {"type": "longrope", "short_factor": short, "long_factor": long}
    return {"rope_scaling": scaling, "max_position_embeddings": 4096}


GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 200000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
}
BY_KIND = {
    kind: {"rope_type": "default", "rope_theta": 50000.0}
    for kind in ("full_attention", "sliding_attention")
}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The configuration, these keys left to the family's defaults."""
    return {k: v for k, v in config.items() if k not in keys}


CASES = {
    case.name: case
    for case in (
        Case("qwen2", qwen2(num_hidden_layers=3)),
        Case("qwen2-odd", qwen2(**ODD)),
        Case("qwen2-odd-48", qwen2(**ODD, head_dim=48), "f16"),
        Case("qwen2-long", qwen2(rope_theta=10000.0), "f32", tokens=300),
        Case(
            "qwen2-new",
            without(
                qwen2(rope_parameters={"rope_type": "default", "rope_theta": 5e4}), "rope_theta"
            ),
            vectors="f32",
        ),
        Case("llama", llama(), shards=3),
        Case("llama-tied", llama(tie_word_embeddings=True, num_key_value_heads=6), "f32"),
        Case("llama3", llama(**OLD, num_attention_heads=3, head_dim=64), tokens=300),
        Case("llama3-older", llama(**OLDER, head_dim=48), "f16", vectors="f32"),
        Case(
            "llama3-new",
            without(llama(**NEW, head_dim=48, tie_word_embeddings=True), "rope_theta"),
            "f32",
            tokens=300,
        ),
        Case("llama-biases", llama(**BIASES, head_dim=32), "f16", shards=2),
        Case("llama-gelu", llama(hidden_act="gelu_pytorch_tanh", rms_norm_eps=0.01), "f32"),
        Case(
            "llama-defaults",
            without(llama(**BIASES), "num_key_value_heads", "rope_theta", "rms_norm_eps"),
        ),
        Case("tinyllama", llama(hidden_size=128, num_attention_heads=8, num_key_value_heads=1)),
        Case("llama-linear", llama(rope_scaling={"type": "linear", "factor": 2.5}), "f32"),
        Case("qwen2-yarn", qwen2(rope_scaling=YARN, rope_theta=10000.0), "f32"),
        Case("qwen2-window", qwen2(**SOME_WINDOWS, num_hidden_layers=3), "f32"),
        Case("mistral", mistral()),
        Case("mistral-long", mistral(sliding_window=100), "f32", tokens=300),
        Case("mistral-wide", mistral(sliding_window=280), "f32", tokens=300),
        Case("mistral-full", mistral(sliding_window=None, head_dim=24), "f16"),
        Case("qwen3", qwen3()),
        Case(
            "qwen3-new",
            without(
                qwen3(
                    **{**SOME_WINDOWS, "attention_bias": True, "tie_word_embeddings": False},
                    layer_types=["sliding_attention", "full_attention"],
                    rope_parameters={"rope_type": "default", "rope_theta": 5e4},
                ),
                *("rope_theta", "rope_scaling"),
            ),
            "f32",
        ),
        Case("gemma", gemma()),
        Case("gemma-f32", gemma(hidden_act="gelu_pytorch_tanh", torch_dtype="float32"), "f32"),
        Case("gemma2", gemma2()),
        Case(
            "gemma2-long",
            without(
                gemma2(
                    layer_types=["full_attention", "sliding_attention", "full_attention"],
                    rope_parameters=BY_KIND["full_attention"],
                    final_logit_softcapping=None,
                    sliding_window=200,
                ),
                *("rope_theta", "rope_scaling"),
            ),
            "f32",
            tokens=300,
        ),
        Case("bitnet", bitnet("autobitlinear"), vectors="f32"),
        Case("bitnet-divided", bitnet("bitlinear"), vectors="f32"),
        Case("bitnet-master", bitnet("autobitlinear", "online", tie_word_embeddings=False)),
        Case(  # as a Llama 3 that was trained on with ternary weights; two keys are left out
            "bitnet-llama",
            llama(**OLD, hidden_size=128, intermediate_size=128, num_attention_heads=4)
            | {"num_key_value_heads": 2, "quantization_config": {"quant_method": "bitnet"}},
            vectors="f32",
        ),
        Case(
            "bitnet-wide",
            bitnet("autobitlinear", hidden_size=320, intermediate_size=400, head_dim=80),
            "f32",
        ),
        Case("phi3", phi3()),
        Case("phi3-window", phi3(sliding_window=20, num_key_value_heads=1), "f32", shards=2),
        Case("phi3-partial", phi3(partial_rotary_factor=0.75), "f32"),
        Case("phi3-short", phi3(**longrope(8)), "f16"),
        Case("phi3-long", phi3(**longrope(8), original_max_position_embeddings=64), "f32"),
        Case(
            "phi3-long-partial",
            phi3(**longrope(6), partial_rotary_factor=0.75, original_max_position_embeddings=64),
        ),
        Case("olmo2", olmo2()),
        Case("olmo2-groups", olmo2(num_key_value_heads=2, attention_bias=True), "f32"),
        Case("olmo3", olmo3()),
        Case("olmo3-groups", olmo3(num_key_value_heads=2, rope_scaling=None), "f32", tokens=300),
        Case("smollm3", smollm3()),
        Case("smollm3-yarn", smollm3(rope_scaling=YARN), "f32"),
        Case(
            "smollm3-window",
            without(
                smollm3(
                    **{"use_sliding_window": True, "sliding_window": 20, **BIASES},
                    no_rope_layer_interval=2,
                ),
                *("no_rope_layers", "layer_types"),
            ),
            "f32",
        ),
        Case("gemma3", gemma3()),
        Case(
            "gemma3-new",
            without(
                gemma3(
                    layer_types=["full_attention"] + ["sliding_attention"] * 2,
                    rope_parameters=GEMMA3_ROPE,
                    final_logit_softcapping=20.0,
                    num_hidden_layers=3,
                ),
                *("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern"),
            ),
            "f32",
            tokens=300,
        ),
        Case("stablelm", stablelm()),
        Case(
            "stablelm-groups",
            stablelm(num_key_value_heads=2, use_qkv_bias=False, partial_rotary_factor=0.5)
            | {"layer_norm_eps": 0.01, "tie_word_embeddings": True},
            "f32",
        ),
        Case("granite", granite()),
        Case(
            "granite-biases",
            granite(**BIASES, residual_multiplier=1.0, logits_scaling=3.0, attention_multiplier=0.4)
            | {"tie_word_embeddings": False},
            "f32",
        ),
        Case("mixtral", mixtral()),
        Case("mixtral-window", mixtral(sliding_window=20, num_experts_per_tok=1), "f32", shards=2),
        Case("qwen2-moe", qwen2_moe()),
        Case(
            "qwen2-moe-sparse",
            qwen2_moe(
                **{"decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": True},
                **{"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 20},
                **{"qkv_bias": False, "max_window_layers": 3},
            ),
            "f32",
        ),
        Case("qwen3-moe", qwen3_moe()),
        Case("qwen3-moe-plain", qwen3_moe(norm_topk_prob=False, attention_bias=True), "f32"),
        Case("olmoe", olmoe()),
        Case("olmoe-groups", olmoe(num_key_value_heads=2, norm_topk_prob=True), "f32"),
    )
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint: name to shape."""
    hidden, inner, heads = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    size = config.get("head_dim", hidden // heads)
    keys = config.get("num_key_value_heads", heads) * size
    family = config["model_type"]
    always = family == "qwen2" or (family == "qwen2_moe" and config.get("qkv_bias", True))
    always |= config.get("use_qkv_bias", False)
    biased = {"q_proj", "k_proj", "v_proj"} if always else set()
    if config.get("attention_bias"):
        biased |= {"q_proj", "k_proj", "v_proj", "o_proj"}
    if config.get("mlp_bias"):
        biased |= {"gate_proj", "up_proj", "down_proj"}
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if family in ("gemma2", "gemma3_text"):
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if family in ("olmo2", "olmo3"):
        norms = {"post_attention_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if family in ("olmo2", "olmo3", "olmoe"):
        norms |= {"self_attn.q_norm": heads * size, "self_attn.k_norm": keys}
    if family in ("qwen3", "qwen3_moe", "gemma3_text"):
        norms |= {"self_attn.q_norm": size, "self_attn.k_norm": size}
    if family == "bitnet":
        norms |= {"self_attn.attn_sub_norm": hidden, "mlp.ffn_sub_norm": inner}
    attention = {"q_proj": (heads * size, hidden), "k_proj": (keys, hidden)}
    attention |= {"v_proj": (keys, hidden), "o_proj": (hidden, heads * size)}
    feed = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    if family == "phi3":
        together = (heads * size + 2 * keys, hidden)
        attention = {"qkv_proj": together, "o_proj": attention["o_proj"]}
        feed = {"gate_up_proj": (2 * inner, hidden), "down_proj": feed["down_proj"]}
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        out |= {f"{at}{name}.weight": (n,) for name, n in norms.items()}
        if family == "stablelm":
            out |= {f"{at}{name}.bias": (n,) for name, n in norms.items()}
        fed = expert_shapes(config, i) or {f"mlp.{name}": shape for name, shape in feed.items()}
        for part, matrices in (("self_attn.", attention), ("", fed)):
            for name, shape in matrices.items():
                out[f"{at}{part}{name}.weight"] = shape
                if name.removeprefix("mlp.") in biased:
                    out[f"{at}{part}{name}.bias"] = shape[:1]
    out["model.norm.weight"] = (hidden,)
    if family == "stablelm":
        out["model.norm.bias"] = (hidden,)
    if not config.get("tie_word_embeddings", family.startswith("gemma")):
        out["lm_head.weight"] = (config["vocab_size"], hidden)
    return out


def expert_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    """The matrices of a layer's experts by their names within it; none of a dense layer."""
    count = config.get("num_local_experts", config.get("num_experts", 0))
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not count or (layer + 1) % step or layer in dense:
        return {}
    hidden = config["hidden_size"]
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    if config["model_type"] == "mixtral":
        at, names = "block_sparse_moe.", ("w1", "w3", "w2")
    else:
        at, names = "mlp.", ("gate_proj", "up_proj", "down_proj")
    out: dict[str, tuple[int, ...]] = {at + "gate": (count, hidden)}
    each = {f"{at}experts.{e}.": width for e in range(count)}
    shared = config.get("shared_expert_intermediate_size")
    if shared:
        each[at + "shared_expert."] = shared
        out[at + "shared_expert_gate"] = (1, hidden)
    for p, inner in each.items():
        out |= {p + names[0]: (inner, hidden), p + names[1]: (inner, hidden)}
        out[p + names[2]] = (hidden, inner)
    return out


def weights(case: Case, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """About normal: sums of four whole numbers, a deviation of 1182, scaled and rounded once."""
    key = zlib.crc32(f"{case.name}/{name}".encode())
    rng = np.random.Generator(np.random.Philox(key=[seed, key]))
    bell = rng.integers(-(2**10), 2**10, (4, *shape)).sum(axis=0) / 1182
    if len(shape) == 2:
        return (bell * (1.5 / math.sqrt(shape[1]))).astype(np.float32)
    norm = name.endswith("norm.weight") and not case.config["model_type"].startswith(
        "gemma"
    )  # theirs adds 1
    return (bell * 0.5 + (1 if norm else 0)).astype(np.float32)


def ternary(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """-1, 0 and 1, a little more than a third zeros."""
    return np.clip(np.rint(values * (math.sqrt(values.shape[1]) / 1.5)), -1, 1).astype(np.float32)


def packed(signs: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Four rows a byte, a quarter of the rows apart; two bits hold a weight + 1."""
    quarters = (signs + 1).astype(np.uint8).reshape(4, -1, signs.shape[1])
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None, None]
    return np.bitwise_or.reduce(quarters << shifts, axis=0)


def stored_tensors(
    case: Case, name: str, shape: tuple[int, ...], seed: int
) -> dict[str, tuple[NDArray[Any], str]]:
    """What the checkpoint holds of a tensor: names to values and their type."""
    values = weights(case, name, shape, seed)
    how = case.config.get("quantization_config", {"quantization_mode": "online"})
    if how.get("quantization_mode") == "online" or "_proj.weight" not in name:
        return {name: (values, case.stored if len(shape) == 2 else case.vectors or case.stored)}
    scale = np.float32(math.sqrt(shape[1]) / 2)
    if how.get("linear_class") == "autobitlinear":
        scale = 1 / scale
    out: dict[str, tuple[NDArray[Any], str]] = {name: (packed(ternary(values)), "u8")}
    return out | {name + "_scale": (np.full(1, scale, np.float32), "bf16")}


def stored_bytes(values: NDArray[Any], stored: str) -> bytes:
    """Little-endian bytes; bf16 is the upper half of a float32, rounded to nearest even."""
    if stored != "bf16":
        return values.astype({"f16": "<f2", "f32": "<f4", "u8": "u1"}[stored]).tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


@dataclass
class Shard:
    """A safetensors file on its way: 8 bytes of header size, header in JSON, tensors."""

    header: dict[str, Any] = field(default_factory=lambda: {"__metadata__": {"format": "pt"}})
    data: bytearray = field(default_factory=bytearray)

    def add(self, name: str, values: NDArray[Any], stored: str) -> None:
        """Append a tensor."""
        begin = len(self.data)
        self.data += stored_bytes(values, stored)
        self.header[name] = {
            "dtype": stored.upper(),
            "shape": list(values.shape),
            "data_offsets": [begin, len(self.data)],
        }

    def write(self, path: Path) -> None:
        """Write the file."""
        text = json.dumps(self.header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + self.data)


def write_folder(case: Case, seed: int, folder: Path) -> Path:
    """Write the case's checkpoint, sharded with an index if it asks for that."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config, indent=1))
    names = ["model.safetensors"]
    if case.shards > 1:
        names = [f"model-{i + 1:05}-of-{case.shards:05}.safetensors" for i in range(case.shards)]
    shards = {name: Shard() for name in names}
    weight_map = {}
    for i, (name, shape) in enumerate(shapes(case.config).items()):
        file = names[i % case.shards]  # a layer's tensors lie in different files
        for tensor, (values, stored) in stored_tensors(case, name, shape, seed).items():
            shards[file].add(tensor, values, stored)
            weight_map[tensor] = file
    for file, shard in shards.items():
        shard.write(folder / file)
    if case.shards > 1:
        size = sum(len(s.data) for s in shards.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def prompt(case: Case, seed: int) -> list[int]:
    """The case's token ids, some of them twice."""
    rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(case.name.encode())]))
    return rng.integers(0, case.config["vocab_size"], case.tokens).tolist()


def digest(folder: Path) -> str:
    """What tells one folder's content from another's."""
    out = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        out.update(path.name.encode() + b"\0" + path.read_bytes())
    return out.hexdigest()


def golden(case: Case) -> Path:
    """Where the recorded logits lie."""
    return Path(__file__).parent / f"{case.name}.npz"
