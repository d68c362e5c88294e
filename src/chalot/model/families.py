"""How each family's `config.json` departs from the common decoder: a row of `FAMILIES` each."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from chalot.model.experts import ExpertKeys
from chalot.model.settings import Settings, flag, whole, wrong


class Family(msgspec.Struct, frozen=True):
    """How a family's configuration and function depart from the common ones.

    A bias is a key of the configuration, or always so. `defaults` is what config.json may leave out
    or set to null; of `OPTIONAL` it names those that the family has.
    """

    defaults: Settings = {}
    query_key_value_bias: bool | str = False
    output_bias: bool | str = False
    feed_forward_bias: bool | str = False
    windowed: Callable[[Settings, int], bool] | None = None  # whether a layer has the window
    activations: Mapping[str, str] = {}  # beside GATES
    norm_offset: float = 0.0  # checkpoints hold norm weights less this
    embedding_scaled: bool = False  # by sqrt(hidden), rounded to the checkpoint's type
    head_norms: bool = False
    pre_norms: bool = True
    centred_norms: bool = False
    post_norms: bool = False
    inner_norms: bool = False
    whole_norms: bool = False
    experts: ExpertKeys | None = None
    multiplied: bool = False  # embedding, scores, what is added, logits: see `multipliers`
    local_rope: bool = False  # layers with a window have a rope of their own, unscaled
    partial_rope: bool = False  # `partial_rotary_factor` may be less than 1
    turned: Callable[[Settings, int], bool] | None = None  # whether a layer has rope


def switched_on(config: Settings, layer: int) -> bool:
    """Qwen3-MoE's rule: the window is for all layers or none."""
    return flag(config, "use_sliding_window")


def early_odd_layers(config: Settings, layer: int) -> bool:
    """Qwen2-MoE's rule: the window, where it is on, is for each second one of the first layers."""
    late = late_layers(config, layer)
    return flag(config, "use_sliding_window") and layer % 2 == 0 and not late


