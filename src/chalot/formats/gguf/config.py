"""A GGUF file's metadata as the `config.json` that its Hugging Face model would have.

An architecture is a row of `ARCHITECTURES`. What the metadata asks for and no row knows is an
error, never passed over. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, UnsupportedError
from chalot.formats.gguf import experts as gguf_experts
from chalot.formats.gguf.header import Metadata, Stored, quoted_value

Config = dict[str, Any]
Values = Callable[[str], NDArray[np.float32]]  # a tensor by GGUF's name

ROPE_DIVISORS = "rope_freqs.weight"
ROPE_FACTORS = {
    "short_factor": "rope_factors_short.weight",
    "long_factor": "rope_factors_long.weight",
}


class Architecture(NamedTuple):
    """`fields` are the same for all models, `caps` come from the metadata.

    Of what is in NEUTRAL and `neutral` another value than there is refused.
    """

    fields: Config
    caps: Mapping[str, tuple[str, float]] = {}  # field -> (key, default)
    neutral: Mapping[str, Any] = {}
    partial_rope: bool = False
    epsilon: tuple[str, str] = ("rms_norm_eps", "layer_norm_rms_epsilon")  # its field, its key


GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture({"model_type": "llama", "hidden_act": "silu"}),
    "qwen2": Architecture({"model_type": "qwen2", "hidden_act": "silu"}),
    "qwen3": Architecture({"model_type": "qwen3", "hidden_act": "silu"}),
    "gemma": Architecture({"model_type": "gemma", **GELU}),
    "gemma2": Architecture(
        {"model_type": "gemma2", **GELU},
        {
            "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": ("final_logit_softcapping", 30.0),
        },
    ),
    "gemma3": Architecture({"model_type": "gemma3_text", **GELU}),
    "olmo2": Architecture(
        {"model_type": "olmo2", "hidden_act": "silu"},
        neutral={"attention.sliding_window": 0},  # OLMo 3 has one
    ),
    "smollm3": Architecture(
        {"model_type": "smollm3", "hidden_act": "silu", "no_rope_layer_interval": 4}
    ),
    "stablelm": Architecture(
        {"model_type": "stablelm", "hidden_act": "silu"},
        partial_rope=True,
        epsilon=("layer_norm_eps", "layer_norm_epsilon"),
    ),
    "phi3": Architecture({"model_type": "phi3", "hidden_act": "silu"}, partial_rope=True),
    "granite": Architecture(
        {"model_type": "granite", "hidden_act": "silu"},
        {
            "embedding_multiplier": ("embedding_scale", 1.0),
            "residual_multiplier": ("residual_scale", 1.0),
            "attention_multiplier": ("attention.scale", 0.0),
            "logits_scaling": ("logit_scale", 1.0),
        },
    ),
    "qwen2moe": Architecture({"model_type": "qwen2_moe", "hidden_act": "silu"}),
    "qwen3moe": Architecture({"model_type": "qwen3_moe", "hidden_act": "silu"}),
    "olmoe": Architecture({"model_type": "olmoe", "hidden_act": "silu"}),
    "bitnet": Architecture({"model_type": "bitnet", "hidden_act": "silu"}),
    "bitnet-b1.58": Architecture({"model_type": "bitnet", "hidden_act": "relu2"}),
}
CLASSES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM", "olmoe": "OlmoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "bitnet": "BitNetForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM", "olmo2": "Olmo2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM", "stablelm": "StableLmForCausalLM",
    "phi3": "Phi3ForCausalLM", "granite": "GraniteForCausalLM",
}  # fmt: skip
NEUTRAL: Config = {  # what changes a model's function -> the value that does not
    "use_parallel_residual": False, "attention.causal": True, "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0, "attention.scale": 0, "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0, "embedding_scale": 1, "residual_scale": 1, "logit_scale": 1,
}  # fmt: skip
WIDE_LAYERS = {"gemma2": 46, "gemma3": 62}  # of those whose scores are not scaled by a head's size


def architecture_of(metadata: Metadata) -> str:
    """The architecture's name. Raises UnsupportedError for one that is not known."""
    kind = metadata.text("general.type", "model")
    if kind != "model":
        raise UnsupportedError(
            f"{metadata.where}: holds a {quoted_value(kind)}, expected a whole model"
        )
    found = metadata.text("general.architecture")
    if found not in ARCHITECTURES:
        raise UnsupportedError(
            f"{metadata.where}: architecture {quoted_value(found)} is not known; "
            f"chalot runs: {', '.join(ARCHITECTURES)}"
        )
    return found


