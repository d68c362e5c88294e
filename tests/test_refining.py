"""Laws of `convert --refine`: equal bytes, smaller errors of products, and typed refusals."""

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import msgspec
import numpy as np
import pytest

from chalot import cli
from chalot.checking import read_config
from chalot.convert import ConvertReport, convert
from chalot.convert.refining import WINDOWS, Inputs, Refine
from chalot.demo import FOLDER
from chalot.errors import ChalotError, FormatError, SchemeError, TokenizerError, WeightError
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.myai import MyaiFile
from chalot.quant import hqq
from chalot.quant.codes import dequantize, quantize
from chalot.quant.scheme import SCHEMES

TEXT = (FOLDER / "calibration.txt").read_text("utf-8")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four windows, to be quick."""
    monkeypatch.setitem(WINDOWS, "gptq", 4)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A calibration text of a user."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT[:6000], "utf-8")
    return path


def products(report: ConvertReport) -> dict[str, tuple[float, float]]:
    return {k.kind: k.product_errors for k in report.kinds if k.product_errors is not None}


def test_the_same_bytes_and_smaller_errors(tmp_path: Path) -> None:
    plain = convert(FOLDER, tmp_path / "plain.myai", "nl4")
    refined = convert(FOLDER, tmp_path / "refined.myai", "nl4", refine=Refine.of("gptq"))
    found = products(refined)
    assert found.keys() == {"embedding", "attention", "ffn"} and not products(plain)
    assert all(after < 0.85 * before for before, after in found.values())
    files = (MyaiFile(tmp_path / f"{name}.myai") for name in ("plain", "refined"))
    with closing(next(files)) as a, closing(next(files)) as b:
        assert a.manifest.source.digest == b.manifest.source.digest
        assert a.manifest.tensors.keys() == b.manifest.tensors.keys()
        for name, entry in a.manifest.tensors.items():
            other = b.manifest.tensors[name]
            assert (other.extent.bytes, other.activation) == (entry.extent.bytes, entry.activation)
        assert "gptq on chalot/demo/model/calibration.txt, sha256" in b.manifest.source.command


def test_hqq_of_rows(tmp_path: Path) -> None:
    report = convert(FOLDER, tmp_path / "r.myai", "row2", refine=Refine.of("hqq"))
    assert all(after < 0.8 * before for before, after in products(report).values())


def test_the_command_says_and_reports_the_gain(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.myai"
    named = ["convert", str(FOLDER), "-o", str(out), "--scheme", "attention=int6,ffn=bf16"]
    given = ["--refine", "gptq", "--calibration", str(text), "--json"]
    assert cli.main([*named, *given]) == 0
    report = json.loads(capsys.readouterr().out)
    by_kind = {k["kind"]: k["product_errors"] for k in report["kinds"]}
    assert by_kind["ffn"] is None and by_kind["attention"][1] < by_kind["attention"][0]
    with closing(MyaiFile(out)) as file:
        assert str(text) in file.manifest.source.command
    assert cli.main([*named, *given[:4]]) == 0
    assert " -> " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FormatError, "cannot be read"),
        (b"", FormatError, "0 tokens, expected at least 512"),
        (b"A short text.", FormatError, "expected at least 512"),
        (b"caf\xe9 " * 900, FormatError, "not UTF-8 at byte 3"),
    ],
)
def test_texts_that_are_none(
    tmp_path: Path, content: bytes | None, error: type[ChalotError], message: str
) -> None:
    path, out = tmp_path / "text.txt", tmp_path / "out.myai"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        convert(FOLDER, out, "nl4", refine=Refine.of("gptq", path))
    assert not out.exists()


@pytest.mark.parametrize(
    ("method", "scheme", "message"),
    [
        ("best", "nl4", "choose gptq or hqq"),
        ("awq", "nl4", "folding channels"),
        ("gptq", "bf16", "nothing to gain in bf16"),
        ("hqq", "nl4", "nothing to gain in nl4"),
    ],
)
def test_methods_that_do_not_apply(tmp_path: Path, method: str, scheme: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        convert(FOLDER, tmp_path / "out.myai", scheme, refine=Refine.of(method))


def test_no_tokenizer(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        convert(tmp_path, tmp_path / "out.myai", "nl4", refine=Refine.of("gptq"))


def test_ids_that_the_model_does_not_have() -> None:
    with closing(open_checkpoint(FOLDER)) as checkpoint:
        config = msgspec.structs.replace(read_config(checkpoint), vocabulary=300)
        with pytest.raises(TokenizerError, match="the model has 300"):
            Refine.of("gptq").ids(checkpoint, config)


def test_activations_that_are_no_numbers() -> None:
    with pytest.raises(WeightError, match="NaN or Inf"):
        Inputs().add(np.full((4, 8), np.nan, np.float32), is_held=False)


def test_only_myai_files_are_refined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["convert", str(FOLDER), "--to", "gguf", "--refine", "gptq"])
    assert "--refine" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["convert", str(FOLDER), "--calibration", "x.txt"])
    assert "--calibration" in capsys.readouterr().err


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("layers.2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(FOLDER, tmp_path / "o.myai", "nl4", refine=Refine.of("gptq"), progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [n for n, s in SCHEMES.items() if s.is_coded])
def test_half_quadratic_keeps_small_weights(name: str) -> None:
    """Less sum of |error|^0.7 with outliers about, on every row; and codes that are of the rows."""
    weights = RNG.standard_normal((18, 200)).astype(np.float32)
    weights[:, ::41] *= 8
    weights[3], weights[4] = 0, 2.5
    plain = quantize(weights, SCHEMES[name])
    if not hqq.applies(SCHEMES[name]):
        with pytest.raises(SchemeError, match="least error already"):
            hqq.half_quadratic(weights, plain)
        return
    found = hqq.half_quadratic(weights, plain)
    before, after = (np.abs(dequantize(c) - weights) ** 0.7 for c in (plain, found))
    assert (after.sum(axis=1) <= before.sum(axis=1) * 1.01 + 1e-6).all()
    assert after.sum() < before.sum()
    assert [asdict(c)["shape"] for c in (plain, found)] == [(18, 200)] * 2


def test_absmean_is_not_refined_in_silence(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="leave one of them out"):
        convert(
            FOLDER, tmp_path / "x.myai", "attention=ternary", ternary="absmean",
            refine=Refine.of("gptq"),
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
