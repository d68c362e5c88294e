"""Families beyond the common decoder: settings that are read or refused, folding, BitNet's folders.

That their logits are transformers' is in test_parity.py, that all kernels agree in
test_exactness.py.
"""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

import chalot
import tiny
from chalot.describe import describe
from chalot.errors import UnsupportedError
from chalot.formats import safetensors
from chalot.formats.checkpoint import open_checkpoint
from chalot.kernels.backend import open_backend
from chalot.kernels.program import PAGE
from chalot.model import calibration
from chalot.model.config import ModelConfig, from_hugging_face, inverse_frequencies
from chalot.model.families import FAMILIES
from chalot.model.layers import model_tensors
from chalot.model.transformer import Weights, build
from chalot.quant.scheme import SCHEMES
from golden import cases
from golden.cases import CASES, Shard, bitnet, gemma, gemma2, llama, mistral, qwen2, qwen3
from test_exactness import FAMILIES as CHANGES
from test_exactness import feed, ids


def test_every_family_has_a_golden_case() -> None:
    assert {case.config["model_type"] for case in CASES.values()} == set(FAMILIES)


def test_what_families_leave_out() -> None:
    """A config.json need not say what its family's class has by default."""
    bare = ("sliding_window", "final_logit_softcapping", "query_pre_attn_scalar", "head_dim")
    found = from_hugging_face(cases.without(gemma2(), *bare, "attn_logit_softcapping"))
    assert found.windows == (4096, 0, 4096) and found.tied and found.head_dim == 256
    assert (found.score_cap, found.logit_cap, found.score_scale) == (50, 30, 1 / 16)
    assert from_hugging_face(cases.without(mistral(), "sliding_window")).windows == (4096, 4096)
    assert from_hugging_face(mistral(sliding_window=None)).windows == ()
    assert from_hugging_face(qwen2(sliding_window=9)).windows == ()
    some = qwen3(use_sliding_window=True, sliding_window=9, max_window_layers=1)
    assert from_hugging_face(some).windows == (0, 9)
    theirs = cases.without(bitnet("bitlinear"), "hidden_act", "rope_theta", "rms_norm_eps")
    found = from_hugging_face(theirs)
    assert (found.activation, found.rope_theta, found.norm_epsilon) == ("relu2", 5e5, 1e-5)


def test_the_embeddings_factor_is_of_the_checkpoints_type() -> None:
    """sqrt(2048) is 45.254834; in bfloat16 45.25. Written by either key."""
    for key, stored, factor in (
        ("torch_dtype", "bfloat16", 45.25),
        ("dtype", "bfloat16", 45.25),
        ("torch_dtype", "float16", 45.25),
        ("dtype", "float32", float(np.float32(np.sqrt(2048)))),
    ):
        config = cases.without(gemma(hidden_size=2048), "torch_dtype") | {key: stored}
        assert from_hugging_face(config).embedding_scale == factor
    config = gemma(hidden_size=3072)
    assert from_hugging_face(config).embedding_scale == 55.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (llama(sliding_window=64), "sliding_window is 64"),
        (gemma(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0"),
        (cases.stablelm(use_parallel_residual=True), "use_parallel_residual is True"),
        (cases.stablelm(qk_layernorm=True), "qk_layernorm is True"),
        (gemma2(use_bidirectional_attention=True), "use_bidirectional_attention is True"),
        (qwen2(use_mrope=True), "use_mrope is True"),
        (gemma(hidden_activation="silu"), "activation 'gelu'"),
        (gemma2(layer_types=["full_attention"]), "expected a list of 3"),
        (gemma2(layer_types=["full_attention", "chunked_attention", "x"]), "layer_types: known"),
        (qwen3(layer_types=["sliding_attention"] * 2), "switched off"),
        (llama(layer_types=["sliding_attention"] * 2), "switched off"),
        (mistral(layer_types=["full_attention"] * 2), "layer_types"),
        (mistral(sliding_window=-1), "sliding_window is -1"),
        (mistral(sliding_window="many"), "sliding_window is 'many'"),
        (mistral(sliding_window=1 << 60), "a whole number from 1 to 16,777,216"),
        (mistral(sliding_window=24.5), "sliding_window is 24.5"),
        (gemma2(query_pre_attn_scalar=-4), "query_pre_attn_scalar"),
        (gemma2(query_pre_attn_scalar=0), "query_pre_attn_scalar"),
        (gemma2(attn_logit_softcapping=-1.0), "attn_logit_softcapping is -1.0"),
        (gemma2(final_logit_softcapping=float("nan")), "final_logit_softcapping is nan"),
        (gemma2(final_logit_softcapping=1e-40), "final_logit_softcapping is 1e-40"),
        (gemma(hidden_size=-4), "hidden"),
        (gemma(hidden_size="wide"), "hidden"),
        (
            llama(rope_parameters={"full_attention": {"rope_theta": 1e4}, "other": {"x": 2}}),
            "rope differs",
        ),
        (llama(rope_scaling={"rope_type": "yarn", "factor": 4.0}, rope_theta=1.0), "rope_theta"),
        (llama(rope_scaling={"rope_type": "yarn"}), "factor is missing"),
        (
            llama(rope_scaling={"rope_type": "yarn", "factor": 4.0, "truncate": False}),
            "'truncate' is not known",
        ),
    ],
)
def test_what_is_not_done_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(chalot.ChalotError) as caught:
        from_hugging_face(config)
    assert message in str(caught.value)


