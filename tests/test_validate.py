"""validate and tensor: errors as numpy computes them, folds undone, answers as the kernels give."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chalot
from chalot.cli import main
from chalot.convert.conversion import Conversion
from chalot.demo import FOLDER, write_twin
from chalot.errors import FormatError, SchemeError
from chalot.export import export
from chalot.formats import safetensors
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.safetensors import SafetensorsFolder
from chalot.model.calibration import Plan, Trial
from chalot.model.layers import ffn_norm
from chalot.tensor import tensor
from chalot.validate import BARS, render, validate
from golden.cases import CASES, write_folder
from myai_files import checkpoint

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("small") / "source")


def norm(x: Any) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


def test_errors_are_numpy_s(small: Path, tmp_path: Path) -> None:
    made = export(small, tmp_path, "npz", bits="4").path
    report = validate(made, small)
    ours, source = open_checkpoint(Path(made)), open_checkpoint(small)
    assert {t.name for t in report.tensors} == source.tensors.keys()
    for t in report.tensors:
        w, stored = source.float32(t.name), ours.float32(t.name)
        assert t.error == pytest.approx(norm(stored - w) / norm(w), rel=1e-6)
        assert t.ok == (max(t.error, t.output or 0) <= t.bar)
        assert (t.output is None) == (t.kind in ("vector", "embedding")), t.name
        if t.kind != "vector":
            assert (t.stored, t.bits, t.bar) == ("q4", 4, 0.1)
    ours.close()
    source.close()
    assert report.tokens > 0 and "32 tokens" in render(report)


@pytest.mark.parametrize(("bits", "passes"), [(8, True), (4, False), (1, False)])
def test_the_bars_on_the_bundled_model(tmp_path: Path, bits: int, passes: bool) -> None:
    """Real weights: 8 bits a row keep the bar, fewer do not; the report shows what chalot has."""
    made = export(FOLDER, tmp_path, "npz", bits=str(bits)).path
    report = validate(made, FOLDER)
    assert report.ok == passes
    text = render(report)
    if bits == 4:
        worst = max(report.tensors, key=lambda t: t.error)
        assert worst.better_scheme == "nl4" and worst.better is not None
        assert worst.better < 0.08 < 0.12 < worst.error
        assert "nl4 of the same rows gives" in text and "real weights" in text
    if bits == 1:
        assert "sign of the same rows gives" in text and "over the bar too" in text
        assert "mean size" in text and "even steps" not in text
    assert ("within the bar" in text) == passes
    assert report.tensors[-1].kind == "embedding"  # tied: seen as the head
    assert bits != 4 or validate(made, FOLDER, tolerance=0.2).ok


def test_a_file_that_is_its_source_has_no_error(small: Path) -> None:
    report = validate(small, small, tolerance=0)
    assert report.ok and all(t.error == 0 and not t.output for t in report.tensors)


def test_powers_of_two_that_are_folded_in_are_undone(tmp_path: Path) -> None:
    """The outlier twin is folded hard; unfolded, its weights are the source's again."""
    write_twin(FOLDER, tmp_path / "twin")
    made = tmp_path / "twin.myai"
    report = chalot.convert(tmp_path / "twin", made, "nl4")
    assert sum(k.folded for k in report.kinds) > 10
    found = validate(made, tmp_path / "twin")
    assert all(t.error == 0 for t in found.tensors if t.kind == "vector")
    assert max(t.error for t in found.tensors) < 0.13
    assert max(t.output or 0 for t in found.tensors) < 0.12


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "bitnet"])
def test_a_fold_of_any_power_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random factors, stored as float32: what validate sees is the source, as it is computed with.

    Exactly, but for norms of which checkpoints leave out 1: adding and taking it rounds.
    """
    folder = write_folder(CASES[name], 0, tmp_path / "source")
    rng = np.random.default_rng(0)
    start, plan = Conversion.__init__, Plan()

    def powers(*shape: int) -> Any:
        return np.ldexp(np.float32(1), rng.integers(-5, 6, shape))

    def fold(p: str, producer: str, rows: Any, readers: dict[str, Any]) -> None:
        plan.rows[p + producer] = plan.rows[p + producer + ".bias"] = 1 / rows
        plan.columns.update({p + reader: columns for reader, columns in readers.items()})

    def planned(self: Conversion, *arguments: Any, **named: Any) -> None:
        start(self, *arguments, **named)
        c, self.plan = self.config, plan
        for p in (f"layers.{i}." for i in range(c.layers)):
            s = powers(c.hidden)
            fold(p, "attention_norm", s, dict.fromkeys(("query", "key", "value"), s))
            s = powers(c.hidden)
            fold(p, ffn_norm(c), s, dict.fromkeys(("gate", "up"), s))
            s, inner = powers(c.feed_forward), c.inner_norms
            fold(p, "ffn_inner_norm" if inner else "up", s, {"down": s})
            s = powers(c.kv_heads, 1, c.head_dim)
            shared = np.repeat(s, c.heads // c.kv_heads, axis=1).reshape(-1)
            rows = shared if inner else s.reshape(-1)
            fold(p, "attention_inner_norm" if inner else "value", rows, {"output": shared})
            if not c.head_norms:
                s = np.tile(powers(c.kv_heads, 1, c.head_dim // 2), 2)
                shared = np.repeat(s, c.heads // c.kv_heads, axis=1).reshape(-1)
                fold(p, "query", 1 / shared, {})
                fold(p, "key", s.reshape(-1), {})

    monkeypatch.setattr(Conversion, "__init__", planned)
    chalot.convert(folder, tmp_path / "m.myai", "f32")
    assert plan.columns
    folded, source = open_checkpoint(tmp_path / "m.myai"), open_checkpoint(folder)
    assert not np.array_equal(folded.float32(UP), source.float32(UP))
    folded.close()
    source.close()
    report = validate(tmp_path / "m.myai", folder)
    off = max(t.error for t in report.tensors)
    assert off < 1e-5 if name == "gemma2" else off == 0
    assert validate(folder, tmp_path / "m.myai").ok


def test_codes_that_come_over_stay_with_their_rows_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power of two of a row goes into its scale: keys are balanced, nothing is lost."""
    monkeypatch.setattr(Trial, "best", lambda self, _: (np.ones(self.x.shape[1], np.float32), 1))
    write_twin(FOLDER, tmp_path / "twin")
    source = export(tmp_path / "twin", tmp_path, "npz", bits="4").path
    report = chalot.convert(source, tmp_path / "twin.myai")
    assert report.notes == () and {k.scheme for k in report.kinds} == {"row4", "f32"}
    opened = [open_checkpoint(Path(p)) for p in (source, tmp_path / "twin.myai")]
    name = "model.layers.0.self_attn.k_proj.weight"
    assert not np.allclose(*(k.float32(name) for k in opened), rtol=0.4)
    for k in opened:
        k.close()
    assert max(t.error for t in validate(tmp_path / "twin.myai", source).tensors) < 1e-6


