"""Whatever stands in a config.json: a model that can be computed, or an error that names it."""

from typing import Any

import pytest

from chalot.errors import FormatError, UnsupportedError
from chalot.model.config import from_hugging_face
from chalot.model.families import FAMILIES
from golden.cases import (
    OLD,
    YARN,
    bitnet,
    gemma,
    gemma2,
    gemma3,
    granite,
    llama,
    longrope,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
)

BASES: dict[str, dict[str, Any]] = {
    "llama": llama(**OLD),
    "mistral": mistral(),
    "qwen2": qwen2(rope_scaling=YARN, use_sliding_window=True, head_dim=32),
    "qwen3": qwen3(use_sliding_window=True, sliding_window=20),
    "gemma": gemma(),
    "gemma2": gemma2(),
    "gemma3_text": gemma3(),
    "phi3": phi3(**longrope(8)),
    "olmo2": olmo2(),
    "olmo3": olmo3(layer_types=None),
    "smollm3": smollm3(
        **{"layer_types": None, "use_sliding_window": True, "sliding_window": 20},
        **{"num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "stablelm": stablelm(hidden_size=256, num_attention_heads=32, num_key_value_heads=32),
    "granite": granite(),
    "bitnet": bitnet("autobitlinear"),
    "mixtral": mixtral(),
    "qwen2_moe": qwen2_moe(use_sliding_window=True),
    "qwen3_moe": qwen3_moe(use_sliding_window=True, sliding_window=20),
    "olmoe": olmoe(),
}
WHOLE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size", "max_position_embeddings", "sliding_window"),
)
OF_EXPERTS = (
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "decoder_sparse_step"),
)
POSITIVE = (
    *("rms_norm_eps", "layer_norm_eps", "rope_theta"),
    *("query_pre_attn_scalar", "attn_logit_softcapping"),
    *("final_logit_softcapping", "partial_rotary_factor", "rope_local_base_freq"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
)
OF_ROPE = (
    *("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("original_max_position_embeddings", "attention_factor"),
)
FACTORS = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
FLAGS = ("tie_word_embeddings", "attention_bias", "use_sliding_window")
NAN, INF = float("nan"), float("inf")
NO_NUMBERS: list[Any] = [0, -1, 1 << 120, 10**5000, INF, -INF, NAN, "8", "", True, [8], {"a": 8}]
NULL = (  # keys of which null says as much as nothing
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
    *("decoder_sparse_step", "num_experts", "num_local_experts"),
    *POSITIVE,
    *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
)


def refused(config: dict[str, Any], key: str) -> str:
    """What the error says, which names the key and is no longer than a few lines."""
    with pytest.raises((FormatError, UnsupportedError)) as caught:
        from_hugging_face(config)
    said = str(caught.value)
    assert key in said and len(said) < 400, said
    return said


def changed(family: str, key: str, value: Any) -> dict[str, Any]:
    """The base with another value, in its rope where the key is one of rope's."""
    base = BASES[family]
    if key not in OF_ROPE:
        return base | {key: value}
    return base | {"rope_scaling": base["rope_scaling"] | {key: value}}


def has(family: str, key: str) -> bool:
    if key in OF_ROPE:
        theirs = {"llama": OLD["rope_scaling"], "qwen2": {**YARN, "beta_slow": 1}}
        return key in theirs.get(family, {})
    return key in BASES[family] or key in FAMILIES[family].defaults


def test_the_bases_are_models() -> None:
    assert BASES.keys() == FAMILIES.keys()
    for base in BASES.values():
        from_hugging_face(base)


@pytest.mark.parametrize("family", BASES)
def test_a_number_that_is_none_is_named(family: str) -> None:
    tried = 0
    for key in (*WHOLE, *POSITIVE, *OF_ROPE, *OF_EXPERTS):
        if not has(family, key):
            continue
        whole = key in (*WHOLE, *OF_EXPERTS) or key == "original_max_position_embeddings"
        for value in [*NO_NUMBERS, *([2.5] if whole else [])]:
            said = refused(changed(family, key, value), key)
            assert "expected" in said and (value != 0 or " 0" in said), said
            tried += 1
        if key in NULL:
            from_hugging_face(changed(family, key, None))
        else:
            assert "None" in refused(changed(family, key, None), key)
    assert tried > 90


@pytest.mark.parametrize("family", BASES)
def test_a_missing_number_is_named_or_has_a_default(family: str) -> None:
    for key in WHOLE:
        left = {k: v for k, v in BASES[family].items() if k != key}
        if key in NULL or key in FAMILIES[family].defaults:
            from_hugging_face(left)
        else:
            assert "is missing" in refused(left, key)


@pytest.mark.parametrize("value", [0, 1, "true", [True], {}])
@pytest.mark.parametrize("key", FLAGS)
def test_a_switch_is_true_or_false(key: str, value: Any) -> None:
    assert "expected true or false" in refused(BASES["qwen3"] | {key: value}, key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size is 192; expected a multiple of the 5 heads"),
        ({"num_key_value_heads": 4}, "6 heads cannot share 4 key/value heads"),
        ({"num_key_value_heads": 12}, "6 heads cannot share 12 key/value heads"),
        ({"num_attention_heads": 64, "num_key_value_heads": 1}, "head size is 3; expected an even"),
        ({"head_dim": 33}, "head size is 33"),
        ({"head_dim": 2048}, "head size is 2048"),
        ({"num_hidden_layers": 5000}, "from 1 to 4,096"),
        ({"model_type": "mamba"}, "unknown architecture 'mamba'; chalot runs: llama, "),
        ({"model_type": None}, "unknown architecture None"),
        ({"model_type": ["llama"]}, "unknown architecture ['llama']"),
        ({"model_type": "x" * 10**6}, "unknown architecture 'xxx"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope scaling 'dynamic' is not known"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor is None; expected a list of"),
        ({"rope_scaling": {"rope_type": "su", "short_factor": [1, 0.7]}}, "short_factor is 0.7"),
        ({"rope_scaling": {"type": "longrope", **FACTORS}}, "3 factors of rope for 16 pairs"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope scaling ['yarn'] is not known"),
        ({"rope_scaling": {"type": None}}, "rope scaling None is not known"),
        ({"rope_scaling": [8]}, "rope_scaling is [8]; expected an object"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor is 0.5; expected"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5; expected a number from 1"),
        ({"hidden_act": "relu"}, "activation 'relu' is not known; known: silu"),
        ({"hidden_act": 5}, "activation 5 is not known"),
        ({"hidden_act": ["silu"]}, "activation ['silu'] is not known"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'; expected a list"),
    ],
)
def test_what_contradicts_itself(change: dict[str, Any], message: str) -> None:
    base = llama(hidden_size=192, num_attention_heads=6, num_key_value_heads=2)
    with pytest.raises((FormatError, UnsupportedError)) as caught:
        from_hugging_face(base | change)
    assert message in str(caught.value) and len(str(caught.value)) < 400
