"""benchmarks/faults.py in short: real commands, killed and starved at a few random moments."""

import importlib
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from myai_files import checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    found = importlib.import_module("faults")
    monkeypatch.setattr(found.os, "geteuid", lambda: 1)  # nothing is mounted
    return found


@pytest.fixture
def trials(faults: ModuleType, tmp_path: Path) -> Any:
    (tmp_path / "out").mkdir()
    source = checkpoint(tmp_path / "source", num_hidden_layers=4)
    made = faults.Trials(source, tmp_path / "out", [], random.Random(0))
    faults.undisturbed(made)
    return made


@pytest.mark.parametrize(("case", "count"), [("killed", 3), ("full", 2), ("two", 1)])
def test_a_case(case: str, count: int, faults: ModuleType, trials: Any) -> None:
    faults.CASES[case][0](trials, count)
    assert trials.wrong == []


def test_a_source_that_changes(
    faults: ModuleType, trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "CHANGES", {"replaced": faults.replace})
    faults.changed(trials, 1)
    assert trials.wrong == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
@pytest.mark.parametrize(("limit", "threads"), [(100, 1), (170, 8)])
def test_little_memory(limit: int, threads: int, trials: Any) -> None:
    """One line, whatever is refused first: memory, a library, or one of many threads."""
    trials.clear()
    trials.options = ["--threads", str(threads), "--quiet"]
    assert "memory" in trials.outcome(trials.start(AS=limit * 1_000_000))
    assert trials.wrong == []
