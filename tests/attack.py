"""Hostile files without end: python tests/attack.py --reader gguf --seconds 600 --seed 7

Each input is a whole file changed at random, and must be read, or refused with a typed error of one
line, within the limits of tests/attacks/limits.py. Without --reader all are tried, one after
another. What fails is kept in --keep, and comes again with --first N --inputs 1. Exits with 1 if
anything failed, or if nothing was tried: no input that got through, or none that was refused.
"""

import argparse
import faulthandler
import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from attacks import READERS
from attacks.reader import Fault, Reader, outcome

HANG = 60  # seconds on the clock after which the process ends with a traceback
KEPT = 20  # failures
ROOM = 4 << 30  # bytes


def attack(
    name: str, seed: int, first: int, inputs: int, seconds: float, keep: Path
) -> dict[str, Any]:
    """Try inputs until one of the bounds; what came of them."""
    places: Counter[str] = Counter()
    faults: list[str] = []
    slowest, largest, tried = 0.0, 0, 0
    folder = Path(tempfile.mkdtemp(prefix=f"attack-{name}-"))
    print(f"{name}: inputs lie in {folder}", file=sys.stderr)
    reader: Reader = import_module(f"attacks.{name}").Reader(folder)
    reader.write(None)
    outcome(reader)  # what is imported once, and what a whole file costs
    end = time.monotonic() + seconds
    for number in range(first, first + inputs):
        if time.monotonic() > end:
            break
        reader.write(Random(f"{seed} {number}"))
        faulthandler.dump_traceback_later(HANG, exit=True)
        tried += 1
        try:
            found = outcome(reader)
        except Fault as fault:
            faults.append(f"--seed {seed} --first {number}: {fault}")
            if len(faults) <= KEPT:
                shutil.copytree(folder, keep / f"{name}-{seed}-{number}", dirs_exist_ok=True)
            continue
        places[found.place] += 1
        slowest, largest = max(slowest, found.cost.seconds), max(largest, found.cost.memory)
    faulthandler.cancel_dump_traceback_later()
    reader.close()
    shutil.rmtree(folder)
    read = places.pop("", 0)
    return {
        **{"reader": name, "seed": seed, "inputs": tried, "read": read},
        **{"refused": sum(places.values()), "places": len(places)},
        **{"slowest_seconds": round(slowest, 3), "largest_bytes": largest, "failed": len(faults)},
        "exercised": bool(read and len(places) >= reader.fewest_places) or inputs == 1,
        "faults": faults[:KEPT],
    }


def bound_memory() -> None:
    """An input that asks for more than `ROOM` of addresses is a MemoryError, not the end of all."""
    with suppress(ImportError, OSError, ValueError):  # where there is nothing of the kind
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--reader", choices=READERS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--inputs", type=int, default=1 << 40)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "attacks-found")
    given = parser.parse_args()
    if given.reader is None:
        words = [*sys.argv, "--reader"]
        return max([subprocess.run([sys.executable, *words, n]).returncode != 0 for n in READERS])
    faulthandler.enable()
    bound_memory()
    warnings.simplefilter("ignore")
    bounds = given.first, given.inputs, given.seconds
    found = attack(given.reader, given.seed, *bounds, given.keep)
    print(json.dumps(found))
    return int(bool(found["failed"]) or not found["exercised"])


if __name__ == "__main__":
    sys.exit(main())
