"""Every family in every scheme that is meant for it: the same bits on every instruction set."""

from typing import Any

import pytest

import tiny
from chalot.kernels.backend import open_backend
from chalot.model.config import from_hugging_face
from chalot.model.families import FAMILIES
from golden.cases import (
    OLD,
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
from test_exactness import NATIVE, digest, feed, ids

TOKENS = 24
SMALL = {"hidden_size": 96, "intermediate_size": 72, "vocab_size": 85, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": llama(),
    "llama3": llama(**OLD),
    "mistral": mistral(sliding_window=9),
    "qwen2": qwen2(),
    "qwen3": qwen3(use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "gemma": gemma(),
    "gemma2": gemma2(sliding_window=9),
    "gemma3": gemma3(sliding_window=9, layer_types=["sliding_attention", "full_attention"]),
    "phi3": phi3(sliding_window=9),
    "phi3-long": phi3(**longrope(9), partial_rotary_factor=0.75),
    "olmo2": olmo2(),
    "olmo3": olmo3(sliding_window=9, layer_types=["sliding_attention", "full_attention"]),
    "stablelm": stablelm(partial_rotary_factor=0.5),
    "smollm3": smollm3(no_rope_layers=[1, 0], layer_types=None),
    "granite": granite(),
    "bitnet": bitnet("autobitlinear"),
    "mixtral": mixtral(),
    "qwen2_moe": qwen2_moe(num_experts=20),
    "qwen3_moe": qwen3_moe(mlp_only_layers=[0]),
    "olmoe": olmoe(),
}


def test_no_family_is_left_out() -> None:
    assert {c["model_type"] for c in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("scheme", ["nl4", "int8", "int6", "ternary"])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_in_every_scheme(family: str, scheme: str) -> None:
    """Scalar is numpy's; the others are scalar's, in one piece, in pieces and token by token."""
    config = from_hugging_face(CONFIGS[family] | SMALL | HEADS)
    program = tiny.program(config, scheme, cache="int8")
    text = [ids(5, TOKENS) % 85]
    oracle = digest(feed(open_backend("reference"), program, text, TOKENS)[0])
    for isa in NATIVE:
        for threads, chunk in ((1, TOKENS), (3, 5), (2, 1)):
            got = digest(feed(open_backend(isa, threads), program, text, chunk)[0])
            assert got == oracle, (isa, threads, chunk)