def test_of_an_unknown_family_is_said_what_differs() -> None:
    """Settings that no family has, and that say something; those of some family are left out."""
    other = llama(model_type="cohere2", logit_scale=0.0625, sliding_window=64, use_qk_norm=False)
    with pytest.raises(UnsupportedError) as caught:
        from_hugging_face(other)
    said = str(caught.value)
    assert said.startswith("config.json: unknown architecture 'cohere2'; chalot runs: llama, ")
    assert said.endswith(", bitnet; settings that none of them has: ['logit_scale']")
    with pytest.raises(UnsupportedError, match=", bitnet$"):
        from_hugging_face(llama(model_type="lama"))


@pytest.mark.parametrize(
    "change",
    [
        {"windows": (1,)},
        {"windows": (-1, 0)},
        {"embedding_scale": 0.0},
        {"embedding_scale": float("inf")},
        {"score_cap": float("inf")},
        {"activation": "relu"},
        {"rope_scaling": {"factor": 2.0, "kind": "dynamic"}},
        {"rope_scaling": {"factor": 2.0}},
    ],
)
def test_a_manifest_of_nonsense_is_refused(change: dict[str, object]) -> None:
    fields = {**msgspec.structs.asdict(tiny.config()), **change}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields, ModelConfig)


def test_a_config_without_newer_features_has_none_of_their_fields() -> None:
    written = msgspec.to_builtins(tiny.config())
    assert set(written) <= {
        *("family", "hidden", "layers", "heads", "kv_heads", "head_dim", "feed_forward", "tied"),
        *("vocabulary", "context", "norm_epsilon", "rope_theta", "query_key_value_bias"),
    }
    for changes, _ in CHANGES.values():
        config = tiny.config(**changes)
        assert msgspec.convert(msgspec.to_builtins(config), ModelConfig) == config


