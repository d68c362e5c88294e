"""Each instruction set's object exports its one table and nothing weak.

A weak symbol of an object compiled for AVX-512, an inline function or a template of the standard
library say, may be the one the linker keeps for everybody; then a lesser processor dies of an
illegal instruction. Needs a C++ compiler and nm, and a cross compiler for instruction sets that are
not this machine's; skipped, and said so, where one is missing.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ISA = ROOT / "native" / "isa"
COMPILER = next(filter(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++")), None)
FAMILIES = {"x86_64": ("avx", "amx"), "aarch64": ("neon",)}  # beginnings of names
PUBLIC = {"cpu_x86": 4, "cpu_arm": 1}  # not tables: what they say of the processor

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here"),
    pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here"),
]


def tools(name: str) -> tuple[str, str]:
    """(compiler, nm) for an instruction set's file; skips the test where there are none."""
    for machine, names in FAMILIES.items():
        if name.startswith(names) and machine != platform.machine().replace("arm64", "aarch64"):
            pair = f"{machine}-linux-gnu-g++", f"{machine}-linux-gnu-nm"
            if not all(map(shutil.which, pair)):
                pytest.skip(f"{name} is for {machine}, and there is no {pair[0]} here")
            return pair
    return str(COMPILER), "nm"


def flags() -> dict[str, list[str]]:
    """Instruction set -> its flags, from CMakeLists.txt: `set(NAME -mflag ... ${OTHER})`."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(
        r"set\((\w+) ([^)]*-[^)]*)\)", (ROOT / "CMakeLists.txt").read_text()
    ):
        words = re.sub(r"\$\{(\w+)\}", lambda m: " ".join(found.get(m[1], [])), value)
        found[name] = words.split()
    return found


def symbols(source: Path, object_file: Path, options: list[str]) -> list[tuple[str, str]]:
    """(kind, name) of what the compiled file defines for others; kinds are those of nm."""
    compiler, nm = tools(source.stem)
    common = ["-std=c++20", "-O1", "-fPIC", "-w", *options]
    subprocess.run([compiler, *common, "-c", str(source), "-o", str(object_file)], check=True)
    command = [nm, "--defined-only", "--extern-only", str(object_file)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in listing.splitlines())
    return [(row[-2], row[-1]) for row in rows if len(row) >= 2]


@pytest.mark.parametrize("source", sorted(ISA.glob("*.cpp")), ids=lambda p: p.stem)
def test_one_strong_symbol(source: Path, tmp_path: Path) -> None:
    known = flags()
    assert "-ffp-contract=off" in known["plain"]
    defined = symbols(
        source, tmp_path / "isa.o", [*known["plain"][1:], *known.get(source.stem, [])]
    )
    weak = [name for kind, name in defined if kind in "uvwVW"]
    assert weak == []
    if source.stem in PUBLIC:
        assert len(defined) <= PUBLIC[source.stem]
    else:
        assert [name.rstrip("E") for _, name in defined] == [
            f"_ZN6chalot{len(source.stem) + 8}{source.stem}_kernels"
        ]


def test_a_weak_symbol_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "weak.cpp"
    source.write_text("inline int shared() { return 1; }\nint (*table)() = shared;\n")
    assert any(kind in "uvwVW" for kind, _ in symbols(source, tmp_path / "weak.o", []))