def make_config(metadata: Metadata, tensors: Mapping[str, Stored], read: Values) -> Config:
    """The fields of `config.json`. `tensors` have GGUF's names; `read` gives small ones.

    Raises FormatError where metadata is missing or contradicts itself, UnsupportedError for
    features that no row knows.
    """
    name = architecture_of(metadata)
    row = ARCHITECTURES[name]

    def integer(key: str, default: int | None = None) -> int:
        return metadata.integer(f"{name}.{key}", default)

    _refuse_unknown(metadata, name, row, tensors)
    hidden, heads = integer("embedding_length"), integer("attention.head_count")
    theta = metadata.number(f"{name}.rope.freq_base", 10_000.0)
    if hidden < 1 or heads < 1 or theta <= 0:
        raise FormatError(
            f"{metadata.where}: found {heads} heads of {hidden} numbers in all, and {theta} as "
            "rope's base; expected positive numbers"
        )
    turning = None if row.partial_rope else integer("rope.dimension_count", hidden // heads)
    head = integer("attention.key_length", turning or hidden // heads)
    if head < 1:
        raise FormatError(f"{metadata.where}: heads have {head} numbers, expected 1 or more")
    whole = ("attention.value_length", *(() if row.partial_rope else ("rope.dimension_count",)))
    for key in whole:
        if integer(key, head) != head:
            raise UnsupportedError(
                f"{metadata.where}: {name}.{key} is {integer(key)}, expected the {head} numbers "
                "that a head has"
            )
    config = {
        "architectures": [CLASSES[row.fields["model_type"]]],
        **row.fields,
        "vocab_size": _rows_of_tokens(metadata, tensors),
        "hidden_size": hidden,
        "num_hidden_layers": integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": integer("attention.head_count_kv", heads),
        "head_dim": head,
        "intermediate_size": integer("feed_forward_length", _feed(tensors)),
        "max_position_embeddings": integer("context_length"),
        row.epsilon[0]: metadata.number(f"{name}.attention.{row.epsilon[1]}"),
        "rope_theta": theta,
        "rope_scaling": _scaling(metadata, name, tensors, read, theta, head),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        **{f: metadata.number(f"{name}.{key}", d) for f, (key, d) in row.caps.items()},
    }
    if name in WIDE_LAYERS:
        wide = config["num_hidden_layers"] == WIDE_LAYERS[name]
        config["query_pre_attn_scalar"] = hidden // heads if wide else head
        window = 4096 if name == "gemma2" else None  # which Gemma 3's files say
        config["sliding_window"] = integer("attention.sliding_window", window)
    if name == "gemma3":
        config["rope_local_base_freq"] = metadata.number(f"{name}.rope.freq_base_swa", 10_000.0)
        config["sliding_window_pattern"] = integer("attention.sliding_window_pattern", 6)
    config |= gguf_experts.settings(metadata, name, tensors, config["num_hidden_layers"])
    if "num_local_experts" in config:
        config |= {"model_type": "mixtral", "architectures": [CLASSES["mixtral"]]}
    if row.partial_rope:
        config["partial_rotary_factor"] = integer("rope.dimension_count", head) / head
    if name == "stablelm":
        config["use_qkv_bias"] = config["attention_bias"]
    if name == "phi3":
        original = integer(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        config["original_max_position_embeddings"] = original
        config["sliding_window"] = integer("attention.sliding_window", 0) or None
    if name == "granite":
        config["attention_multiplier"] = config["attention_multiplier"] or head**-0.5
    if name == "qwen2moe":
        config["qkv_bias"] = config["attention_bias"]
    for token in ("bos", "eos", "padding"):
        key = f"tokenizer.ggml.{token}_token_id"
        if key in metadata:
            config[f"{token.removesuffix('ding')}_token_id"] = metadata.integer(key)
    return {key: value for key, value in config.items() if value is not None}


def _feed(tensors: Mapping[str, Stored]) -> int | None:
    """Of a mixture without dense layers, where metadata may say 0 or nothing: any number does."""
    return 1 if any(".ffn_gate_inp." in name for name in tensors) else None


def _rows_of_tokens(metadata: Metadata, tensors: Mapping[str, Stored]) -> int:
    """Rows of the embedding. Raises FormatError where there are too few for the tokens."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError(f"{metadata.where}: tensor token_embd.weight is missing or no matrix")
    tokens = metadata.texts("tokenizer.ggml.tokens", [])
    if len(tokens) > embedding.shape[0]:
        raise FormatError(
            f"{metadata.where}: has {len(tokens):,} tokens, its embedding {embedding.shape[0]:,} "
            "rows; expected a row for each token"
        )
    return embedding.shape[0]


def _refuse_unknown(
    metadata: Metadata, name: str, row: Architecture, tensors: Mapping[str, Stored]
) -> None:
    """Raise UnsupportedError for what would change the function, and the row does not know."""
    neutral = {**NEUTRAL, **row.neutral}
    if "blk.0.ffn_norm.weight" in tensors:  # by which llama.cpp goes, whatever the file says
        del neutral["use_parallel_residual"]
    for short in sorted(neutral.keys() - {key for key, _ in row.caps.values()}):
        key = f"{name}.{short}"
        found = metadata.values.get(key, neutral[short])
        if isinstance(found, np.ndarray | list) or found != neutral[short]:
            raise UnsupportedError(
                f"{metadata.where}: metadata {key} is {quoted_value(found)}; chalot runs {name} "
                "models without it"
            )


# ---- rope


def _scaling(
    metadata: Metadata,
    name: str,
    tensors: Mapping[str, Stored],
    read: Values,
    theta: float,
    head: int,
) -> Config | None:
    """`rope_scaling`, from metadata or from the tensor that divides frequencies."""
    key = f"{name}.rope.scaling"
    kind = metadata.text(f"{key}.type", "none")
    factor = metadata.number(f"{key}.factor", metadata.number(f"{name}.rope.scale_linear", 1.0))
    if any(of in tensors for of in ROPE_FACTORS.values()):
        for of in ROPE_FACTORS.values():
            if of not in tensors:
                raise FormatError(f"{metadata.where}: tensor {of} is missing beside the other one")
        lists = {field: [float(d) for d in read(of)] for field, of in ROPE_FACTORS.items()}
        sharper = metadata.number(f"{key}.attn_factor", 1.0)
        return {"rope_type": "longrope", "attention_factor": sharper, **lists}
    if ROPE_DIVISORS in tensors:
        if tensors[ROPE_DIVISORS].shape != (head // 2,):
            raise FormatError(
                f"{metadata.where}: tensor {ROPE_DIVISORS} has shape "
                f"{tensors[ROPE_DIVISORS].shape}, expected ({head // 2},)"
            )
        divisors = [float(d) for d in read(ROPE_DIVISORS)]
        return llama3_scaling(divisors, theta, head, metadata.where)
    if factor == 1 or kind == "none" and f"{name}.rope.scale_linear" not in metadata:
        return None
    scaling: Config = {"rope_type": "linear" if kind == "none" else kind, "factor": factor}
    if kind == "yarn":
        original = f"{key}.original_context_length"
        scaling["original_max_position_embeddings"] = metadata.integer(original)
        for field, setting in (
            ("attention_factor", "attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if f"{key}.{setting}" in metadata:
                scaling[field] = metadata.number(f"{key}.{setting}")
    return scaling


def llama3_scaling(
    divisors: Sequence[float], theta: float, head: int, where: object
) -> Config | None:
    """The "llama3" rule that gives these divisors of rope's frequencies, by pair; None for ones.

    A pair that turns `turns` times in the original context keeps (turns - low) / (high - low) of
    its frequency, between 0 and 1, and has the rest divided by `factor`. Files hold only what
    follows from low, high and the original context: a line through the pairs in between, up to a
    common factor, which is chosen so that low is 1. Raises UnsupportedError for other divisors.
    """
    if not all(math.isfinite(d) and d > 0 for d in divisors):
        raise FormatError(f"{where}: tensor {ROPE_DIVISORS} has values that are no divisors")
    factor = max(divisors)
    if factor == min(divisors) == 1:
        return None
    turns = [theta ** (-2 * i / head) / (2 * math.pi) for i in range(head // 2)]  # in one position
    kept = [(1 / d - 1 / factor) / (1 - 1 / factor) if factor > 1 else 1.0 for d in divisors]
    between = [(t, k) for t, k in zip(turns, kept, strict=True) if 1e-4 < k < 1 - 1e-4]
    for low, high, context in _candidates(between, turns, kept):
        scaling = {
            "rope_type": "llama3",
            "factor": float(f"{factor:.7g}"),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
        if context > 0 and 0 < low < high and _gives(scaling, divisors, turns):
            return scaling
    raise UnsupportedError(
        f"{where}: tensor {ROPE_DIVISORS} does not follow llama3's rule, the only one known"
    )


def _candidates(
    between: list[tuple[float, float]], turns: list[float], kept: list[float]
) -> list[tuple[float, float, int]]:
    """(low, high, original context), the usual ones first."""
    found = [(1.0, 4.0, round((3 * k + 1) / t)) for t, k in between[:1]]
    if len(between) > 1 and between[0][0] != between[-1][0]:
        (t1, k1), (t2, k2) = between[0], between[-1]
        slope = (k1 - k2) / (t1 - t2)
        offset = k1 - slope * t1
        if slope > 0 > offset:
            context = round(slope / -offset)
            low, width = context * -offset / slope, context / slope
            found.append((1.0, float(f"{1 + width:.5g}"), context))
            found.append((low, low + width, context))
    if not between:
        slow = max((t for t, k in zip(turns, kept, strict=True) if k < 0.5), default=0.0)
        fast = min((t for t, k in zip(turns, kept, strict=True) if k > 0.5), default=1.0)
        found += [(1.0, 4.0, 8192), (slow * 8192, fast * 8192, 8192)]
    return found


def _gives(scaling: Config, divisors: Sequence[float], turns: list[float]) -> bool:
    """Whether the rule gives these divisors, to float32's precision."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    for divisor, turn in zip(divisors, turns, strict=True):
        share = (scaling["original_max_position_embeddings"] * turn - low) / (high - low)
        keep = min(max(share, 0.0), 1.0)
        if abs(divisor * ((1 - keep) / scaling["factor"] + keep) - 1) > 1e-5:
            return False
    return True
