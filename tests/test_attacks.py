"""Hostile files of every kind: refused in one line that names the file, fast, in little memory.

The cases and the readers are in tests/attacks; tests/attack.py runs longer.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from attack import attack
from attacks import READERS
from attacks.limits import MEMORY, SECONDS, Cost, measured
from attacks.reader import Reader, outcome
from chalot.errors import FormatError

INPUTS = 200  # of each reader, changed at random
SEED = 20261121
pytestmark = pytest.mark.filterwarnings("ignore")  # notes on what older files do not say
CASES = [
    pytest.param(name, case, id=f"{name}-{case}")
    for name in READERS
    for case in getattr(import_module(f"attacks.{name}"), "CASES", ())
]


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Reader]]:
    """Those that were asked for, each in a folder of its own."""
    made: dict[str, Reader] = {}
    yield made
    for reader in made.values():
        reader.close()


@pytest.fixture
def reader(
    name: str, readers: dict[str, Reader], tmp_path_factory: pytest.TempPathFactory
) -> Reader:
    """A reader, whose whole file has been read before it is measured."""
    if name not in readers:
        readers[name] = import_module(f"attacks.{name}").Reader(tmp_path_factory.mktemp(name))
        readers[name].write(None)
        outcome(readers[name])
    return readers[name]


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(name: str, reader: Reader) -> None:
    reader.write(None)
    assert not outcome(reader).place


@pytest.mark.parametrize(("name", "case"), CASES)
def test_hostile_files_are_refused(name: str, case: str, reader: Reader) -> None:
    content, message = import_module(f"attacks.{name}").CASES[case]
    reader.write(None)
    reader.put(content)
    found = outcome(reader)
    assert found.place and message in found.said and reader.file in found.said, found


class Made(Reader):
    """A reader that answers each input as it was told, the whole file first."""

    answers: tuple[Exception | None, ...] = ()

    def write(self, rng: Random | None) -> None:
        """See Reader."""

    def read(self) -> None:
        """See Reader."""
        first, *self.answers = *self.answers, self.answers[-1]
        if first is not None:
            raise first


REFUSED, BROKEN = FormatError("x: refused"), KeyError("x")
RUNS = {  # answers -> how many failed, whether something was exercised
    "all read": ((None, None), 0, False),
    "all refused": ((None, REFUSED), 0, False),
    "other errors": ((None, None, REFUSED, BROKEN), 8, True),
    "two lines": ((None, None, FormatError("a\nb")), 9, False),
    "both": ((None, None, REFUSED), 0, True),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_that_tried_nothing_fails(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, failed, exercised = RUNS[run]
    made = type("Reader", (Made,), {"answers": answers, "fewest_places": 1})
    monkeypatch.setitem(sys.modules, "attacks.made", SimpleNamespace(Reader=made))
    found = attack("made", 1, 0, 10, 60, tmp_path)
    assert (found["failed"], found["exercised"]) == (failed, exercised)


def test_what_reading_takes_is_seen() -> None:
    with measured() as cost:
        assert len(b"x" * (2 * MEMORY)) == 2 * MEMORY
    assert cost.memory == 0 or "bytes" in str(cost.over(MEMORY // 2))
    with measured() as cost:
        pass
    assert cost.over(0) is None and "s at most" in str(Cost(1.5 * SECONDS).over(0))


@pytest.mark.parametrize("name", READERS)
def test_random_changes_are_refused_or_read(name: str, tmp_path: Path) -> None:
    script = Path(__file__).parent / "attack.py"
    options = {"reader": name, "inputs": INPUTS, "seconds": 60, "seed": SEED, "keep": tmp_path}
    words = [str(w) for option, value in options.items() for w in (f"--{option}", value)]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["read"] and found["refused"] and found["read"] + found["refused"] == INPUTS
