#!/usr/bin/env python3
"""Process start to first token, and resident memory at a filled context, beside llama.cpp.

    python benchmarks/startup.py --envs FOLDER

Each turn is a process of its own, sides in turn, files in the page cache. The clock starts before
the process does and stops when its first token arrives here: `chalot run`, the Python API
(chalot_start.py), and llama.cpp through llama-cpp-python's low-level calls
(peers/llamacpp_start.py). What its imports took is shown too: a C++ program of llama.cpp has none.
Then each side, once, fills the context, and says what is resident (Rss, the mapped file included).

Prints a table and appends one line to results/startup.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import HERE, OthersWork, describe_machine, provenance
from make_models import SHAPES
from report import spread
from sides import PATH_OPTIONS, prepare

PROMPT = "Once upon a time"  # 16 letters: two tokens or more, of any of these tokenizers


def first_token(command: list[str]) -> tuple[float, dict[str, float]]:
    """Seconds until `command` writes, and what it wrote if that is JSON."""
    # modules compiled beforehand, as an installed package has them
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    with subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdout
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        rest = first + process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed with status {process.returncode}")
    said: dict[str, float] = {}
    for line in rest.splitlines() if first == b"{" else ():
        said |= json.loads(line)
    return seconds, said


def read_whole(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def sides(options: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, Path]]:
    """Commands, without the fill, and the file of each side."""
    commands, files = {}, {}
    limits = [str(options.threads), str(options.context)]
    for side in prepare(options)[0]:
        file = str(side.file)
        files[side.name] = side.file
        if side.engine == "chalot":
            one = ["--max-tokens", "1", "--temperature", "0", "--threads", limits[0]]
            verb = [side.python, "-m", "chalot.cli", "run", file, PROMPT, *one]
            commands[f"{side.name}, chalot run"] = [*verb, "--context", limits[1]]
            files[f"{side.name}, chalot run"] = side.file
        script = "chalot_start.py" if side.engine == "chalot" else "peers/llamacpp_start.py"
        commands[side.name] = [side.python, str(HERE / script), file, PROMPT, *limits]
    return commands, files


def measure(options: argparse.Namespace) -> dict[str, Any]:
    commands, files = sides(options)
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    names = list(commands)
    with OthersWork() as others:
        for number in range(-1, options.rounds):  # the first one warms up
            first = max(number, 0) % len(names)
            for name in names[first:] + names[:first]:
                read_whole(files[name])
                fill = [] if "chalot run" in name else ["0"]
                taken, said = first_token([*commands[name], *fill])
                if number >= 0:
                    seconds[name].append(taken)
                    parts[name].append(said)
    if others.result.get("others_cpus", 0) > 0.1:
        print(f"not a quiet machine ({others.result}): these figures are not to be quoted")
    found: dict[str, Any] = {}
    for name in commands:
        size = files[name].stat().st_size
        found[name] = {"first_token_seconds": spread(seconds[name]), "file_bytes": size}
        if parts[name][0]:
            for part in ("imports", "after_imports"):
                found[name][part] = spread([said[part] for said in parts[name]])
            _, said = first_token([*commands[name], str(options.context)])
            found[name] |= {"resident": said["resident"], "over_file": said["resident"] - size}
    return {
        "benchmark": "startup",
        **provenance(sys.argv[1:], PATH_OPTIONS),
        "machine": {**describe_machine(), **others.result},
        **{key: getattr(options, key) for key in ("model", "threads", "context", "rounds")},
        "sides": found,
    }


def table(result: dict[str, Any]) -> str:
    def seconds(values: dict[str, Any] | None) -> str:
        return (
            f"{values['median']:.3f} ({values['min']:.3f}-{values['max']:.3f})" if values else "-"
        )

    rows = [
        ["side", "first token, s", "of it imports", "file, MB", "resident, MB", "over file, MB"]
    ]
    for name, side in result["sides"].items():
        cells = [name, seconds(side["first_token_seconds"]), seconds(side.get("imports"))]
        for key in ("file_bytes", "resident", "over_file"):
            cells.append(f"{side[key] / 1e6:.1f}" if key in side else "-")
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=SHAPES, default="qwen2.5-0.5b")
    add("--envs", type=Path, default=Path("envs"), help="as for peers.py; llama.cpp's is read")
    add("--peers", nargs="*", default=["nl4", "Q4_0"], metavar="SIDE", help="default: nl4 Q4_0")
    add("--rounds", type=int, default=7)
    add("--threads", type=int, default=2)
    add("--context", type=int, default=4096, help="tokens that are filled for the memory")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "chalot-benchmarks")
    add("--reuse", action="store_true", help="keep chalot's converted files of the last run too")
    add("--results", type=Path, default=HERE / "results" / "startup.jsonl")
    add("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    options.work, options.envs = options.work.resolve(), options.envs.absolute()
    result = measure(options)
    print(table(result))
    if not options.no_save:
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