def late_layers(config: Settings, layer: int) -> bool:
    """Qwen's rule: the window, where it is switched on, is for layers from one on."""
    if not flag(config, "use_sliding_window"):
        return False
    first = config["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise wrong("max_window_layers", first, "a whole number, 0 or more")
    return layer >= first


def all_but_each_sixth(config: Settings, layer: int) -> bool:
    """Gemma 3's rule, of which older configurations name the number."""
    return (layer + 1) % whole(config, "sliding_window_pattern", 6) != 0


def rope_by_list(config: Settings, layer: int) -> bool:
    """SmolLM3's rule: 1 in `no_rope_layers` is a layer with rope; else each n-th goes without."""
    listed = config["no_rope_layers"]
    if listed is None:
        return (layer + 1) % whole(config, "no_rope_layer_interval", 4) != 0
    layers = whole(config, "num_hidden_layers")
    if not isinstance(listed, list) or len(listed) < layers or not set(listed) <= {0, 1}:
        raise wrong("no_rope_layers", listed, f"a list of 0 and 1 for {layers} layers")
    return bool(listed[layer])


QWEN = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28} | {
    "layer_types": None
}
COUNTS: dict[str, Any] = {"num_experts": None, "num_local_experts": None}
QWEN_EXPERTS = {
    **COUNTS,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
}
GEMMA2 = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256} | {
    "layer_types": None
}
GEMMA3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208} | {
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 4096,
}
GEMMA = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}
FAMILIES = {
    "llama": Family({}, "attention_bias", "attention_bias", "mlp_bias"),
    "mistral": Family({"sliding_window": 4096}, windowed=lambda config, layer: True),
    "qwen2": Family(QWEN, True, windowed=late_layers),
    "qwen3": Family(
        QWEN | {"head_dim": 128},
        "attention_bias",
        "attention_bias",
        windowed=late_layers,
        head_norms=True,
    ),
    "gemma": Family(
        GEMMA | {"hidden_act": "gelu_pytorch_tanh"},
        "attention_bias",
        "attention_bias",
        activations={"gelu": "gelu_tanh"},
        norm_offset=1,
        embedding_scaled=True,
    ),
    "gemma2": Family(
        GEMMA
        | GEMMA2
        | {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        "attention_bias",
        "attention_bias",
        windowed=lambda config, layer: layer % 2 == 0,
        activations={"gelu": "gelu_tanh"},
        norm_offset=1,
        embedding_scaled=True,
        post_norms=True,
    ),
    "gemma3_text": Family(
        GEMMA | GEMMA2 | GEMMA3,
        "attention_bias",
        "attention_bias",
        windowed=all_but_each_sixth,
        local_rope=True,
        activations={"gelu": "gelu_tanh"},
        norm_offset=1,
        embedding_scaled=True,
        head_norms=True,
        post_norms=True,
    ),
    "phi3": Family(
        {"sliding_window": None, "rms_norm_eps": 1e-5}
        | {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        windowed=lambda config, layer: True,
        partial_rope=True,
    ),
    "olmo2": Family(
        {"rms_norm_eps": 1e-5},
        "attention_bias",
        "attention_bias",
        whole_norms=True,
        pre_norms=False,
        post_norms=True,
    ),
    "olmo3": Family(
        {"rms_norm_eps": 1e-5, "sliding_window": 4096, "layer_types": None, "rope_theta": 5e5},
        "attention_bias",
        "attention_bias",
        windowed=lambda config, layer: (layer + 1) % 4 != 0,
        local_rope=True,
        whole_norms=True,
        pre_norms=False,
        post_norms=True,
    ),
    "smollm3": Family(
        {"sliding_window": None, "use_sliding_window": False, "layer_types": None}
        | {"no_rope_layers": None, "tie_word_embeddings": True}
        | {"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6},
        "attention_bias",
        "attention_bias",
        "mlp_bias",
        windowed=lambda config, layer: (
            flag(config, "use_sliding_window") and not rope_by_list(config, layer)
        ),
        turned=rope_by_list,
    ),
    "stablelm": Family(
        {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "num_key_value_heads": 32}
        | {"max_position_embeddings": 4096},
        "use_qkv_bias",
        centred_norms=True,
        partial_rope=True,
    ),
    "granite": Family(
        {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0}
        | {"logits_scaling": 1.0},
        "attention_bias",
        "attention_bias",
        "mlp_bias",
        multiplied=True,
    ),
    "mixtral": Family(
        COUNTS
        | {"sliding_window": None, "num_experts_per_tok": 2}
        | {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
        windowed=lambda config, layer: True,
        experts=ExpertKeys("intermediate_size", True, usual=8),
    ),
    "qwen2_moe": Family(
        QWEN
        | QWEN_EXPERTS
        | {"qkv_bias": True, "moe_intermediate_size": 1408}
        | {"shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4},
        "qkv_bias",
        windowed=early_odd_layers,
        experts=ExpertKeys(
            "moe_intermediate_size", "norm_topk_prob", "shared_expert_intermediate_size", True, 60
        ),
    ),
    "qwen3_moe": Family(
        QWEN | QWEN_EXPERTS | {"moe_intermediate_size": 768, "num_experts_per_tok": 8},
        "attention_bias",
        "attention_bias",
        windowed=switched_on,
        head_norms=True,
        experts=ExpertKeys("moe_intermediate_size", "norm_topk_prob", sparse=True, usual=128),
    ),
    "olmoe": Family(
        COUNTS | {"rms_norm_eps": 1e-5, "num_experts_per_tok": 8},
        "attention_bias",
        "attention_bias",
        whole_norms=True,
        experts=ExpertKeys("intermediate_size", "norm_topk_prob", usual=64),
    ),
    "bitnet": Family(
        {"hidden_act": "relu2", "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
        "attention_bias",
        "attention_bias",
        inner_norms=True,
    ),
}
OPTIONAL = {  # settings of some families, refused in the others
    *("sliding_window", "query_pre_attn_scalar", "use_bidirectional_attention", "use_mrope"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    *("rope_local_base_freq", "no_rope_layers", "qk_layernorm", "use_parallel_residual"),
    *("clip_qkv", "num_experts", "num_local_experts", "n_routed_experts"),
}
READ = {  # settings of every family
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "intermediate_size", "vocab_size", "max_position_embeddings"),
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *("hidden_act", "hidden_activation", "tie_word_embeddings", "attention_bias", "mlp_bias"),
    *("layer_types", "torch_dtype", "dtype"),
}
BESIDE = {  # what does not change what a model computes
    *("architectures", "auto_map", "transformers_version", "_name_or_path", "tokenizer_class"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "pretraining_tp"),
    *("initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"),
}


def unfamiliar(config: Settings) -> list[str]:
    """The settings of a configuration that no family has, and that say something."""
    known = READ.union(BESIDE, OPTIONAL, *(row.defaults for row in FAMILIES.values()))
    return sorted(key for key in config.keys() - known if config[key])


GATES = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