@pytest.mark.parametrize("family", ["plain", *CHANGES])
def test_folding_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any powers of two between a matrix and what makes its input leave the logits as they are."""
    c = tiny.config(**CHANGES[family][0] if family in CHANGES else {})
    w = tiny.weights(c, {"*": "f32"})
    rng = np.random.default_rng(0)

    def best(trial: calibration.Trial, share: object) -> tuple[np.ndarray, int]:
        factor = np.ldexp(np.float32(1), rng.integers(-3, 4, trial.x.shape[1]))
        return (share(factor) if share else np.ones_like(factor)), 1  # type: ignore[operator]

    monkeypatch.setattr(calibration.Trial, "best", best)
    source = {n: m.data.view("<f4").reshape(m.shape[0], -1) for n, m in w.matrices.items()}
    source = {n: x[:, : w.matrices[n].shape[1]] for n, x in source.items()} | dict(w.vectors)
    schemes = dict.fromkeys(w.matrices, SCHEMES["int8"])
    backend, frequencies = open_backend(threads=1), inverse_frequencies(c)
    hidden = source["embedding"][:9] * np.float32(c.embedding_scale)
    work = calibration.Calibration(c, schemes, backend, frequencies, hidden)
    for i in range(c.layers):
        work.layer(i, source.__getitem__, SCHEMES["f32"])
    folded_into = 7 if c.pre_norms else 2  # every matrix of a layer, or those behind none
    assert len(work.plan.columns) == folded_into * c.layers
    folded = {name: work.plan.apply(name, source[name], 0) for name in source}
    other = Weights(
        {name: tiny.matrix(folded[name], "f32") for name in w.matrices},
        {name: folded[name] for name in w.vectors},
    )
    plain, changed = (
        feed(backend, build(c, x, frequencies, "f32"), [ids(2, 12)], 12)[0] for x in (w, other)
    )
    np.testing.assert_array_equal(plain, changed)


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3", "qwen3", "bitnet", "olmo2", "smollm3", "stablelm", "phi3-long"]
)
def test_a_described_family_is_the_converted_one(name: str, tmp_path: Path) -> None:
    """Before and after converting: the same tensors, bytes and memory; and it fits the estimate."""
    folder = cases.write_folder(CASES[name], 0, tmp_path / name)
    before = describe(folder, "int8")
    chalot.convert(folder, tmp_path / "m.myai", "int8", threads=1)
    after = describe(tmp_path / "m.myai")
    assert before.architecture == after.architecture
    shown = [
        [(t.name, t.kind, t.shape, t.scheme, t.bytes) for t in r.tensors] for r in (before, after)
    ]
    assert shown[0] == shown[1] and not before.origin.unused
    assert before.parameters == sum(int(np.prod(t.shape)) for t in model_tensors(config_of(name)))
    assert before.memory(PAGE).cache == after.memory(PAGE).cache


def config_of(name: str) -> ModelConfig:
    return from_hugging_face(CASES[name].config)


# ---- BitNet


def folder_of(name: str, place: Path) -> Path:
    return cases.write_folder(CASES[name], 0, place / name)


@pytest.mark.parametrize("name", ["bitnet", "bitnet-divided", "bitnet-master"])
def test_ternary_rows_are_read_as_packed(name: str, tmp_path: Path) -> None:
    """Any run of rows: the same numbers, -s, 0 and s, in the order of the unpacked matrix."""
    case = CASES[name]
    checkpoint = open_checkpoint(folder_of(name, tmp_path))
    tensor = "model.layers.1.self_attn.k_proj.weight"
    info = checkpoint.tensors[tensor]
    assert (info.dtype, info.shape, info.scheme) == ("bitnet", (64, 128), "ternary")
    assert tensor + "_scale" not in checkpoint.tensors
    found = checkpoint.float32(tensor)
    values = cases.weights(case, tensor, (64, 128), 0)
    if name == "bitnet-master":  # stored as bf16
        stored = np.frombuffer(cases.stored_bytes(values, "bf16"), "<u2").astype("<u4") << 16
        values = stored.view("<f4").reshape(values.shape)
        mean = np.abs(values).mean(dtype=np.float64)
        expected = np.clip(np.rint(values / mean), -1, 1) * np.float32(mean)
        np.testing.assert_allclose(found, expected, rtol=3e-7)
    else:
        unit = 2 / np.sqrt(128)  # 0.1767: of which bf16 keeps eight bits
        np.testing.assert_allclose(found, cases.ternary(values) * unit, rtol=4e-3)
    assert len(np.unique(np.abs(found))) == 2
    for first, last in ((0, 64), (0, 1), (15, 17), (17, 63), (63, 64), (20, 20)):
        np.testing.assert_array_equal(checkpoint.float32(tensor, first, last), found[first:last])
    with pytest.raises(IndexError):
        checkpoint.float32(tensor, 3, 65)
    with pytest.raises(chalot.ChalotError, match="packed"):
        checkpoint.raw(tensor)
    checkpoint.close()


def rewritten(folder: Path, name: str, values: np.ndarray | None, stored: str) -> None:
    """One tensor of the folder replaced, or taken out."""
    shard, case = Shard(), CASES["bitnet"]
    for tensor, shape in cases.shapes(case.config).items():
        for key, (found, kind) in cases.stored_tensors(case, tensor, shape, 0).items():
            if key != name:
                shard.add(key, found, kind)
            elif values is not None:
                shard.add(key, values, stored)
    shard.write(folder / "model.safetensors")


KEYS = "model.layers.0.self_attn.k_proj.weight"
ATTACKS: dict[str, tuple[str, np.ndarray | None, str, str]] = {
    "a fourth code": (KEYS, np.full((16, 128), 0b11, np.uint8), "u8", "none of -1, 0 and 1"),
    "floats of other values": (KEYS, np.full((64, 128), 0.5), "f32", "none of -1, 0 and 1"),
    "another shape": (KEYS, np.zeros((15, 128), np.uint8), "u8", "(60, 128)"),
    "a packed vector": (KEYS, np.zeros(64, np.uint8), "u8", "u8 of shape (64,)"),
    "no scale": (KEYS + "_scale", None, "", "its scale is missing"),
    "two scales": (KEYS + "_scale", np.ones(2), "f32", "expected one number"),
    "a scale of 0": (KEYS + "_scale", np.zeros(1), "f32", "expected a positive number"),
    "a scale below 0": (KEYS + "_scale", -np.ones(1), "f32", "expected a positive number"),
    "no number": (KEYS + "_scale", np.full(1, np.nan), "f32", "expected a positive number"),
    "a scale of bytes": (KEYS + "_scale", np.ones(1, np.uint8), "u8", "expected one number"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_damaged_bitnet_folder_is_refused(attack: str, tmp_path: Path) -> None:
    name, values, stored, message = ATTACKS[attack]
    folder = folder_of("bitnet", tmp_path)
    rewritten(folder, name, values, stored)
    with pytest.raises(chalot.ChalotError) as caught:
        chalot.convert(folder, tmp_path / "no.myai", threads=1)
    assert message in str(caught.value) and not (tmp_path / "no.myai").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rms_norm": True}, "without use_rms_norm"),
        ({"linear_class": "bitlinear", "quantization_mode": "online"}, "linear_class"),
        ({"linear_class": ["x"]}, "linear_class"),
        ({"quantization_mode": "sometimes"}, "quantization_mode"),
        ({"quantization_mode": "online", "modules_to_not_convert": ["model"]}, "modules"),
        ({"quant_method": "awq", "bits": 4}, "no matrix is packed so"),
        ({"quant_method": "bitsandbytes"}, "chalot reads bitnet, gptq"),
        ({"quant_method": ["gptq"]}, "quantised by"),
    ],
)
def test_a_packing_that_is_not_known_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = folder_of("bitnet", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(chalot.ChalotError, match=message):
        chalot.convert(folder, tmp_path / "no.myai", threads=1)


def test_ternary_floats_with_a_scale_are_read(tmp_path: Path) -> None:
    """transformers saves a loaded autobitlinear model so: three values as floats, and the scale."""
    folder = folder_of("bitnet", tmp_path)
    packed = open_checkpoint(folder)
    expected = packed.float32(KEYS)
    packed.close()
    rewritten(folder, KEYS, np.sign(expected), "f32")
    checkpoint = open_checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.float32(KEYS), expected)
    checkpoint.close()


def test_bytes_are_no_numbers(tmp_path: Path) -> None:
    """Without quantization_config, packed matrices are refused by their type."""
    folder = folder_of("bitnet", tmp_path)
    config = cases.without(CASES["bitnet"].config, "quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(chalot.ChalotError):
        chalot.convert(folder, tmp_path / "no.myai", threads=1)
    opened = safetensors.SafetensorsFolder(folder)
    with pytest.raises(UnsupportedError, match="is u8"):
        opened.float32(KEYS)
    with pytest.raises(UnsupportedError):
        opened.integers("model.norm.weight", 0, 1)
    opened.close()


def phi3_folder(tmp_path: Path) -> Path:
    return cases.write_folder(CASES["phi3"], 0, tmp_path / "phi3")


QKV = "model.layers.0.self_attn.qkv_proj.weight"
OUTPUT = "model.layers.0.self_attn.o_proj.weight"


def test_fused_matrices_are_given_apart(tmp_path: Path) -> None:
    """Rows of q, k and v, of gate and up, whatever part of them is asked for."""
    folder = phi3_folder(tmp_path)
    plain, apart = safetensors.SafetensorsFolder(folder), open_checkpoint(folder)
    q, k = CASES["phi3"].config["hidden_size"], 0
    whole = plain.float32(QKV)
    k = (len(whole) - q) // 2
    at = QKV.removesuffix("qkv_proj.weight")
    for name, first, last in (("q", 0, q), ("k", q, q + k), ("v", q + k, q + 2 * k)):
        found = f"{at}{name}_proj.weight"
        np.testing.assert_array_equal(apart.float32(found), whole[first:last])
        np.testing.assert_array_equal(apart.float32(found, 3, 9), whole[first:last][3:9])
        assert apart.tensors[found].nbytes == apart.raw(found).nbytes
    assert QKV not in apart.tensors and OUTPUT in apart.tensors
    with pytest.raises(IndexError):
        apart.float32(at + "k_proj.weight", 0, k + 1)
    plain.close(), apart.close()


@pytest.mark.parametrize("shape", [(1,), (5, 4), (4, 4), (1, 4)])
def test_fused_matrices_that_do_not_divide_are_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    values = np.zeros(shape, np.float32)
    safetensors.write(
        tmp_path / "model.safetensors",
        [(QKV, "f32", shape, values), (OUTPUT, "f32", (4, 4), np.zeros((4, 4), np.float32))],
    )
    with pytest.raises(chalot.ChalotError, match="do not fill"):
        open_checkpoint(tmp_path)


def test_granites_factors_are_the_others_numbers() -> None:
    """h / r with a norm of epsilon / r^2 is the same model as h with additions times r."""
    found = from_hugging_face(cases.granite(rms_norm_eps=1e-5))
    assert found.embedding_scale == 12 / 0.22 and found.norm_epsilon == 1e-5 / (0.22 * 0.22)
    assert (found.score_scale, found.logit_divisor) == (0.015625, 8)
    with pytest.raises(UnsupportedError, match="residual_multiplier"):
        from_hugging_face(llama(residual_multiplier=0.5))


def test_what_was_fused_is_written_so(tmp_path: Path) -> None:
    """Phi-3 as safetensors has the tensors that its folder had, number by number."""
    folder = phi3_folder(tmp_path)
    chalot.export(folder, tmp_path / "out", to="safetensors")
    had, has = (safetensors.SafetensorsFolder(p) for p in (folder, tmp_path / "out"))
    assert set(had.tensors) == set(has.tensors) and QKV in has.tensors
    for name in had.tensors:
        np.testing.assert_array_equal(had.float32(name), has.float32(name), name)
    had.close(), has.close()
