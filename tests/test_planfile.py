"""A plan's file: what is written is read, in both forms; what is hostile ends in one line."""

import json
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import chalot
from chalot import cli
from chalot.checking import read_config
from chalot.errors import FormatError, SchemeError
from chalot.formats.checkpoint import open_checkpoint
from chalot.model.config import ModelConfig
from chalot.plan import plan
from chalot.planfile import (
    LARGEST,
    SIMPLE,
    VERSION,
    PlanDocument,
    as_bytes,
    fingerprint,
    from_simple,
    planned_schemes,
    read_plan,
    to_simple,
)
from chalot.quant.scheme import SCHEMES
from checkpoints import Weights, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("planfile") / "model")


@pytest.fixture(scope="module")
def config(folder: Path) -> ModelConfig:
    with closing(open_checkpoint(folder)) as source:
        return read_config(source)


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PlanDocument:
    return plan(folder, tmp_path_factory.mktemp("made") / "p.json", method="ewq")


def test_what_is_written_is_read(made: PlanDocument, config: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(as_bytes(made))
    assert read_plan(path, config) == made
    assert as_bytes(read_plan(path, config)) == path.read_bytes()


def test_the_simple_form_goes_both_ways(
    folder: Path, made: PlanDocument, config: ModelConfig, tmp_path: Path
) -> None:
    path = tmp_path / "simple.json"
    words = ["plan", str(folder), "--method", "ewq", "--simple", "-o", str(path)]
    assert cli.main([*words, "-q"]) == 0
    levels = json.loads(path.read_text())
    assert levels == to_simple(made) and list(levels) == ["0", "1", "2"]
    again = read_plan(path, config)
    blocks = {n: s for n, s in made.tensors.items() if n.startswith("layers.")}
    assert again.tensors == blocks and again.fingerprint == ""
    with closing(open_checkpoint(folder)) as source:
        schemes = planned_schemes(again, source, config)  # embedding and head: as is usual
    assert {n: str(s) for n, s in schemes.items()} == blocks


@given(st.lists(st.sampled_from(sorted(SIMPLE)), min_size=3, max_size=3))
def test_every_simple_plan(config: ModelConfig, levels: list[str]) -> None:
    said = {str(i): level for i, level in enumerate(levels)}
    assert to_simple(from_simple(said, config, "")) == said


def test_plans_that_no_simple_form_can_say(made: PlanDocument) -> None:
    for name, scheme in (("layers.1.up", "f32"), ("layers.1.up", "nl2")):
        mixed = msgspec.structs.replace(made, tensors={**made.tensors, name: scheme})
        with pytest.raises(SchemeError, match="block 1 has"):
            as_bytes(mixed, simple=True)


def test_another_models_plan_is_refused(
    folder: Path, made: PlanDocument, config: ModelConfig, tmp_path: Path
) -> None:
    def other_row(weights: Weights) -> None:
        weights["layers.2.down"][0, 0] += 1

    other = write_checkpoint(tmp_path / "other", other_row)
    with closing(open_checkpoint(folder)) as a, closing(open_checkpoint(other)) as b:
        assert fingerprint(a) == made.fingerprint != fingerprint(b)
        assert planned_schemes(made, a, config)["embedding"] == SCHEMES["int8"]
        for wrong, checkpoint in (
            (made, b),
            (msgspec.structs.replace(made, fingerprint="", tensors={"layers.9.up": "nl4"}), a),
        ):
            with pytest.raises(FormatError, match="make one for it with `chalot plan`"):
                planned_schemes(wrong, checkpoint, config)


def test_tensors_that_a_plan_does_not_name_are_said(
    folder: Path, made: PlanDocument, tmp_path: Path
) -> None:
    path, out = tmp_path / "p.json", tmp_path / "m.myai"
    path.write_bytes(as_bytes(made))
    assert not chalot.convert(folder, out, plan=path).notes
    few = {n: s for n, s in made.tensors.items() if n not in ("embedding", "layers.2.down")}
    path.write_bytes(as_bytes(msgspec.structs.replace(made, tensors=few)))
    (note,) = chalot.convert(folder, out, plan=path).notes
    assert "leaves out 2 of 22 matrices, which get nl4: embedding, layers.2.down" in note
    path.write_text('{"0": "raw", "1": "raw", "2": "8-bit"}')
    assert "leaves out 1 of 22 matrices" in chalot.convert(folder, out, plan=path).notes[0]
    wrong = {"layers.2.dwn": "nl4", "\x1b[2J": "nl4"}
    for name, said in (("layers.2.dwn", "did you mean layers.2.down"), ("\x1b[2J", r"'\x1b[2J'")):
        path.write_bytes(as_bytes(msgspec.structs.replace(made, tensors={name: wrong[name]})))
        with pytest.raises(FormatError) as caught:
            chalot.convert(folder, out, plan=path)
        assert said in str(caught.value) and "is no matrix of" in str(caught.value)


def test_what_is_no_plan_to_read(config: ModelConfig, tmp_path: Path) -> None:
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(LARGEST + 2)  # sparse
    for path in (huge, tmp_path, tmp_path / "nowhere.json", Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(FormatError):
            read_plan(path, config)


def test_plans_are_plain_json(made: PlanDocument) -> None:
    """Whoever reads one needs JSON alone; numbers are finite."""
    found = json.loads(as_bytes(made), parse_constant=lambda name: pytest.fail(name))
    assert found["details"]["variant"] == "softmax" and found["format"] == VERSION
