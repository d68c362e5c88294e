"""Merging: the formulas, in numpy; what is not of one shape; sources of any kind."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot import cli
from chalot.errors import ChalotError, FormatError, OutputError, UnsupportedError
from chalot.export import export
from chalot.formats.checkpoint import open_checkpoint
from chalot.merge import Merged, MergeError, Recipe, angle, merge, sine
from checkpoints import write_checkpoint

MATRIX = "model.layers.1.mlp.up_proj.weight"
VECTOR = "model.norm.weight"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints and their base."""
    folder = tmp_path_factory.mktemp("merge")
    return {name: write_checkpoint(folder / name, seed=i) for i, name in enumerate("abc")}


def tensors(path: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(path)
    try:
        return {name: checkpoint.float32(name) for name in checkpoint.tensors}
    finally:
        checkpoint.close()


def merged(three: dict[str, Path], recipe: Recipe) -> dict[str, np.ndarray]:
    names = "abc" if recipe.method == "task" else "ab"
    view = Merged([open_checkpoint(three[n]) for n in names], recipe)
    try:
        rows = view.float32(MATRIX, 3, 9)
        out = {name: view.float32(name) for name in view.tensors}
        np.testing.assert_array_equal(out[MATRIX][3:9], rows)
        return out
    finally:
        view.close()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_linear(three: dict[str, Path], weight: float) -> None:
    a, b, out = tensors(three["a"]), tensors(three["b"]), merged(three, Recipe("linear", weight))
    assert out.keys() == a.keys()
    for name in a:
        np.testing.assert_allclose(out[name], (1 - weight) * a[name] + weight * b[name], atol=1e-6)
    if weight in (0, 1):
        np.testing.assert_array_equal(out[MATRIX], (b if weight else a)[MATRIX])


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_slerp(three: dict[str, Path], weight: float) -> None:
    a, b, out = tensors(three["a"]), tensors(three["b"]), merged(three, Recipe("slerp", weight))
    flat = [t[MATRIX].ravel().astype(np.float64) for t in (a, b, out)]
    norms = [np.linalg.norm(x) for x in flat]
    t = math.acos(flat[0] @ flat[1] / (norms[0] * norms[1]))
    expected = math.sin((1 - weight) * t) * flat[0] + math.sin(weight * t) * flat[1]
    np.testing.assert_allclose(flat[2], expected / math.sin(t), atol=1e-6)
    # it lies on the arc: a part `weight` of the way, and no shorter than the two
    assert math.acos(min(1.0, flat[2] @ flat[0] / (norms[2] * norms[0]))) == pytest.approx(
        weight * t, abs=2e-2
    )
    assert norms[2] > 0.95 * min(norms[:2])
    np.testing.assert_allclose(
        out[VECTOR], (1 - weight) * a[VECTOR] + weight * b[VECTOR], atol=1e-6
    )


def test_task(three: dict[str, Path]) -> None:
    a, b, c = (tensors(three[n]) for n in "abc")
    out = merged(three, Recipe("task", 0.75))
    for name in a:
        expected = c[name] + 0.75 * ((a[name] - c[name]) + (b[name] - c[name]))
        np.testing.assert_allclose(out[name], expected, atol=1e-6)


def test_sines_and_angles() -> None:
    for x in np.linspace(0, math.pi, 50):
        assert sine(x) == pytest.approx(math.sin(x), abs=1e-14)
        assert angle(math.cos(x)) == pytest.approx(x, abs=1e-7)


def test_what_is_parallel_is_a_mean(tmp_path: Path) -> None:
    def twice(weights: dict[str, np.ndarray]) -> None:
        for values in weights.values():
            values *= 2

    a, b = write_checkpoint(tmp_path / "a"), write_checkpoint(tmp_path / "b", twice)
    one = tensors(a)[MATRIX]
    out = merged({"a": a, "b": b}, Recipe("slerp"))[MATRIX]
    np.testing.assert_allclose(out, 1.5 * one, rtol=1e-6)


def test_a_file_of_two_sources(three: dict[str, Path], tmp_path: Path) -> None:
    """A folder and a GGUF file merge as two folders do; the file runs."""
    export(three["b"], tmp_path / "b.gguf", "gguf", "f32")
    merge(three["a"], three["b"], tmp_path / "hf", to="safetensors", type="f32")
    merge(three["a"], tmp_path / "b.gguf", tmp_path / "too", to="safetensors", type="f32")
    first, second = tensors(tmp_path / "hf"), tensors(tmp_path / "too")
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    chalot.convert(tmp_path / "hf", tmp_path / "straight.myai", "int8")
    merge(three["a"], three["b"], tmp_path / "m.myai", scheme="int8")
    with (
        chalot.load(tmp_path / "m.myai") as one,
        chalot.load(tmp_path / "straight.myai") as other,
    ):
        np.testing.assert_array_equal(one.logits([1, 2, 3]), other.logits([1, 2, 3]))


@pytest.mark.parametrize(
    ("method", "weight", "words"),
    [
        ("mean", None, "--method mean: not known; choose one of: linear, slerp, task"),
        ("linear", 1.5, "--weight 1.5: --method linear takes 0 to 1"),
        ("slerp", float("nan"), "--weight nan"),
        ("task", 5.0, "takes -4 to 4"),
    ],
)
def test_what_is_no_recipe(method: str, weight: float | None, words: str) -> None:
    with pytest.raises(MergeError, match=words):
        Recipe(method, weight)


def test_what_cannot_be_merged(three: dict[str, Path], tmp_path: Path, demo_file: Path) -> None:
    a, out = three["a"], tmp_path / "out.myai"
    wide = write_checkpoint(tmp_path / "wide", intermediate_size=128)
    turned = write_checkpoint(tmp_path / "turned", rope_theta=5000.0)
    cut = write_checkpoint(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    refused: list[tuple[type[ChalotError], dict[str, object], str]] = [
        (UnsupportedError, {"b": wide}, "feed_forward is 128, of .*a it is 96"),
        (UnsupportedError, {"b": turned}, "rope_theta is 5000"),
        (UnsupportedError, {"a": demo_file, "b": demo_file}, "was balanced and coded"),
        (FormatError, {"b": cut}, "cut"),
        (FormatError, {"b": tmp_path / "nowhere"}, "no such file"),
        (MergeError, {"b": a, "base": a}, "--method linear has no use for --base"),
        (MergeError, {"b": a, "recipe": Recipe("task")}, "--method task needs --base"),
    ]
    for kind, given, words in refused:
        with pytest.raises(kind, match=words):
            merge(**{"a": a, "out": out} | given)
    with pytest.raises(OutputError):
        merge(a, three["b"], a, to="safetensors")
    assert not list(tmp_path.glob("*out.myai*"))


def test_the_command(
    three: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.myai"
    words = ["merge", str(three["a"]), str(three["b"]), "-o", str(out), "--method", "slerp"]
    (three["b"] / "tokenizer.json").write_bytes((three["b"] / "tokenizer.json").read_bytes() + b" ")
    assert cli.main([*words, "--weight", "0.4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(out) and "the tokenizers of the two differ" in report["notes"][-1]
    for more, message in (
        (["--weight", "4"], "takes 0 to 1"),
        (["--to", "gguf", "--scheme", "nl4"], "--to gguf"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, *more, "-q"])
        assert ended.value.code == 2 and message in capsys.readouterr().err