def test_another_model_is_refused(small: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", intermediate_size=128)
    with pytest.raises(FormatError, match="has shape"):
        validate(small, other)
    with pytest.raises(SchemeError, match="--tolerance"):
        validate(small, small, tolerance=-1)


def test_weights_of_nan_or_zero_fail(small: Path, tmp_path: Path) -> None:
    with SafetensorsFolder(small) as source:
        tensors = {n: source.float32(n) for n in source.tensors}
        config = source.document("config.json") or b""
    tensors[UP][5, 5] = np.nan
    tensors["lm_head.weight"][:] = 0
    other = tmp_path / "other"
    other.mkdir()
    safetensors.write(
        other / "model.safetensors", [(n, "f32", t.shape, t) for n, t in tensors.items()]
    )
    (other / "config.json").write_bytes(config)
    failed = {t.name: t.error for t in validate(other, small).tensors if not t.ok}
    assert failed.keys() == {UP, "lm_head.weight"}
    assert np.isnan(failed[UP]) and failed["lm_head.weight"] == 1


def test_the_command_says_it_and_ends_with_one(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert = ["convert", str(small), "--to", "npz", "--bits", "4", "--output-dir", str(tmp_path)]
    assert main([*convert, "--no-validate", "-q"]) == 0
    assert "over the bar" not in capsys.readouterr().out
    assert main([*convert, "-q"]) == 1
    assert "over the bar" in capsys.readouterr().out
    assert main([*convert, "--tolerance", "0.9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["validation"]["ok"]
    made = str(tmp_path / "source_manifest_q4.json")
    assert main(["validate", made, "--against", str(small)]) == 1
    assert "tensors over the bar" in capsys.readouterr().out
    assert main(["validate", made, "--against", str(small), "--tolerance", "0.9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"][0]["stored"] == "q4"
    assert main(["validate", made, "--against", str(small), "-v"]) == 1
    assert UP in capsys.readouterr().out


def test_bars_are_those_of_the_docs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "npz.md").read_text("utf-8")
    for _, bar in BARS:
        assert f"{bar:.0%}".replace("%", " %") in text


# ---- one weight times one input


def test_a_product_by_codes_is_the_kernels(small: Path, tmp_path: Path) -> None:
    chalot.convert(small, tmp_path / "m.myai", "nl4")
    x = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    np.save(tmp_path / "x.npy", x)
    report, y = tensor(tmp_path / "m.myai", UP, tmp_path / "x.npy", tmp_path / "y.npy")
    assert report.by.startswith("codes") and report.stored == "nl4"
    assert np.array_equal(np.load(tmp_path / "y.npy"), y) and y.shape == (3, 96)
    _, again = tensor(tmp_path / "m.myai", "layers.0.up", x)
    assert np.array_equal(again, y)
    source = open_checkpoint(tmp_path / "m.myai")
    assert norm(y - x @ source.float32(UP).T) / norm(y) < 0.02
    source.close()


@pytest.mark.parametrize("to", ["folder", "npz"])
def test_a_product_by_floats_is_the_same_on_every_kernel(
    small: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = small if to == "folder" else export(small, tmp_path, "npz").path
    x = np.random.default_rng(0).standard_normal(64)
    report, y = tensor(place, UP, x)
    assert report.by == "float32" and report.output == (96,)
    source = open_checkpoint(Path(place))
    assert np.allclose(y, source.float32(UP) @ x, rtol=1e-4, atol=1e-4)
    source.close()
    monkeypatch.setenv("CHALOT_ISA", "reference")
    assert np.array_equal(tensor(place, UP, x)[1], y)


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("model.layers.0.mlp.up", np.zeros(64), "has no tensor 'model.layers.0.mlp.up'; there"),
        ("model.norm.weight", np.zeros(64), "is a vector"),
        (UP, np.zeros(63), r"takes \(64,\)"),
        (UP, np.zeros((1, 1, 64)), r"takes \(64,\)"),
        (UP, np.zeros((0, 64)), r"takes \(64,\)"),
        (UP, np.full(64, np.nan), "has NaN or Inf"),
        (UP, np.full(64, 1e300), "too large for float32"),
    ],
)
def test_inputs_that_do_not_fit_are_named(small: Path, name: str, x: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        tensor(small, name, x)


def test_the_command_writes_the_answer(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", np.ones(64, np.float16))
    argv = ["tensor", str(small), UP, "--input", str(tmp_path / "x.npy")]
    assert main([*argv, "-o", str(tmp_path / "y.npy")]) == 0
    assert "96 x 64, stored as f32" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["by"] == "float32" and found["first"][0] == np.load(tmp_path / "y.npy")[0]
    assert main(["tensor", str(small), UP, "--input", str(tmp_path / "absent.npy")]) == 1
    (tmp_path / "pickle.npy").write_bytes(b"\x80\x04N.")
    assert main(["tensor", str(small), UP, "--input", str(tmp_path / "pickle.npy")]) == 1
    assert "is no numpy array" in capsys.readouterr().err
