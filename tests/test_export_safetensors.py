"""Checkpoints written as safetensors: the same numbers and function, in one file or several.

That transformers loads these folders, and computes the same, is in tests/parity_live.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot.demo import FOLDER
from chalot.errors import SchemeError, WeightError
from chalot.export import export
from chalot.export.safetensors import ARCHITECTURES, write_safetensors
from chalot.formats import safetensors
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.safetensors import SafetensorsFolder
from chalot.model.families import FAMILIES as MODELS
from golden.cases import CASES, golden, write_folder
from myai_files import checkpoint
from test_parity import HELD

FAMILIES = (
    *("qwen2-odd", "qwen2-yarn", "llama-tied", "llama-biases", "llama3-new", "mistral", "qwen3"),
    *("gemma", "gemma-f32", "gemma2", "bitnet", "bitnet-divided"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_through_a_file_and_back(name: str, tmp_path: Path) -> None:
    """Recorded logits are still those of what came back; BitNet's matrices are numbers now."""
    case = CASES[name]
    chalot.convert(write_folder(case, 0, tmp_path / "in"), tmp_path / "a.myai", "f32", threads=1)
    export(tmp_path / "a.myai", tmp_path / "out", "safetensors", case.scheme)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    with SafetensorsFolder(tmp_path / "out") as made, SafetensorsFolder(tmp_path / "in") as source:
        stored = {i.dtype for i in made.tensors.values() if len(i.shape) == 2}
        assert stored == {case.scheme}
        assert made.tensors.keys() == {n for n in source.tensors if not n.endswith("_scale")}
    chalot.convert(tmp_path / "out", tmp_path / "b.myai", "f32", threads=1)
    with chalot.load(tmp_path / "b.myai", kv="f32", threads=1) as m, np.load(golden(case)) as truth:
        found = m.logits(truth["ids"].tolist())[truth["positions"]]
        assert np.abs(found - truth["logits"]).max() < HELD * truth["spread"]


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_numbers_are_rounded_once(tmp_path: Path, dtype: str) -> None:
    source = checkpoint(tmp_path / "in", tie_word_embeddings=True)
    report = export(source, tmp_path / "out", "safetensors", dtype.upper())
    ulp = {"bf16": 2**-8, "f16": 2**-11, "f32": 0}[dtype]
    with SafetensorsFolder(source) as before, SafetensorsFolder(tmp_path / "out") as after:
        assert before.tensors.keys() == after.tensors.keys()
        for name, info in after.tensors.items():
            x, y = before.float32(name), after.float32(name)
            assert info.dtype == (dtype if len(info.shape) == 2 else "f32")
            smallest = 2.0**-24 if dtype == "f16" else 0
            assert (np.abs(x - y) <= np.abs(x) * ulp + smallest).all()
            assert np.array_equal(x, y) or len(info.shape) == 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    assert config["torch_dtype"] == names[dtype]
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    matrices = [k for k in report.kinds if k.kind != "vector"]
    assert all(k.error <= ulp**2 and k.scheme == dtype for k in matrices)
    assert report.bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("full", [1, 5000, 30_000, 10**9])
def test_files_hold_what_the_index_says(tmp_path: Path, full: int) -> None:
    source = open_checkpoint(checkpoint(tmp_path / "in", "bf16"))
    write_safetensors(source, tmp_path / "out", "bf16", lambda *_: None, full)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    with SafetensorsFolder(tmp_path / "out") as made:
        for name, info in made.tensors.items():
            assert np.array_equal(made.float32(name), source.float32(name))
            assert made.raw(name).flags.aligned and info.dtype == "bf16"
        if full == 1:
            assert count == len(made.tensors)
    index = tmp_path / "out" / "model.safetensors.index.json"
    if count == 1:
        assert files[0].name == "model.safetensors" and not index.exists()
    else:
        assert files[-1].name == f"model-{count:05}-of-{count:05}.safetensors"
        read = json.loads(index.read_text())
        assert {*read["weight_map"].values()} == {f.name for f in files}
        size = sum(i.nbytes for i in source.tensors.values())
        assert read["metadata"]["total_size"] == size
    source.close()


