"""The language model in a checkpoint of text and images; of Gemma 3, test_parity.py."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot.describe import describe
from chalot.errors import FormatError
from chalot.formats import safetensors
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.folders import as_computed
from golden import cases
from golden.cases import CASES, Shard
from test_exactness import ids


def gemma3_with_images(folder: Path, prefix: str) -> Path:
    """The golden Gemma 3 in a checkpoint of text and images, as older and newer ones hold it."""
    case, shard = CASES["gemma3"], Shard()
    for name, shape in cases.shapes(case.config).items():
        values = cases.weights(case, name, shape, 0)
        shard.add(prefix + name.removeprefix("model."), values, case.stored)
    vision = ("vision_tower.vision_model.post_layernorm.weight", "multi_modal_projector.x.weight")
    for name in vision:
        shard.add(name, np.ones((4, 4), np.float32), "bf16")
    outside = ("architectures", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": cases.without(case.config, *outside),
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 4},
        **{key: case.config[key] for key in outside[1:]},
    }
    folder.mkdir(parents=True)
    shard.write(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_text_and_images_text_is_read(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The language model in such a checkpoint is the one alone, which transformers' logits hold."""
    folder = gemma3_with_images(tmp_path / "images", prefix)
    plain = cases.write_folder(CASES["gemma3"], 0, tmp_path / "plain")
    logits = []
    for source in (folder, plain):
        chalot.convert(source, tmp_path / "m.myai", scheme="bf16", threads=1)
        with chalot.load(tmp_path / "m.myai", threads=1) as model:
            assert model.config.family == "gemma3_text"
            logits.append(model.logits(ids(3, 30) % 512))
    np.testing.assert_array_equal(*logits)
    assert "language model alone is read, without 2 tensors" in caplog.text
    headers = safetensors.SafetensorsFolder(folder)
    raw = headers.document("config.json")
    with_names = as_computed(headers.tensors, raw, folder)  # as of a hub id, by its headers
    headers.close()
    assert set(with_names) == set(cases.shapes(CASES["gemma3"].config))
    described = describe(folder)
    assert not described.origin.unused
    assert described.architecture == describe(plain).architecture
    chalot.export(folder, tmp_path / "out", to="safetensors")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["torch_dtype"]) == ("gemma3_text", "bfloat16")
    opened = safetensors.SafetensorsFolder(tmp_path / "out")
    assert set(opened.tensors) == set(cases.shapes(CASES["gemma3"].config))
    opened.close()


def test_one_text_part_by_two_names_is_refused(tmp_path: Path) -> None:
    folder = gemma3_with_images(tmp_path / "images", "language_model.model.")
    shard = Shard()
    for prefix in ("language_model.model.", "model.language_model."):
        shard.add(prefix + "norm.weight", np.ones(96, np.float32), "f32")
    shard.write(folder / "model.safetensors")
    with pytest.raises(chalot.ChalotError, match="twice, by two names"):
        open_checkpoint(folder)


def test_what_is_not_there_is_a_typed_error(tmp_path: Path) -> None:
    folder = gemma3_with_images(tmp_path / "images", "language_model.model.")
    with closing(open_checkpoint(folder)) as opened:
        for read in (opened.raw, opened.float32):
            with pytest.raises(FormatError, match="has no tensor"):
                read("vision_tower.vision_model.post_layernorm.weight")
