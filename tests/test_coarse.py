"""Converting to one or two bits: BitNet's scale where it is asked for, and the plain warning."""

from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot import cli
from chalot.errors import SchemeError
from chalot.formats import safetensors
from chalot.formats.names import hugging_face
from chalot.formats.safetensors import SafetensorsFolder
from chalot.model.config import from_hugging_face
from chalot.model.layers import model_tensors
from chalot.quant import codes, packing
from chalot.quant.scheme import SCHEMES
from myai_files import SMALL, checkpoint

COARSE = [name for name, scheme in SCHEMES.items() if scheme.is_coarse]


def stored(path: Path, name: str) -> np.ndarray:
    """A matrix of a .myai file as numbers."""
    with chalot.load(path) as model:
        m = model.file.matrix(name)
        return codes.dequantize(packing.unpack(m.data, m.scheme, m.shape))


def ternary_checkpoint(path: Path) -> Path:
    """A folder of numbers whose matrices have three values each."""
    checkpoint(path)
    rng, tensors = np.random.default_rng(3), []
    for t in model_tensors(from_hugging_face(SMALL)):
        w = rng.choice([-1, 0, 0, 1], t.shape) if t.kind != "vector" else np.ones(t.shape)
        tensors.append((hugging_face(t.name), "f32", t.shape, w.astype(np.float32) * 0.03))
    safetensors.write(path / "model.safetensors", tensors)
    return path


def test_coarse_schemes_are_those_of_one_and_two_bits() -> None:
    assert COARSE == ["nl2", "ternary", "sign", "row2", "row1"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_to_few_bits_is_said(
    scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "source")
    out = tmp_path / "x.myai"
    assert cli.main(["convert", str(source), "--scheme", scheme, "-o", str(out)]) == 0
    said = capsys.readouterr().err
    assert ("meant for models that were trained for it" in said) == (scheme in COARSE)
    assert (f"{scheme}: meant for" in said) == (scheme in COARSE)


def test_what_has_few_values_already_is_not_warned_of(tmp_path: Path) -> None:
    source = ternary_checkpoint(tmp_path / "source")
    report = chalot.convert(source, tmp_path / "x.myai", "ternary")
    assert not report.notes and all(k.error < 1e-12 for k in report.kinds)
    again = chalot.convert(tmp_path / "x.myai", tmp_path / "y.myai", "ternary")
    assert not any("meant for models" in note for note in again.notes)
    assert "meant for models" in chalot.convert(source, tmp_path / "z.myai", "sign").notes[0]


def test_only_what_is_coarse_is_named(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    (note,) = chalot.convert(source, tmp_path / "x.myai", "ffn=nl2,attention=int8").notes
    assert note.startswith("nl2: meant for") and "int8:" not in note


def test_absmean_is_bitnets_of_every_matrix(tmp_path: Path) -> None:
    """clip(round(w / g), -1, 1) g with g = mean |w|, of weights that nothing was folded into."""
    source = checkpoint(tmp_path / "source")
    chalot.convert(source, tmp_path / "x.myai", "ternary", ternary="absmean")
    with_least = chalot.convert(source, tmp_path / "y.myai", "ternary")
    given = SafetensorsFolder(source)
    for t in model_tensors(from_hugging_face(SMALL)):
        if t.kind == "vector":
            continue
        w = given.float32(hugging_face(t.name))
        found = stored(tmp_path / "x.myai", t.name)
        g = np.abs(found).max()
        assert g == pytest.approx(np.abs(w).mean(), rel=1e-6)
        np.testing.assert_array_equal(found, np.clip(np.rint(w / g), -1, 1) * g)
    given.close()
    assert all(k.error < 0.22 for k in with_least.kinds if k.kind != "vector")


def test_absmean_leaves_ternary_sources_as_they_are(tmp_path: Path) -> None:
    """The mean would count the zeros; codes that a file has keep their scale."""
    chalot.convert(ternary_checkpoint(tmp_path / "source"), tmp_path / "x.myai", "ternary")
    chalot.convert(tmp_path / "x.myai", tmp_path / "y.myai", "ternary", ternary="absmean")
    for name in ("layers.0.query", "head"):
        a, b = stored(tmp_path / "x.myai", name), stored(tmp_path / "y.myai", name)
        np.testing.assert_array_equal(a, b)


def test_absmean_wants_something_ternary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = checkpoint(tmp_path / "source"), tmp_path / "x.myai"
    with pytest.raises(SchemeError, match="nothing would be ternary, found nl4"):
        chalot.convert(source, out, "nl4", ternary="absmean")
    with pytest.raises(SchemeError, match="choose one of: least-error, absmean"):
        chalot.convert(source, out, "ternary", ternary="mean")
    words = ["convert", str(source), "--ternary", "absmean", "-o"]
    with pytest.raises(SystemExit):
        cli.main([*words, str(tmp_path / "npz"), "--to", "npz"])
    assert "--ternary: --to npz has no use for it" in capsys.readouterr().err
    assert not out.exists() and not (tmp_path / "npz").exists()
    assert cli.main([*words, str(out), "--scheme", "ternary"]) == 0
