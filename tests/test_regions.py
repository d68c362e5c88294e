"""Layers by name: what a file may say of them, and who goes by it."""

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chalot import cli
from chalot.convert import convert
from chalot.describe import describe
from chalot.describe.region_bytes import OUTSIDE
from chalot.errors import FormatError, RegionError
from chalot.formats.myai import MyaiFile
from chalot.model.config import ModelConfig
from chalot.model.regions import Region, check_regions, default_regions, parse_regions
from chalot.reading import read_model_config
from myai_files import checkpoint, random_file
from tiny import config

FIVE = {"num_hidden_layers": 5}
NAMED = "front=0-1,back=2-4"


@given(st.integers(1, 4096))
def test_usual_regions_cover_every_layer_once(layers: int) -> None:
    found = default_regions(layers)
    check_regions(found, layers)
    assert [i for r in found for i in r.layers] == list(range(layers))


def test_regions_of_24_layers() -> None:
    assert [str(r) for r in default_regions(24)] == ["shallow=0-5", "deep=6-17", "fact=18-23"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a=0-1", "layers 2 to 4 are in no region"),
        ("a=0-1,b=3-4", "begin at layer 2"),
        ("a=0-2,b=2-4", "begin at layer 3"),
        ("a=0-5", "end by 4"),
        ("a=3-2,b=3-4", "begin at layer 0"),
        ("a=0-1,a=2-4", "name of its own"),
        ("head=0-4", "name of its own"),
        ("A b=0-4", "expected NAME=FIRST-LAST"),
        ("a=0-99999999999", "expected NAME=FIRST-LAST"),
        ("", "expected NAME=FIRST-LAST"),
    ],
)
def test_regions_that_do_not_fit_are_refused(text: str, said: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", **FIVE)
    with pytest.raises(RegionError, match=said):
        convert(source, tmp_path / "x.myai", regions=text)
    assert not (tmp_path / "x.myai").exists()


def test_a_file_has_its_regions_and_gives_them_on(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", **FIVE)
    one, two, plain = (tmp_path / n for n in ("one.myai", "two.myai", "plain.myai"))
    convert(source, one, "int8", regions=NAMED)
    convert(one, two, "nl4")
    convert(source, plain)
    for path in (one, two):
        assert [(r.name, r.first, r.last) for r in describe(path).regions] == [
            ("front", 0, 1),
            ("back", 2, 4),
            (OUTSIDE, None, None),
        ]
    raw = MyaiFile(plain)
    assert "named_regions" not in raw.manifest.config, "older versions can read it"
    raw.close()


@pytest.mark.parametrize("path", ["source", "x.myai"])
def test_describe_counts_every_byte_of_a_model_once(path: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", **FIVE)
    convert(source, tmp_path / "x.myai")
    report = describe(tmp_path / path)
    assert sum(r.bytes for r in report.regions) == report.bytes
    assert sum(r.weights for r in report.regions) == report.parameters


def test_describe_prints_regions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = random_file(tmp_path / "x.myai", config(layers=4), "nl4")
    assert cli.main(["describe", str(path)]) == 0
    assert "shallow" in capsys.readouterr().out
    assert cli.main(["describe", str(path), "--json"]) == 0
    assert [r["name"] for r in json.loads(capsys.readouterr().out)["regions"]] == [
        *("shallow", "deep", "fact", OUTSIDE)
    ]


def test_a_manifest_with_regions_that_do_not_fit_is_refused() -> None:
    regions = (Region("shallow", 0, 0), Region("deep", 2, 1))
    with pytest.raises(ValueError, match="begin at layer 1"):
        config(named_regions=regions)
    raw = msgspec.to_builtins(config()) | {"named_regions": [{"name": "a", "first": 0, "last": 7}]}
    with pytest.raises(msgspec.ValidationError, match="end by 1"):
        msgspec.convert(raw, ModelConfig)


def test_a_plan_may_speak_of_regions(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", **FIVE)
    plan = {
        "format": 1, "source": "", "fingerprint": "", "method": "by hand",
        "tensors": {"front": "int8", "back.ffn": "nl2", "layers.3.down": "nl4"},
        "bytes": 0, "bits_per_weight": 0,
    }  # fmt: skip
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    convert(source, tmp_path / "x.myai", "bf16", plan=file, regions=NAMED)
    found = MyaiFile(tmp_path / "x.myai")
    schemes = {n: t.scheme for n, t in found.manifest.tensors.items()}
    read_model_config(found)
    found.close()
    assert schemes["layers.1.query"] == schemes["layers.0.down"] == "int8"
    assert schemes["layers.2.up"] == "nl2"
    assert schemes["layers.3.down"] == "nl4", "a tensor's own name goes over its region's"
    assert schemes["layers.3.query"] == "bf16"
    with pytest.raises(FormatError, match="names 'back.ffn', which is no matrix"):
        convert(source, tmp_path / "y.myai", plan=file)  # whose regions have other names


def test_parse_undoes_str() -> None:
    found = default_regions(24)
    assert parse_regions(",".join(map(str, found))) == found
