"""Tokens that leave early: which, what the cache then holds, what it costs, when it is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

import chalot
from chalot import calibrated, cli
from chalot.calibrate import CalibrateReport, calibrate
from chalot.calibrated import Supervisor, beside
from chalot.convert import convert
from chalot.engine.early_exit import NEVER, EarlyExit
from chalot.engine.generate import Work
from chalot.engine.sampler import SamplingError
from chalot.errors import FormatError, UnsupportedError
from chalot.evaluate.exits import exits, render
from chalot.load import Model
from chalot.model.cache import Sequence
from chalot.model.pieces import extended
from chalot.model.transformer import head_name
from chalot.quant.packing import aligned, take_rows
from myai_files import random_file
from tiny import config

DEMO = Path(chalot.__file__).parent / "demo" / "model"
HELD_OUT = DEMO / "heldout.txt"


@pytest.fixture(scope="module")
def report(demo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrateReport:
    """The bundled model, calibrated on little text."""
    path = tmp_path_factory.mktemp("exits") / "x.myai"
    shutil.copy(demo_file, path)
    return calibrate(path, HELD_OUT, tokens=512)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is not what these tests are about."""
    monkeypatch.setattr("chalot.evaluate.exits.ANSWER", 3)


def leaving(model: Model, borders: tuple[int, ...], margin: float, rows: int = 500) -> EarlyExit:
    """The model with early exit at these borders, by a head of every few tokens."""
    name, made = head_name(model.config), model.maker
    kept = np.arange(0, model.config.vocabulary, max(1, model.config.vocabulary // rows))
    short = take_rows(made.weights.matrices[name], kept)
    weights = extended(made.weights, "few", short, made.weights.planes.get(name, 0))
    out = EarlyExit(replace(made, weights=weights), borders, "few", len(kept), margin)
    model.engine.runnable = out
    return out


def one_by_one(model: Model, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of tokens that are fed one at a time, and what the cache holds then."""
    place = Sequence(model.engine.cache)
    found = np.concatenate([model.engine.step([Work(place, [i])]) for i in ids])
    size = model.engine.cache.shape.page_bytes
    held = model.engine.cache.arena[place.pages[0] * size :][:size].copy()
    place.close()
    return found, held


def test_nothing_leaves_above_the_highest_lead(demo_file: Path) -> None:
    ids = list(range(40, 90))
    with Model(demo_file, draft=False) as model:
        want = model.logits(ids)
        for margin in (NEVER, 100.0):
            made = leaving(model, (2, 4), margin)
            assert np.array_equal(model.logits(ids), want)
            assert made.leaving.left == [0, 0]


@pytest.mark.parametrize("margin", [0.0, 1.0, 2.5])
def test_a_text_at_once_is_the_text_token_by_token(margin: float, demo_file: Path) -> None:
    with Model(demo_file, draft=False, context=512) as model:
        ids = model.tokenizer.encode(HELD_OUT.read_text()[:4000])[:290]
        made = leaving(model, (2, 4), margin)
        at_once = model.logits(ids)
        left = list(made.leaving.left)
        assert np.array_equal(one_by_one(model, ids)[0], at_once)
        assert made.leaving.left == [2 * n for n in left]
        assert 0 < sum(left) <= len(ids)
        if margin == 0:
            assert left == [len(ids), 0]


def test_skipped_layers_are_filled_as_the_oracle_fills_them(tmp_path: Path) -> None:
    path = random_file(tmp_path / "x.myai", config(layers=3, head_norms=True), "int8")
    ids = [5, 200, 7, 5, 5, 30]
    found = []
    for isa in ("reference", None):
        with Model(path, isa=isa, draft=False, context=64) as model:
            made = leaving(model, (1, 2), 0.01, rows=300)
            found.append((*one_by_one(model, ids), made.leaving.left))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1]), "keys and values, all layers"
    assert found[0][2] == found[1][2]


def test_a_filled_layer_holds_what_its_own_projections_make(tmp_path: Path) -> None:
    """Where layers add nothing to the hidden state, skipping them changes nothing at all."""
    path = random_file(tmp_path / "x.myai", config(layers=3), "int8")
    with Model(path, draft=False, context=64) as model:
        matrices = dict(model.maker.weights.matrices)
        for name, m in matrices.items():
            if name.endswith((".output", ".down")) and not name.startswith("layers.0"):
                matrices[name] = replace(m, data=aligned(m.data.size))  # scales of zero
        model.maker = replace(model.maker, weights=replace(model.maker.weights, matrices=matrices))
        leaving(model, (1,), NEVER)
        want = one_by_one(model, [4, 5, 6])
        made = leaving(model, (1,), 0.0)
        found = one_by_one(model, [4, 5, 6])
        assert made.leaving.left == [3]
        assert np.array_equal(found[0], want[0])
        assert np.array_equal(found[1], want[1]), "the cache is whole"


def test_prompts_go_through_all_layers(demo_file: Path) -> None:
    with Model(demo_file, draft=False) as model:
        made = leaving(model, (2, 4), 0.0)
        with model.session(temperature=0) as session:
            session.prefill(list(range(40, 60)))
            assert made.leaving.tokens == 1, "the last, whose logits are wanted"
            for _ in range(5):
                session.step()
            assert made.leaving.tokens == 5
            assert made.leaving.left == [5, 0]


def test_drafting_changes_nothing_of_it(report: CalibrateReport) -> None:
    texts = set()
    for draft in (True, False):
        with chalot.load(report.model, early_exit=1.0, draft=draft) as model:
            made = model.reflexes.exit
            assert made is not None
            texts.add(model.generate("a b c a b c a b", max_tokens=30, temperature=0))
            assert sum(made.leaving.left) > 0
    assert len(texts) == 1


def test_the_loss_is_measured_against_full_depth(report: CalibrateReport) -> None:
    found = exits(report.model, HELD_OUT, [100.0, 3.0, 0.0], tokens=600)
    never, some, always = found.margins
    assert never.quality.kl == pytest.approx(0, abs=1e-12)
    assert never.quality.same_top == 1
    assert 0 < (some.quality.kl or 0) < (always.quality.kl or 0)
    first = report.found.exits[0].layers
    assert always.left[first] == 1
    assert 0 < sum(some.left.values()) < 1
    assert "full depth" in render(found)


def test_the_commands_print_it(report: CalibrateReport, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", report.model, "--text", str(HELD_OUT), "--tokens", "300"]
    assert cli.main([*command, "--early-exit", "2,auto", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["early_exit"]["margins"]
    assert [m["margin"] for m in found] == [2, report.found.exits[0].margin]
    assert cli.main([*command, "--early-exit", "2"]) == 0
    assert "same top" in capsys.readouterr().out
    run = ["run", report.model, "Once", "--max-tokens", "4", "--temperature", "0"]
    assert cli.main([*run, "--early-exit", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["early_exit"]
    assert said["tokens"] == sum(said["left"].values()) > 0
    assert cli.main([*run, "--early-exit", "0", "-v"]) == 0
    assert "answers change" in capsys.readouterr().err


def test_a_supervisor_sets_the_margin_of_a_prompt(report: CalibrateReport, tmp_path: Path) -> None:
    path = tmp_path / "x.myai"
    shutil.copy(report.model, path)
    with Model(path, draft=False, calibration=False) as model:
        both = calibrated.read(Path(report.path), model.config, model.file.digest)
        hidden = model.config.hidden
    assert both is not None
    for bias, factor in ((1.0, 0.5), (-1.0, 1.0)):
        made = Supervisor(0.9, 0.5, 0.5, 0.01, 99, True, (0.0,) * hidden, bias)
        with calibrated.new_calibration(beside(path)) as write:
            write(msgspec.structs.replace(both[0], supervisor=made), both[1])
        with chalot.load(path, early_exit="auto") as model:
            asked = both[0].exits[0].margin
            with model.session(temperature=0) as session:
                session.prefill([40, 41, 42])
                session.step()
                assert session.margin == asked * factor
                assert model.reflexes.exit is not None
                assert model.reflexes.exit.margin == asked * factor
            model.logits([1])
            assert model.reflexes.exit.margin == asked
            report_of = model.reflexes.report()
            assert report_of is not None
            assert report_of.supervised
        with chalot.load(path, early_exit=3.0) as model, model.session() as session:
            session.prefill([40, 41])
            assert session.margin is None, "a margin that was asked for stays"


# ---- refused


@pytest.mark.parametrize("margin", [-1, 100.5, float("nan"), float("inf"), "often", [], True])
def test_margins_outside_their_range_are_refused(margin: object, demo_file: Path) -> None:
    with pytest.raises(SamplingError, match="expected 0 to 100 .of logits., or auto"):
        Model(demo_file, early_exit=margin)  # type: ignore[arg-type]


def test_it_needs_a_calibration(demo_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FormatError, match="needs a calibration; make one: chalot calibrate"):
        Model(demo_file, early_exit=3.0)
    assert cli.main(["run", str(demo_file), "Once", "--early-exit", "3"]) == 1
    assert "needs a calibration" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", str(demo_file), "Once", "--early-exit", "often"])


def test_it_does_not_go_with_a_budget(report: CalibrateReport) -> None:
    with pytest.raises(UnsupportedError, match="do not go together"):
        Model(report.model, early_exit=3.0, budget=2_000_000)


def test_a_model_of_one_region_has_no_border(tmp_path: Path) -> None:
    path = tmp_path / "x.myai"
    convert(DEMO, path, regions="all=0-5")
    found = calibrate(path, HELD_OUT, tokens=256)
    assert found.found.exits == ()
    with pytest.raises(UnsupportedError, match="no border to leave at"):
        Model(path, early_exit=3.0)
