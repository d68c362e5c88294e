"""The outlier twin: same function, exact factors, real outliers. A numpy model is the oracle."""

import numpy as np
import pytest

from chalot.demo.twin import NORM_CHANNELS, ROPE_PAIRS, UP_ROWS, outlier_twin
from chalot.errors import UnsupportedError

HIDDEN, LAYERS, HEADS, KV_HEADS, DIM, FFN = 48, 2, 6, 2, 8, 64
CONFIG = {
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "intermediate_size": FFN,
}


def checkpoint(bias: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = {"model.embed_tokens.weight": (11, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        for name, rows in (("q", HEADS * DIM), ("k", KV_HEADS * DIM), ("v", KV_HEADS * DIM)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            if bias:
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
        shapes[p + "self_attn.o_proj.weight"] = (HIDDEN, HEADS * DIM)
        shapes[p + "mlp.gate_proj.weight"] = (FFN, HIDDEN)
        shapes[p + "mlp.up_proj.weight"] = (FFN, HIDDEN)
        shapes[p + "mlp.down_proj.weight"] = (HIDDEN, FFN)
        shapes[p + "input_layernorm.weight"] = (HIDDEN,)
        shapes[p + "post_attention_layernorm.weight"] = (HIDDEN,)
    return {
        name: np.float32(1 if "norm" in name else 0)
        + rng.standard_normal(shape, dtype=np.float32) * np.float32(0.2)
        for name, shape in shapes.items()
    }


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def rope(x: np.ndarray) -> np.ndarray:
    """x: (tokens, heads, DIM), half-split."""
    angle = np.arange(len(x))[:, None] / 100.0 ** (np.arange(DIM // 2) / (DIM // 2))
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    left, right = x[..., : DIM // 2], x[..., DIM // 2 :]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def logits(tensors: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """A Qwen2 decoder in float64."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = t["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        h = norm(x, t[p + "input_layernorm.weight"])
        q, k, v = (
            (h @ t[f"{p}self_attn.{n}_proj.weight"].T + t.get(f"{p}self_attn.{n}_proj.bias", 0.0))
            .reshape(len(ids), -1, DIM)
            .copy()
            for n in "qkv"
        )
        k, v = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (rope(k), v))
        scores = np.einsum("thd,shd->hts", rope(q), k) / np.sqrt(DIM)
        scores[:, ~np.tri(len(ids), dtype=bool)] = -np.inf
        share = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", share / share.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(len(ids), -1) @ t[p + "self_attn.o_proj.weight"].T
        h = norm(x, t[p + "post_attention_layernorm.weight"])
        gate = h @ t[p + "mlp.gate_proj.weight"].T
        up = h @ t[p + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ t[p + "mlp.down_proj.weight"].T
    return norm(x, t["model.norm.weight"]) @ t["model.embed_tokens.weight"].T


@pytest.mark.parametrize("bias", [True, False])
def test_twin_is_the_same_function(bias: bool) -> None:
    plain = checkpoint(bias)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    np.testing.assert_allclose(
        logits(outlier_twin(plain, CONFIG), ids), logits(plain, ids), rtol=0, atol=1e-10
    )


def test_names_and_shapes_stay_and_the_source_is_untouched() -> None:
    plain = checkpoint()
    twin = outlier_twin(plain, CONFIG)
    assert {n: a.shape for n, a in twin.items()} == {n: a.shape for n, a in plain.items()}
    assert all(a.dtype == np.float32 for a in twin.values())
    assert all(np.array_equal(plain[name], fresh) for name, fresh in checkpoint().items())


def test_every_factor_is_a_power_of_two() -> None:
    plain = checkpoint()
    for name, tensor in outlier_twin(plain, CONFIG).items():
        mantissa, _ = np.frexp(tensor / plain[name])
        assert np.all(mantissa == 0.5), name


def test_norms_times_next_columns_are_preserved_exactly() -> None:
    plain = checkpoint()
    twin = outlier_twin(plain, CONFIG)
    for norm_name, matrix_name in (
        ("model.layers.1.post_attention_layernorm", "model.layers.1.mlp.gate_proj"),
        ("model.layers.0.input_layernorm", "model.layers.0.self_attn.v_proj"),
    ):
        scale, matrix = norm_name + ".weight", matrix_name + ".weight"
        assert np.array_equal(twin[scale] * twin[matrix], plain[scale] * plain[matrix])


def test_outliers_are_as_large_as_promised() -> None:
    plain = checkpoint()
    twin = outlier_twin(plain, CONFIG)
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            before, after = plain[f"{p}{name}.weight"], twin[f"{p}{name}.weight"]
            assert np.count_nonzero(after / before >= 32) == NORM_CHANNELS
            assert np.abs(after).max() >= 20 * np.median(np.abs(after))
        ratio = plain[p + "mlp.down_proj.weight"] / twin[p + "mlp.down_proj.weight"]
        assert np.count_nonzero(ratio[0] >= 64) == UP_ROWS


def test_the_largest_key_biases_grow_and_rope_pairs_move_together() -> None:
    plain = checkpoint()
    twin = outlier_twin(plain, CONFIG)
    name = "model.layers.0.self_attn.{}_proj.bias"
    key = (twin[name.format("k")] / plain[name.format("k")]).reshape(KV_HEADS, 2, DIM // 2)
    query = (twin[name.format("q")] / plain[name.format("q")]).reshape(KV_HEADS, -1, 2, DIM // 2)
    assert np.array_equal(key[:, 0], key[:, 1])
    assert np.array_equal(query, np.broadcast_to(1 / key[:, None], query.shape))
    assert np.all(np.count_nonzero(key[:, 0] >= 16, axis=1) == min(ROPE_PAIRS, DIM // 2))
    before, after = (
        np.abs(a[name.format("k")]).reshape(KV_HEADS, -1).max(1) for a in (plain, twin)
    )
    assert np.all(after >= 16 * before)


def test_seed_decides() -> None:
    plain = checkpoint()
    first, again, other = (outlier_twin(plain, CONFIG, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(first[name], again[name]) for name in plain)
    assert any(not np.array_equal(first[name], other[name]) for name in plain)


def test_an_architecture_with_another_norm_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="gemma"):
        outlier_twin(checkpoint(), CONFIG | {"model_type": "gemma"})
