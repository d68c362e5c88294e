"""Keys balanced with the queries they meet: exact, and an int8 cache loses less to outliers."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import chalot
from chalot.demo import FOLDER, write_twin
from chalot.evaluate import compare
from chalot.formats.checkpoint import open_checkpoint
from chalot.load import Model
from chalot.model.calibration import Calibration
from chalot.model.config import from_hugging_face
from chalot.quant.fold import pair_factors
from chalot.unfolding import Rows, unfolding
from golden.cases import CASES, Shard, prompt, shapes, weights, write_folder


@given(st.lists(st.integers(-8, 8), min_size=8, max_size=8))
def test_planted_powers_of_two_are_found(exponents: list[int]) -> None:
    """Keys that are f times as large as the queries, and queries / f: queries take f back."""
    f = np.exp2(np.array([exponents, exponents[::-1]], float))
    found = np.log2(pair_factors(f**2, f**-2))
    spread = max(exponents) - min(exponents)
    if spread > 1:
        assert np.array_equal(found, np.log2(f))
    if spread == 0:
        assert not found.any()  # a factor of the whole head gains nothing


def test_zeros_and_extremes_give_no_factor_or_a_bounded_one() -> None:
    keys = np.array([[0.0, 1.0, 1e76, 1.0]])
    queries = np.array([[1.0, 0.0, 1e-76, 1.0]])
    assert pair_factors(keys, queries).tolist() == [[1, 1, 2.0**20, 1]]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The outlier twin in int8 weights, its keys as they are and balanced."""
    folder = tmp_path_factory.mktemp("twins")
    write_twin(FOLDER, folder / "twin")
    plain, balanced = folder / "plain.myai", folder / "balanced.myai"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calibration, "_balance_keys", lambda *_: None)
        chalot.convert(folder / "twin", plain, "int8")
    chalot.convert(folder / "twin", balanced, "int8")
    return plain, balanced


def test_the_cache_loses_less_and_numbers_nothing(twins: tuple[Path, Path]) -> None:
    """With float32 keys both files give the same bits; with codes only one is close to them."""
    text = (FOLDER / "heldout.txt").read_text("utf-8")
    models = [Model(path, context=512, kv=kv) for path in twins for kv in ("f32", "int8")]
    ids = models[0].tokenizer.encode(text)[:512]
    _, loss, same, less = compare(models[0], models[1:], ids, window=512)
    assert same.kl == 0 and same.kl_99 == 0
    assert less.kl < loss.kl / 4 and less.kl < 0.001
    for model in models:
        model.close()


def normed_twin(folder: Path) -> Path:
    """Qwen3's kind with four pairs of key channels x 32, by the weights of its norms of heads."""
    case, shard = CASES["qwen3"], Shard()
    write_folder(case, 0, folder)
    half = case.config["head_dim"] // 2
    factor = np.ones(2 * half, np.float32)
    factor[[1, 5, 9, 13]] = factor[[half + i for i in (1, 5, 9, 13)]] = 32
    for name, shape in shapes(case.config).items():
        values = weights(case, name, shape, 0)
        if "k_norm" in name or "q_norm" in name:
            values = values * (factor if "k_norm" in name else 1 / factor)
        shard.add(name, values, case.stored)
    shard.write(folder / "model.safetensors")
    return folder


def test_norms_of_heads_take_the_factors(tmp_path: Path) -> None:
    """Qwen3: rows' factors would be normed away. The loss to an int8 cache is that of even keys."""
    case, out = CASES["qwen3"], tmp_path / "balanced.myai"
    even, twin = write_folder(case, 0, tmp_path / "even"), normed_twin(tmp_path / "twin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calibration, "_balance_keys", lambda *_: None)
        chalot.convert(twin, tmp_path / "plain.myai", "int8")
        chalot.convert(even, tmp_path / "even.myai", "int8")
    chalot.convert(twin, out, "int8")
    loss, exact, ids = {}, {}, prompt(case, 0)
    for name in ("plain", "balanced", "even"):
        found = []
        for kv in ("f32", "int8"):
            with Model(tmp_path / f"{name}.myai", kv=kv, threads=1) as model:
                found.append(model.logits(ids))
        exact[name] = found[0]
        loss[name] = float(np.sqrt(np.mean((found[1] - found[0]) ** 2)))
    np.testing.assert_array_equal(exact["plain"], exact["balanced"])
    config = from_hugging_face(case.config)
    opened = [open_checkpoint(path) for path in (out, twin)]
    made, source = (Rows(checkpoint, config) for checkpoint in opened)
    plan, name = unfolding(config, 1, made, source), "layers.1.key_norm"
    assert not np.array_equal(made.read(name), source.read(name))
    np.testing.assert_array_equal(plan.apply(name, made.read(name), 0), source.read(name))
    for checkpoint in opened:
        checkpoint.close()
    assert loss["balanced"] < loss["plain"] / 2 and loss["balanced"] < 1.1 * loss["even"], loss


def test_the_bundled_model_needs_no_factors(tmp_path: Path) -> None:
    """Its keys are even enough: within what a gain is asked for, nothing is touched."""
    seen = []

    def note(self: Calibration, p: str, *_: object) -> None:
        original(self, p, *_)
        seen.append(p + "query" in self.plan.rows)

    original = Calibration._balance_keys
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calibration, "_balance_keys", note)
        chalot.convert(FOLDER, tmp_path / "demo.myai", "int8")
    assert len(seen) > 2 and not any(seen)