@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_codes_become_the_numbers_they_stand_for(tmp_path: Path, family: str) -> None:
    """Folded factors too: Gemma's norms, stored less 1, would lose them in bf16."""
    source = checkpoint(tmp_path / "in", model_type=family, tie_word_embeddings=True)
    with SafetensorsFolder(source) as opened:  # two channels far larger than the rest
        tensors = {n: opened.float32(n) for n in opened.tensors}
    for name, values in tensors.items():
        if name.endswith("input_layernorm.weight"):
            values[:2] *= 64
    stored = [(n, "f32", v.shape, v) for n, v in tensors.items()]
    safetensors.write(source / "model.safetensors", stored)
    made = chalot.convert(source, tmp_path / "a.myai", "nl4")
    assert any(k.folded for k in made.kinds)
    report = export(tmp_path / "a.myai", tmp_path / "out", "safetensors")
    assert "its weights are nl4 already; what that lost stays lost" in report.notes[0]
    for before, after in zip(made.kinds, report.kinds, strict=True):
        if after.kind != "vector":
            assert after.source_error == pytest.approx(before.error, rel=0.5)
            assert after.error < 1e-5
    chalot.convert(tmp_path / "out", tmp_path / "b.myai", "f32")
    loaded = (chalot.load(tmp_path / n, activations=16, kv="f32") for n in ("a.myai", "b.myai"))
    with next(loaded) as a, next(loaded) as b:
        x, y = a.logits([1, 5, 9, 77, 3]), b.logits([1, 5, 9, 77, 3])
    assert np.abs(x - y).max() < 0.01 * (y.max() - y.min())


def test_documents_come_along(tmp_path: Path) -> None:
    export(FOLDER, tmp_path / "a.gguf", type="q8_0")
    for source in (FOLDER, tmp_path / "a.gguf"):
        out = tmp_path / f"from-{source.stem}"
        export(source, out, "safetensors")
        names = {p.name for p in out.iterdir()}
        assert names == {
            *("config.json", "generation_config.json", "model.safetensors"),
            *("tokenizer.json", "tokenizer_config.json"),
        }
    assert (tmp_path / "from-model" / "tokenizer.json").read_bytes() == (
        FOLDER / "tokenizer.json"
    ).read_bytes()


def test_what_computes_otherwise_is_said(tmp_path: Path) -> None:
    write_folder(CASES["gemma"], 0, tmp_path / "gemma")
    report = export(tmp_path / "gemma", tmp_path / "a", "safetensors", "f32")
    assert "scales its embedding" in report.notes[0]
    assert not export(tmp_path / "gemma", tmp_path / "b", "safetensors").notes
    write_folder(CASES["bitnet"], 0, tmp_path / "bitnet")
    report = export(tmp_path / "bitnet", tmp_path / "c", "safetensors")
    assert "not coded in 8 bits" in report.notes[-1]


def test_what_cannot_be_held_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in")
    with pytest.raises(SchemeError, match="plain numbers; choose one of: bf16, f16, f32"):
        export(source, tmp_path / "out", "safetensors", "q8_0")
    with SafetensorsFolder(source) as opened:
        tensors = {n: opened.float32(n) for n in opened.tensors}
    for value, dtype, message in (
        (1e5, "f16", "too large for f16; choose --type f32 or bf16"),
        (np.float32(3.4e38), "bf16", "too large for bf16"),
        (np.nan, "f32", "has NaN or Inf"),
    ):
        tensors["lm_head.weight"][129, 3] = value
        stored = [(n, "f32", v.shape, v) for n, v in tensors.items()]
        safetensors.write(source / "model.safetensors", stored)
        with pytest.raises(WeightError, match=rf"lm_head\.weight .*{message}"):
            export(source, tmp_path / "out", "safetensors", dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_no_family_is_left_out() -> None:
    assert ARCHITECTURES.keys() >= MODELS.keys()
