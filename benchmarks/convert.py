"""Converting and loading: seconds, peak memory, and what a load leaves resident.

    python benchmarks/convert.py FOLDER [--schemes nl4 int8] [--rounds 3]

Each conversion runs in a process of its own, so that its peak is its own; the load is measured in
a fresh process too. Prints a table and appends a JSON line to results/convert.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import provenance
from report import spread

CONVERT = """
import json, resource, sys, time
import chalot
start = time.perf_counter()
report = chalot.convert(sys.argv[1], sys.argv[2], sys.argv[3])
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "bytes": report.bytes,
    "bits_per_weight": report.bits_per_weight,
    "folded": sum(k.folded for k in report.kinds),
    "wide": sum(k.wide for k in report.kinds),
}))
"""
LOAD = """
import json, sys, time
from chalot.load import load
from chalot.machine import resident_bytes
before, start = resident_bytes(), time.perf_counter()
model = load(sys.argv[1])
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "resident_mb": resident_bytes() / 1e6,
                  "added_mb": (resident_bytes() - before) / 1e6}))
"""


def run(code: str, *arguments: str) -> dict[str, Any]:
    """The JSON that a fresh process prints last."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure each scheme in turn, `--rounds` times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a Hugging Face folder")
    parser.add_argument("--schemes", nargs="+", default=["nl4", "int8"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    largest = max(f.stat().st_size for f in options.folder.glob("*.safetensors"))
    result: dict[str, Any] = {"model": options.folder.name, "checkpoint_bytes": largest}
    measured: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(options.rounds):
            for scheme in options.schemes:
                out = str(Path(scratch) / f"{scheme}.myai")
                made = run(CONVERT, str(options.folder), out, scheme)
                measured.setdefault(scheme, []).append((made, run(LOAD, out)))
    for scheme, rounds in measured.items():
        made, loaded = rounds[0]
        row = {
            **{k: made[k] for k in ("bytes", "bits_per_weight", "folded", "wide")},
            "convert_seconds": spread([m["seconds"] for m, _ in rounds], 2),
            "convert_peak_mb": spread([m["peak_mb"] for m, _ in rounds], 0),
            "load_milliseconds": spread([1e3 * m["seconds"] for _, m in rounds], 1),
            "load_resident_mb": spread([m["resident_mb"] for _, m in rounds], 1),
        }
        result[scheme] = row
        print(
            f"{scheme}: {row['bytes']:,} bytes, "
            + ", ".join(
                f"{key} {row[key]['median']} ({row[key]['min']}-{row[key]['max']})"
                for key in row
                if isinstance(row[key], dict)
            )
        )
    path = Path(__file__).parent / "results" / "convert.jsonl"
    path.parent.mkdir(exist_ok=True)
    line = {**provenance(sys.argv[1:], ()), **result}
    line["command"] = f"python benchmarks/convert.py {options.folder.name}"
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
