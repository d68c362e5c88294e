"""Mixtures made of a dense model: what equals it, what does not, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chalot
from chalot.bench import weight_bytes
from chalot.calibration_text import CalibrationText
from chalot.checking import check_shapes, read_config
from chalot.describe import describe
from chalot.describe.description import render
from chalot.errors import ChalotError, FormatError, SchemeError, TokenizerError, UnsupportedError
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.floats import float32_to_bf16
from chalot.formats.myai import MyaiFile
from chalot.kernels.backend import open_backend
from chalot.upcycle import Settings, UpcycleError, choosing, slices, upcycle
from chalot.upcycle.choosing import assigned, balanced, choose
from chalot.upcycle.copies import MIXTURES, Copies
from chalot.upcycle.numbers import bell, key, words
from chalot.upcycle.slices import Slices
from chalot.verify import verify
from checkpoints import write_checkpoint
from myai_files import checkpoint

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
RUNS = {"hidden_act": "silu", "head_dim": 16}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices by two windows of text."""
    monkeypatch.setattr(slices, "MOST", 2)


def logits(path: Path, kv: str = "f32") -> np.ndarray:
    with chalot.load(path, kv=kv) as model:
        return model.logits(IDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2 with a tokenizer, whose slices have 24 columns."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "model", intermediate_size=192)


# ---- copies


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_copies_are_the_dense_model_to_the_last_bit(family: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", model_type=family, **RUNS, **FAMILIES[family])
    for scheme in ("f32", "nl4"):
        chalot.convert(source, tmp_path / "dense.myai", scheme)
        upcycle(source, tmp_path / "mixture.myai", scheme=scheme)
        dense, mixture = (logits(tmp_path / n, "int8") for n in ("dense.myai", "mixture.myai"))
        np.testing.assert_array_equal(dense, mixture)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("top", [1, 2, 8])
def test_copies_of_their_own_are_the_dense_model_but_for_rounding(
    family: str, top: int, tmp_path: Path
) -> None:
    """Read back from a folder nothing is known to be equal: each expert is computed."""
    source = checkpoint(tmp_path / "m", model_type=family, **RUNS, **FAMILIES[family])
    chalot.convert(source, tmp_path / "dense.myai", "f32")
    upcycle(source, tmp_path / "folder", Settings(top=top), to="safetensors", type="f32")
    chalot.convert(tmp_path / "folder", tmp_path / "mixture.myai", "f32")
    file = MyaiFile(tmp_path / "mixture.myai")
    assert not file.aliases
    file.close()
    dense, mixture = (logits(tmp_path / n) for n in ("dense.myai", "mixture.myai"))
    if top == 1:  # a weight of 1
        np.testing.assert_array_equal(dense, mixture)
    np.testing.assert_allclose(mixture, dense, atol=3e-4)


def test_the_folder_has_the_family_s_own_names(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", model_type="llama")
    upcycle(source, tmp_path / "out", Settings(experts=3, top=1), to="safetensors")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    names = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).keys()
    p = "model.layers.1.block_sparse_moe."
    assert {p + "gate.weight", p + "experts.2.w1.weight", p + "experts.0.w3.weight"} <= names
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["architectures"] == ["MixtralForCausalLM"]
    assert (said["num_local_experts"], said["num_experts_per_tok"]) == (3, 1)


def test_equal_copies_are_stored_once(tmp_path: Path, model: Path) -> None:
    chalot.convert(model, tmp_path / "dense.myai", "int8")
    report = upcycle(model, tmp_path / "x.myai", Settings(experts=16), scheme="int8")
    dense, mixture = (tmp_path / n for n in ("dense.myai", "x.myai"))
    # routers, a shared expert that gives zero, and the manifest's entries
    assert mixture.stat().st_size < dense.stat().st_size + 250_000
    file = MyaiFile(mixture)
    assert len(file.aliases) == 3 * 15 * 3
    file.close()
    assert verify(mixture).ok
    found = describe(mixture)
    assert found.parameters == report.weights > 5 * found.stored_parameters / 2
    assert report.bits_per_weight == pytest.approx(found.bits_per_weight)
    assert found.mixture is not None and found.mixture.distinct == 1
    assert found.mixture.active_parameters == found.stored_parameters
    with chalot.load(mixture) as a, chalot.load(dense) as b:
        extra = weight_bytes(a) - weight_bytes(b)
    assert 0 < extra < 100_000
    assert render(found).count("are stored") == 1
    assert sum(r.bytes for r in found.regions) == found.bytes


def test_a_mixture_of_the_same_seed_is_the_same(tmp_path: Path, model: Path) -> None:
    def made(seed: int) -> bytes:
        upcycle(model, tmp_path / "x.myai", Settings(4, 2, 0.01, seed), command="same")
        return (tmp_path / "x.myai").read_bytes()

    first = made(7)
    assert made(7) == first
    assert made(8) != first


def test_noise_is_a_part_of_each_tensor_s_deviation(model: Path) -> None:
    name = "model.layers.0.mlp.{}gate_proj.weight"
    view = Copies(open_checkpoint(model), Settings(experts=4, noise=0.25, seed=3))
    assert not view.aliases
    dense = view.held.float32(name.format(""))
    copies = [view.float32(name.format(f"experts.{e}.")) for e in range(4)]
    for copy in copies:
        assert np.std(copy - dense) == pytest.approx(0.25 * np.std(dense), rel=0.02)
    assert not np.array_equal(copies[0], copies[1])
    rows = view.float32(name.format("experts.2."), 5, 9)
    np.testing.assert_array_equal(rows, copies[2][5:9])
    view.close()


def test_the_view_is_whole(model: Path) -> None:
    """Shapes are those that its config.json asks for, and all of it is read in pieces."""
    view = Copies(open_checkpoint(model), Settings())
    check_shapes(read_config(view), view)
    for name, info in view.tensors.items():
        assert view.float32(name, 0, 1).shape == (1, *info.shape[1:])
    assert view.float32("model.layers.0.mlp.shared_expert.down_proj.weight").sum() == 0
    with pytest.raises(FormatError):
        view.float32("model.layers.0.mlp.gate_proj.weight")
    with pytest.raises(IndexError):
        view.float32("model.layers.0.mlp.gate.weight", 7, 9)
    assert view.raw("model.norm.weight").shape == (64,)
    view.check_unchanged()
    view.close()


def test_numbers_are_those_of_splitmix64() -> None:
    """https://prng.di.unimi.it/splitmix64.c, from state 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert words(1234567, 0, 3).tolist() == known
    assert words(1234567, 1, 2).tolist() == known[1:]


def test_numbers_are_near_normal_and_do_not_depend_on_the_piece() -> None:
    drawn = bell(key(0, "a"), 0, 200_000)
    assert abs(float(drawn.mean())) < 0.01 and float(drawn.std()) == pytest.approx(1, abs=0.01)
    assert np.abs(drawn).max() < 3.47
    np.testing.assert_array_equal(bell(key(0, "a"), 1000, 50), drawn[1000:1050])
    assert key(0, "a") != key(1, "a") != key(1, "b")


# ---- slices


def test_all_slices_together_are_the_dense_model_but_for_rounding(
    tmp_path: Path, model: Path
) -> None:
    chalot.convert(model, tmp_path / "dense.myai", "f32")
    dense = logits(tmp_path / "dense.myai")
    for shared in (0, 3):
        asked = Settings(top=8 - shared, shared=shared, slices=True)
        upcycle(model, tmp_path / "x.myai", asked, scheme="f32")
        np.testing.assert_allclose(logits(tmp_path / "x.myai"), dense, atol=3e-5)
    upcycle(model, tmp_path / "x.myai", Settings(top=1, shared=3, slices=True), scheme="f32")
    assert np.abs(logits(tmp_path / "x.myai") - dense).max() > 0.01


def test_native_slices_are_the_oracle_s(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "x.myai"
    for scheme in ("nl4", "bf16"):
        upcycle(model, path, Settings(top=2, shared=2, slices=True), scheme=scheme)
        with chalot.load(path) as fast, chalot.load(path, isa="reference") as slow:
            np.testing.assert_array_equal(fast.logits(IDS), slow.logits(IDS))


def test_slices_share_out_all_columns(model: Path) -> None:
    view = Slices(
        open_checkpoint(model),
        Settings(top=2, shared=2, slices=True),
        CalibrationText.of(),
        open_backend(threads=1),
        lambda *_: None,
    )
    check_shapes(read_config(view), view)
    for i, found in enumerate(view.chosen):
        columns = np.concatenate([found.shared, *found.groups])
        assert np.array_equal(np.sort(columns), np.arange(192))
        p = f"model.layers.{i}.mlp."
        for part, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            dense = view.held.float32(f"{p}{part}.weight")
            slice_ = view.float32(f"{p}experts.3.{part}.weight")
            np.testing.assert_array_equal(slice_, np.take(dense, found.groups[3], axis))
            some = view.float32(f"{p}experts.3.{part}.weight", 2, 5)
            np.testing.assert_array_equal(some, slice_[2:5])
    view.close()


def test_slices_are_converted_again(tmp_path: Path, model: Path) -> None:
    upcycle(model, tmp_path / "a.myai", Settings(top=2, slices=True), scheme="f32")
    chalot.convert(tmp_path / "a.myai", tmp_path / "b.myai", "f32")
    np.testing.assert_array_equal(logits(tmp_path / "a.myai"), logits(tmp_path / "b.myai"))
    from chalot.export import export

    with pytest.raises(SchemeError, match="none to be spared"):
        chalot.convert(tmp_path / "a.myai", tmp_path / "out", experts=4)
    for to in ("safetensors", "gguf", "npz"):
        with pytest.raises(ChalotError):
            export(tmp_path / "a.myai", tmp_path / "out", to)
        assert not (tmp_path / "out").exists()


def test_columns_that_work_together_are_found() -> None:
    """Four groups of columns, each of which some tokens use; and one that all use."""
    rng = np.random.Generator(np.random.Philox(0))
    kind = rng.integers(0, 4, 400)
    of = np.repeat(np.arange(5), 16)  # the last one is everybody's
    shares = rng.random((400, 80)).astype(np.float32) * 0.1
    shares[:, of == 4] += 2
    for token, k in enumerate(kind):
        shares[token, of == k] += 1
    mixed = rng.permutation(80)
    x = np.eye(4, 16, dtype=np.float32)[kind] + rng.standard_normal((400, 16)).astype("f4") * 0.1
    shares = float32_to_bf16(shares[:, mixed])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "MARKED", 0.4)
        found = choose(x, shares, 1, 4, open_backend(threads=1))
    assert set(of[mixed[found.shared]]) == {4}
    groups = [set(of[mixed[g]]) for g in found.groups]
    assert sorted(map(len, groups)) == [1, 1, 1, 1] and len(set.union(*groups)) == 4
    best = np.array([next(iter(g)) for g in groups])[(x @ found.router.T).argmax(axis=1)]
    assert (best == kind).mean() > 0.95


def test_groups_are_balanced_whatever_the_marks() -> None:
    for marks in (np.zeros((5, 12), bool), np.ones((5, 12), bool), np.eye(12, dtype=bool)):
        assert np.bincount(balanced(marks, 4)).tolist() == [3, 3, 3, 3]
    likeness = np.tile(np.array([1.0, 0.5, 0.2]), (9, 1))
    assert np.bincount(assigned(likeness)).tolist() == [3, 3, 3]


# ---- what is refused

WRONG: dict[str, dict[str, Any]] = {
    "one expert": {"experts": 1},
    "more than 1024": {"experts": 1025},
    "top-k 0": {"top": 0},
    "top-k over experts": {"top": 9},
    "top-k over what is routed": {"top": 7, "shared": 2, "slices": True},
    "all shared": {"shared": 8, "slices": True},
    "shared below 0": {"shared": -1, "slices": True},
    "shared copies": {"shared": 2},
    "noise below 0": {"noise": -0.1},
    "noise NaN": {"noise": float("nan")},
    "noise infinite": {"noise": float("inf")},
    "noise in slices": {"noise": 0.1, "slices": True},
    "seed below 0": {"seed": -1},
    "seed of 65 bits": {"seed": 1 << 64},
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_make_no_mixture(name: str) -> None:
    with pytest.raises(UpcycleError, match="expected|can take|is of slices|is of copies"):
        Settings(**WRONG[name])


def test_experts_must_divide_the_columns(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UpcycleError, match="192 columns.* 2, 3, 4, 6, 8, 12"):
        upcycle(model, tmp_path / "x.myai", Settings(experts=7, slices=True))
    assert not (tmp_path / "x.myai").exists()


def test_a_mixture_is_not_made_of_a_mixture(tmp_path: Path, model: Path) -> None:
    upcycle(model, tmp_path / "x.myai")
    for asked in (Settings(), Settings(slices=True)):
        with pytest.raises(UpcycleError, match="is a mixture of experts already"):
            upcycle(tmp_path / "x.myai", tmp_path / "y.myai", asked)


def test_families_without_a_mixture_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", model_type="gemma", head_dim=16)
    with pytest.raises(UnsupportedError, match=f"gemma.*{', '.join(MIXTURES)}"):
        upcycle(source, tmp_path / "x.myai")
    source = checkpoint(tmp_path / "biased", model_type="llama", attention_bias=True)
    with pytest.raises(UnsupportedError, match="mixtral has no word for that"):
        upcycle(source, tmp_path / "x.myai")
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    source = checkpoint(tmp_path / "windows", model_type="qwen3", **RUNS, **windows)
    with pytest.raises(UnsupportedError, match="some layers have windows"):
        upcycle(source, tmp_path / "x.myai")


def test_targets_and_texts_that_do_not_go_together(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SchemeError, match="slices"):
        upcycle(model, out, Settings(slices=True), to="safetensors")
    with pytest.raises(SchemeError, match="myai or safetensors"):
        upcycle(model, out, to="gguf")
    with pytest.raises(SchemeError, match="has no use"):
        upcycle(model, out, to="myai", type="f16")
    with pytest.raises(UpcycleError, match="add --slice"):
        upcycle(model, out, calibration=model / "config.json")
    (tmp_path / "short").write_text("too short")
    with pytest.raises(FormatError, match="take a longer text"):
        upcycle(model, out, Settings(slices=True), calibration=tmp_path / "short")
    with pytest.raises(TokenizerError, match="calibration text cannot be read"):
        upcycle(checkpoint(tmp_path / "none"), out, Settings(slices=True))
    assert not out.exists()


@pytest.mark.parametrize(
    "said",
    [
        {"routed": 0, "top_k": 1},
        {"routed": 8, "top_k": 9},
        {"routed": 7, "top_k": 1},
        {"routed": 8, "top_k": 1, "shared": -1},
        {"routed": 8, "top_k": 1, "more": 1},
        {"routed": 1 << 40, "top_k": 1},
        {"routed": True, "top_k": 1},
        {"top_k": 1},
        [8],
        "8",
    ],
    ids=str,
)
def test_hostile_slices_in_a_config(said: object, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "chalot_slices": said}))
    opened = open_checkpoint(source)
    with pytest.raises((FormatError, UnsupportedError)):
        read_config(opened)
    opened.close()


def test_on_the_command_line(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from chalot.cli import main

    out = str(tmp_path / "x.myai")
    words_ = ["upcycle", str(model), "-o", out, "--experts", "4", "--scheme", "int8", "--json"]
    assert main(words_) == 0
    assert json.loads(capsys.readouterr().out)["path"] == out
    assert main(["upcycle", str(model), "-o", out, "--top-k", "9", "-q"]) == 1
    assert "--top-k 9" in capsys.readouterr().err
