"""Primitives of every instruction set mean what scalar.cpp says: NaN, ties, ends of range, halves.

tests/primitives.cpp prints a hash for each primitive; those of every set must be scalar's. Sets of
another processor run under its emulator where there is one.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from chalot.kernels.backend import instruction_sets
from test_native_objects import COMPILER, ISA, flags, tools

SOURCE = Path(__file__).with_name("primitives.cpp")
# AMX has no primitives of its own: its tiles are in tests/test_amx.py
SETS = sorted({p.stem for p in ISA.glob("*.cpp") if not p.stem.startswith("cpu_")} - {"amx"})
HERE = {name for name, runs in instruction_sets() if runs}
EMULATOR = {"neon": "qemu-aarch64"} if platform.machine() == "x86_64" else {}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")


def hashes(name: str, folder: Path) -> dict[str, str]:
    """primitive -> hash, compiled with the flags of CMakeLists.txt."""
    emulator = EMULATOR.get(name)
    if name not in HERE and (emulator is None or shutil.which(emulator) is None):
        pytest.skip(f"{name} cannot run here{f', {emulator} is missing' if emulator else ''}")
    compiler, _ = tools(name)
    known = flags()
    options = ["-std=c++20", "-O2", "-w", *known["plain"][1:], *known.get(name, [])]
    link = ["-static"] if emulator else []
    defines = [f'-DISA="{ISA / name}.cpp"', f"-DTABLE={name}_kernels"]
    processor = sorted(ISA.glob("cpu_*.cpp"))
    executable = folder / name
    subprocess.run(
        [compiler, *options, *link, *defines, SOURCE, *processor, "-o", executable], check=True
    )
    command = [emulator, executable] if emulator else [executable]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def scalar(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What every set must give."""
    return hashes("scalar", tmp_path_factory.mktemp("scalar"))


@pytest.mark.parametrize("name", [s for s in SETS if s != "scalar"])
def test_primitives_are_scalars(name: str, scalar: dict[str, str], tmp_path: Path) -> None:
    assert len(scalar) > 20
    assert hashes(name, tmp_path) == scalar
