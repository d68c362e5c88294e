"""Random programs, matrices, batches and byte pairs for native code, under sanitizers. Needs clang.

    python tests/attack_native.py --seconds 600 --seed 7

Builds native/fuzz.cpp with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer in --build,
which takes a minute the first time, and begins with whole programs of every family
(tests/attacks/programs.py). What covers new code is kept in BUILD/corpus, what fails in
BUILD/found, to be run again by `BUILD/fuzz FILE`. Exits with 1 if anything failed, or if no program
or no text ran, or none was refused.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import replay
from attacks.programs import write

COMPILERS = ("clang++", *(f"clang++-{version}" for version in range(30, 15, -1)))
LIMITS = ("-timeout=20", "-rss_limit_mb=3000", "-print_final_stats=0", "-verbosity=0")
COUNTS = re.compile(r"ran (\d+) programs with (\d+) batches, (\d+) texts; refused (\d+)")


def build(folder: Path) -> Path | None:
    """The fuzzer, compiled; None where there is no clang."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None
    return replay.build(folder, f"-DCMAKE_CXX_COMPILER={compiler}", target="fuzz")


def run(fuzz: Path, seed: int, *bounds: str) -> tuple[bool, str]:
    """Whether nothing failed and something was tried, and what is said of it."""
    seeds, corpus, found = (fuzz.parent / name for name in ("seeds", "corpus", "found"))
    for folder in (corpus, found):
        folder.mkdir(exist_ok=True)
    write(seeds)
    options = (*LIMITS, f"-seed={seed}", f"-artifact_prefix={found}/", *bounds)
    done = subprocess.run([fuzz, *options, corpus, seeds], capture_output=True, text=True)
    counts = COUNTS.search(done.stderr)
    good = done.returncode == 0 and counts is not None and all(map(int, counts.groups()))
    return good, counts[0] if good and counts else done.stderr[-6000:]


def main() -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--build", type=Path, default=Path(tempfile.gettempdir()) / "chalot-fuzz")
    given = parser.parse_args()
    fuzz = build(given.build)
    if fuzz is None:
        print("found no clang++; expected one with libFuzzer (apt-get install clang)")
        return 1
    good, said = run(fuzz, given.seed, f"-max_total_time={given.seconds}")
    print(said)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
