"""Hostile files of every kind: refused in one line that names the file, fast, in little memory.

The cases and the readers are in tests/attacks; tests/attack.py runs longer.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from attacks import READERS
from attacks.reader import Reader, outcome

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


@pytest.mark.parametrize("name", READERS)
def test_random_changes_are_refused_or_read(name: str, tmp_path: Path) -> None:
    script = Path(__file__).parent / "attack.py"
    options = {"reader": name, "inputs": INPUTS, "seconds": 60, "seed": SEED, "keep": tmp_path}
    words = [str(w) for option, value in options.items() for w in (f"--{option}", value)]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["read"] and found["refused"] and found["read"] + found["refused"] == INPUTS
