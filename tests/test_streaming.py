"""Regions that stay in memory, and a budget that the rest passes through: the same bits."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import chalot
from chalot import cli
from chalot.errors import FormatError, LimitError, RegionError
from chalot.formats.streaming import plan
from chalot.load.residence import Residence
from chalot.model.pieces import ROWS, Pieces
from myai_files import random_file
from test_residency import LOCKS, locked, locks
from tiny import config

linux = pytest.mark.skipif(sys.platform != "linux", reason="streams on Linux only")
LAYERS = 6
BIG = {"layers": LAYERS, "hidden": 512, "heads": 8, "head_dim": 64, "feed_forward": 1536}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_file(tmp_path_factory.mktemp("big") / "x.myai", config(**BIG), "nl4")


def a_layer(path: Path) -> int:
    """Bytes of its first layer."""
    with chalot.load(path) as model:
        return model.residence.sizes[0]


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=30),
    st.sets(st.integers(0, 29), max_size=8),
    st.integers(0, 2000),
)
def test_a_plan_keeps_to_its_budget(sizes: list[int], kept: set[int], budget: int) -> None:
    kept = {i for i in kept if i < len(sizes)}
    names = [f"unit {i}" for i in range(len(sizes))]
    free = [s for i, s in enumerate(sizes) if i not in kept]
    least = min(sum(sizes), sum(sizes) - sum(free) + max(free, default=0))
    if budget < least:
        with pytest.raises(LimitError, match=f"the least is {least:,}"):
            plan(sizes, sorted(kept), budget, names)
        return
    found = plan(sizes, sorted(kept), budget, names)
    assert not found.streamed & kept
    assert found.bytes <= budget
    stays = sum(s for i, s in enumerate(sizes) if i not in found.streamed)
    largest = sorted((sizes[i] for i in found.streamed), reverse=True)
    assert found.stays == stays
    assert found.window == sum(largest[: 2 if found.ahead else 1])


@linux
@pytest.mark.parametrize("layers", [1, 2, 4, 40])  # that the budget holds
def test_logits_are_the_same_in_any_budget(layers: int, file: Path) -> None:
    size = a_layer(file)
    ids = list(range(1, 301))  # more than are handed over at once
    assert len(ids) > ROWS
    with chalot.load(file) as model:
        whole, first = model.logits(ids), model.logits(ids[:3])
    with chalot.load(file, budget=size * layers + 4096) as model:
        assert np.array_equal(model.logits(ids), whole)
        assert np.array_equal(model.logits(ids[:3]), first)
        found = model.residence.report()
        passing = max(0, LAYERS - max(layers - 2, 0)) if layers < LAYERS else 0
        assert found.streamed_layers == passing
        assert found.weights_bytes <= size * layers + 4096
        assert bool(found.read_bytes) == bool(passing)


@linux
def test_what_passed_through_is_not_mapped_any_more(file: Path) -> None:
    size = a_layer(file)
    with chalot.load(file, budget=2 * size) as model:
        model.logits([1, 2, 3])
        model.residence.close()  # so that the last unit is dropped or not, but nothing moves
        lines = Path("/proc/self/smaps").read_text().split("\n")
        begin = next(i for i, line in enumerate(lines) if line.endswith(str(file)))
        rss = next(line for line in lines[begin:] if line.startswith("Rss:"))
    assert int(rss.split()[1]) * 1024 < 2.5 * size
    assert 2.5 * size < 0.6 * file.stat().st_size


@pytest.mark.parametrize("isa", ["reference", None])
def test_pieces_give_the_bits_of_the_whole(isa: str | None, tmp_path: Path) -> None:
    path = random_file(tmp_path / "x.myai", config(layers=3), "int8")
    with chalot.load(path, isa=isa) as model:
        want = model.logits([5, 6, 7, 8])
        for borders in ([1], [2], [1, 2], []):
            model.engine.runnable = Pieces(model.maker, borders)
            assert np.array_equal(model.logits([5, 6, 7, 8]), want)
            assert np.array_equal(model.logits([5, 6, 7, 8], last=2), want[2:])
            with model.session(temperature=0) as session:
                session.prefill([5, 6, 7, 8])
                assert session.step() == int(want[3].argmax())


@linux
@locks
def test_a_kept_region_is_locked_and_no_more(file: Path) -> None:
    before = locked()
    with chalot.load(file, keep=["shallow", "shallow"]) as model:
        found = model.residence.report()
        assert found.kept == ("shallow",)
        held = locked() - before
        assert found.kept_bytes <= held < found.kept_bytes + 64 * 4096
        assert found.weights_bytes == sum(model.residence.sizes)


@linux
@locks
def test_a_kept_region_does_not_pass(file: Path) -> None:
    size = a_layer(file)
    with chalot.load(file) as model:
        want = model.logits([1, 2])
    with chalot.load(file, keep=["fact"], budget=4 * size + 4096) as model:
        assert model.residence.plan is not None
        assert not model.residence.plan.streamed & {4, 5}
        assert np.array_equal(model.logits([1, 2]), want)


def test_an_unknown_region_is_named_with_those_that_there_are(file: Path) -> None:
    with pytest.raises(RegionError, match="'middle' is not known; the model has shallow=0-1"):
        chalot.load(file, keep=["middle"])


@linux
def test_a_budget_below_one_layer_says_the_least(file: Path) -> None:
    size = a_layer(file)
    with pytest.raises(LimitError, match=f"takes {size:,} bytes; the least is {size:,}"):
        chalot.load(file, budget=size - 1)
    if LOCKS:
        with pytest.raises(LimitError, match="what is kept"):
            chalot.load(file, budget=2 * size, keep=["shallow"])


def test_a_budget_is_for_mapped_files(file: Path) -> None:
    with pytest.raises(FormatError, match="leave out --no-mmap"):
        chalot.load(file, budget=1 << 30, mmap=False)
    with pytest.raises(LimitError, match="give one"):
        chalot.load(file, budget=1 << 30, mlock=True)


def test_refused_calls_do_not_stop_a_stream(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("streams on Linux only")
    size = a_layer(file)
    with chalot.load(file) as model:
        want = model.logits([1, 2])
    with chalot.load(file, budget=3 * size) as model:
        stream = model.residence.stream
        assert stream is not None
        monkeypatch.setattr(stream, "_advise", lambda *_: -1)
        assert np.array_equal(model.logits([1, 2]), want)
        assert not stream.populates


@linux
def test_a_run_says_what_a_budget_came_to(
    demo_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(demo_file), "Once", "--max-tokens", "3", "--temperature", "0"]
    assert cli.main([*command, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert "residency" not in plain
    assert cli.main([*command, "--json", "--budget", "2MB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == plain["text"]
    assert found["residency"]["budget"] == 2_000_000
    assert found["residency"]["weights_bytes"] <= 2_000_000
    assert found["residency"]["streamed_layers"] > 0
    assert cli.main([*command, "-v", "--budget", "2MB"]) == 0
    assert "of weights in memory" in capsys.readouterr().err
    assert cli.main([*command, "--budget", "10kB"]) == 1
    assert "the least is" in capsys.readouterr().err
    assert cli.main([*command, "--keep", "nothing"]) == 1
    assert "is not known; the model has shallow=0-1" in capsys.readouterr().err


def test_pages_between_units_are_counted_once(file: Path) -> None:
    with chalot.load(file) as model:
        residence = model.residence
        assert isinstance(residence, Residence)
        layers = [residence.units[i] for i in range(LAYERS)]
        covered = sorted(run for unit in layers for run in unit)
        assert all(a[1] <= b[0] for a, b in zip(covered, covered[1:], strict=False))
