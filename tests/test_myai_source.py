"""A `.myai` file as a source: what `load` computes with is what comes back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot.checking import read_config
from chalot.errors import FormatError, OutputError, UnsupportedError
from chalot.formats.checkpoint import Checkpoint, open_checkpoint
from chalot.formats.names import hugging_face
from chalot.model.config import from_hugging_face
from myai_files import SMALL, checkpoint, edited, random_file

GEMMA = {"model_type": "gemma", "head_dim": 16, "tie_word_embeddings": True}
IDS = [1, 5, 9, 77, 3, 129, 64]


@contextmanager
def opened(path: Path) -> Iterator[Checkpoint]:
    source = open_checkpoint(path)
    try:
        yield source
    finally:
        source.close()


@pytest.mark.parametrize("scheme", ["f32", "bf16", "f16", "int8", "nl4"])
def test_rows_are_those_of_the_whole_however_they_are_asked_for(
    tmp_path: Path, scheme: str
) -> None:
    folder = checkpoint(tmp_path / "folder")
    chalot.convert(folder, tmp_path / "m.myai", scheme=scheme)
    with opened(tmp_path / "m.myai") as source, opened(folder) as original:
        assert source.tensors.keys() == original.tensors.keys()
        for name, info in source.tensors.items():
            whole = source.float32(name)
            assert whole.shape == info.shape == original.tensors[name].shape
            for first, last in ((0, 0), (3, 31), (17, 17), (16, 32), (31, info.shape[0])):
                assert np.array_equal(source.float32(name, first, last), whole[first:last])
            if scheme == "f32":
                assert np.array_equal(whole, original.float32(name))
                assert np.array_equal(source.raw(name), whole)
            elif len(info.shape) == 2:
                assert info.scheme == (scheme if scheme in ("int8", "nl4") else "")
        assert source.document("config.json") == original.document("config.json")


@pytest.mark.parametrize("scheme", ["int8", "nl4"])
def test_a_source_computes_what_the_file_computes(tmp_path: Path, scheme: str) -> None:
    """Written again as f32, a file's weights give its logits, given sixteen-bit activations."""
    chalot.convert(checkpoint(tmp_path / "folder"), tmp_path / "a.myai", scheme=scheme)
    report = chalot.convert(tmp_path / "a.myai", tmp_path / "b.myai", scheme="f32")
    assert f"are {scheme} already; what that lost stays lost" in report.notes[0]
    assert all(k.error == 0 for k in report.kinds)
    assert all((k.source_error or 0) > 0 for k in report.kinds if k.kind != "vector")
    loaded = (chalot.load(tmp_path / n, activations=16, kv="f32") for n in ("a.myai", "b.myai"))
    with next(loaded) as a, next(loaded) as b:
        x, y = a.logits(IDS), b.logits(IDS)
    assert np.abs(x - y).max() < 0.001 * (y.max() - y.min())


def test_a_missing_configuration_is_made_up(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0} | {
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    for changes in ({}, {"model_type": "llama", "rope_scaling": scaling, "attention_bias": True}):
        config = from_hugging_face({**SMALL, **changes})
        with opened(random_file(tmp_path / "m.myai", config, "nl4")) as source:
            assert source.document("generation_config.json") is None
            assert read_config(source) == config


def test_norms_are_those_of_the_source(tmp_path: Path) -> None:
    """Gemma's checkpoints hold norm weights less 1; a .myai file holds what is computed with."""
    folder = checkpoint(tmp_path / "f", **GEMMA)
    chalot.convert(folder, tmp_path / "m.myai", scheme="f32")
    with opened(tmp_path / "m.myai") as source, opened(folder) as original:
        for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
            found, wanted = source.float32(name), original.float32(name)
            assert np.abs(found - wanted).max() < 1e-6


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.myai"
    chalot.convert(checkpoint(tmp_path / "f"), path, scheme="nl4")

    def rename(manifest: dict[str, dict[str, object]]) -> None:
        manifest["tensors"]["layers.0.nonsense"] = manifest["tensors"].pop("layers.0.query")

    content = path.read_bytes()
    path.write_bytes(edited(content, rename))
    with pytest.raises(FormatError, match="no place in a model"):
        open_checkpoint(path)
    for cut in (0, 6, 8, 300):
        path.write_bytes(content[:cut])
        with pytest.raises(FormatError):
            open_checkpoint(path)
    path.write_bytes(content)
    with opened(path) as source:
        with pytest.raises(UnsupportedError, match="nl4"):
            source.raw(hugging_face("layers.0.query"))
        with pytest.raises(FormatError, match="no tensor"):
            source.float32("model.layers.9.mlp.up_proj.weight")
        with pytest.raises(IndexError):
            source.float32(hugging_face("layers.0.query"), 0, 65)
        path.write_bytes(content[:-1])
        with pytest.raises(FormatError, match="changed"):
            source.check_unchanged()
        with pytest.raises(FormatError, match="cut"):
            source.float32(hugging_face("head"))


def test_what_is_damaged_is_not_converted(tmp_path: Path) -> None:
    """Else the damage would get right checksums."""
    made = tmp_path / "a.myai"
    chalot.convert(checkpoint(tmp_path / "folder"), made, scheme="int8")
    with opened(made) as source:
        at = source.file.manifest.tensors["layers.0.up"].extent.offset
    raw = bytearray(made.read_bytes())
    raw[at] ^= 1
    made.write_bytes(raw)
    with pytest.raises(FormatError, match=r"'layers\.0\.up' is damaged"):
        chalot.convert(made, tmp_path / "b.myai")
    assert not (tmp_path / "b.myai").exists()


def test_a_source_is_not_its_own_target(tmp_path: Path) -> None:
    made = tmp_path / "a.myai"
    chalot.convert(checkpoint(tmp_path / "folder"), made, scheme="int8")
    before = made.read_bytes()
    with pytest.raises(OutputError, match="is the source itself"):
        chalot.convert(made, made, scheme="nl4")
    assert made.read_bytes() == before
