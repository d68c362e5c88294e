"""`.myai` version 2: what it decodes to, what it runs as, and what is refused."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot.demo import FOLDER
from chalot.errors import ChalotError, FormatError, UnsupportedError
from chalot.formats import safetensors
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.myai.v2 import MyaiV2
from myai_v2_files import header, write

pytestmark = pytest.mark.filterwarnings("ignore:.*version 2 has no place for")
WAYS = {
    "no router": {},
    "router": {"router": True, "experts": 1},
    "depth": {"depth": True},
    "both": {"router": True, "depth": True},
    "experts": {"router": True, "experts": 3, "flags": 7, "top_k": 2},
    "group": {"group": 20},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_arrangement_is_found_by_its_length(tmp_path: Path, way: str) -> None:
    meant = write(tmp_path / "m.myai", **WAYS[way])
    found = open_checkpoint(tmp_path / "m.myai")
    assert isinstance(found, MyaiV2) and found.tensors.keys() == meant.keys()
    for name, values in meant.items():
        assert np.array_equal(found.float32(name), values), name
        assert np.array_equal(found.float32(name, 3, 7), values[3:7]), name
        assert found.tensors[name].shape == values.shape
    found.check_unchanged()
    found.close()
    with pytest.raises(FormatError, match="closed"):
        found.float32("lm_head.weight")


def test_logits_are_those_of_the_float_model_it_decodes_to(tmp_path: Path) -> None:
    meant = write(tmp_path / "m.myai")
    folder = tmp_path / "floats"
    folder.mkdir()
    tensors = [(n, "f32", w.shape, w) for n, w in meant.items()]
    safetensors.write(folder / "model.safetensors", tensors)
    config = MyaiV2(tmp_path / "m.myai").document("config.json")
    assert config is not None and json.loads(config)["rope_theta"] == 10000
    (folder / "config.json").write_bytes(config)
    logits = []
    for source in (tmp_path / "m.myai", folder):
        chalot.convert(source, tmp_path / "out.myai", "f32")
        with chalot.load(tmp_path / "out.myai") as model:
            logits.append(model.logits([1, 17, 129, 4, 4]))
    assert np.array_equal(*logits) and np.isfinite(logits[0]).all()


def test_a_tokenizer_beside_it_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "m.myai")
    with pytest.warns(UserWarning, match="token ids only"):
        assert MyaiV2(tmp_path / "m.myai").document("tokenizer.json") is None
    text = (FOLDER / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(text)
    with pytest.warns(UserWarning, match=r"the tokenizer in .*tokenizer\.json"):
        assert MyaiV2(tmp_path / "m.myai").document("tokenizer.json") == text


def test_experts_that_differ_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.myai", router=True, other=True, experts=3, flags=7)
    with pytest.raises(UnsupportedError, match="3 experts that differ; a mixture of experts"):
        MyaiV2(tmp_path / "m.myai")


HOSTILE = {
    "dim 0": ({"dim": 0}, "dim is 0"),
    "dim huge": ({"dim": 0xFFFFFFFF}, "dim is 4294967295"),
    "products past 64 bits": (
        {"dim": 1 << 24, "hidden": 1 << 24, "layers": 4096, "experts": 64},
        "asks for",
    ),
    "layers": ({"layers": 1 << 31}, "n_layers is"),
    "many tiny experts": ({"dim": 2, "heads": 1, "experts": 64, "layers": 4096}, "asks for"),
    "experts": ({"experts": 1 << 31}, "experts; expected at most"),
    "heads 0": ({"heads": 0}, "n_heads is 0"),
    "heads": ({"heads": 3}, "heads that share dim evenly"),
    "odd": ({"hidden": 95}, "expected even sizes"),
    "group": ({"group": 0}, "int4 group is 0"),
    "context": ({"context": 0}, "max_seq_len is 0"),
    "vocabulary": ({"vocabulary": 131}, "asks for"),
    "ternary": ({"flags": 9}, "flags 0x9"),
    "floats": ({"flags": 0}, "flags 0x0"),
    "unknown flag": ({"flags": 0x13}, "flags 0x13"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    changes, message = HOSTILE[case]
    path = tmp_path / "m.myai"
    write(path)
    path.write_bytes(header(**changes) + path.read_bytes()[256:])
    with pytest.raises(ChalotError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert message in text and "m.myai" in text and "\n" not in text and len(text) < 400


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.myai"
    write(path)
    content = path.read_bytes()
    for length in (8, 100, 255, 256, 257, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError):
            open_checkpoint(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(FormatError, match="asks for"):
        open_checkpoint(path)


def test_scales_that_are_no_numbers_stop_the_conversion(tmp_path: Path) -> None:
    path = tmp_path / "m.myai"
    write(path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, len(content) - 4, float("nan"))  # the head's last scale
    path.write_bytes(content)
    with pytest.raises(ChalotError, match=r"lm_head\.weight has NaN or Inf"):
        chalot.convert(path, tmp_path / "out.myai")
    assert not (tmp_path / "out.myai").exists()


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.myai"
    write(path)
    found = MyaiV2(path)
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(FormatError, match="changed since"):
        found.float32("lm_head.weight")
