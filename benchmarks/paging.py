#!/usr/bin/env python3
"""What a file that is not in memory costs: the first token, tokens after it, under a limit too.

    python benchmarks/paging.py MODEL.myai [--rounds 7] [--limit 0.5]

Each turn is a process of its own, with reading ahead (src/chalot/formats/residency.py) and without
it in turn. Before each the file is put out of the page cache (posix_fadvise), and mincore must say
that nothing of it is left; what lies beneath, such as a host's cache or a disk's own, stays warm,
so a plain read of the evicted file is timed beside it. Times run from loading to the first token,
and over each token after it; faults are major ones, of the whole process.

With --limit the process then runs in a memory control group of that share of the file: it must
still answer. That needs the right to make a group below one's own (root, v1 or v2); where it is
missing, the result says so. Prints tables and appends one line to results/paging.jsonl.
"""

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from machine import HERE, OthersWork, describe_machine, provenance
from report import spread

INSIDE = """
import json, os, resource, sys, time
path, ahead, tokens, group = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), sys.argv[4]
if group:
    open(group + "/cgroup.procs", "w").write(str(os.getpid()))
from importlib import import_module
load = import_module("chalot.load")
import chalot.kernels.native, chalot.text.tokenizer
if not ahead:
    load.read_ahead = lambda file: None
def used():
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_majflt, found.ru_inblock * 512
before, start = used(), time.perf_counter()
with load.load(path, context=512) as model, model.session(temperature=0, draft=False) as session:
    session.prefill(model.tokenizer.encode("Once upon a time"))
    session.step()
    first, after, seconds = time.perf_counter() - start, used(), []
    for _ in range(tokens):
        start = time.perf_counter()
        session.step()
        seconds.append(time.perf_counter() - start)
    end = used()
print(json.dumps({"first": first, "first_faults": after[0] - before[0], "seconds": seconds,
                  "first_read": after[1] - before[1], "faults": end[0] - after[0],
                  "read": end[1] - after[1]}))
"""


def in_memory(path: Path) -> float:
    """The share of a file's pages that lies in the page cache."""
    size = path.stat().st_size
    with path.open("rb") as file:
        flags = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
        mapped = mmap.mmap(file.fileno(), size, **flags)
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    at = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), pages):
        raise SystemExit("mincore failed")
    return sum(page & 1 for page in pages) / len(pages)


def evict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if in_memory(path):
        raise SystemExit(f"{path} stays in memory: it is mapped elsewhere, or lies on a tmpfs")


def plain_read(path: Path) -> float:
    """GB/s of reading the evicted file from start to end."""
    evict(path)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 22):
            pass
    return path.stat().st_size / 1e9 / (time.perf_counter() - start)


@contextlib.contextmanager
def limited(limit: int) -> Iterator[str | None]:
    """A memory control group below this process's own, or None where none can be made."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        base = "/sys/fs/cgroup/memory" if controllers == "memory" else "/sys/fs/cgroup"
        name = "memory.limit_in_bytes" if controllers == "memory" else "memory.max"
        group = Path(base + path) / "chalot-paging"
        if controllers not in ("", "memory"):
            continue
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / name).exists():
                (group / name).write_text(str(limit))
                yield str(group)
                return
        except OSError:
            continue
        finally:
            group.rmdir()
    yield None


def turn(path: Path, ahead: bool, tokens: int, group: str = "") -> dict[str, Any]:
    evict(path)
    command = [sys.executable, "-c", INSIDE, str(path), str(ahead), str(tokens), group]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a turn ended with status {done.returncode}: {done.stderr[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [s for t in turns for s in t["seconds"]]
    count = len(seconds)
    return {
        "first_token_seconds": spread([t["first"] for t in turns]),
        "first_token_faults": spread([t["first_faults"] for t in turns], 0),
        "first_token_read_mb": spread([t["first_read"] / 1e6 for t in turns], 1),
        "token_p50": round(median(seconds), 4),
        "token_p99": round(quantiles(seconds, n=100, method="inclusive")[98], 4),
        "tokens": count,
        "faults_a_token": round(sum(t["faults"] for t in turns) / count, 2),
        "read_mb_a_token": round(sum(t["read"] for t in turns) / count / 1e6, 2),
    }


def in_turn(path: Path, rounds: int, tokens: int, group: str = "") -> dict[str, Any]:
    turns: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for number in range(rounds):
        for ahead in (True, False) if number % 2 else (False, True):
            turns[ahead].append(turn(path, ahead, tokens, group))
    return {"read ahead": summary(turns[True]), "page faults": summary(turns[False])}


def table(found: dict[str, Any]) -> str:
    head = ["", "first token, s", "faults", "MB read", "token p50, s", "p99, s", "faults/token",
            "MB/token"]  # fmt: skip
    rows = [head]
    for name, s in found.items():
        first = s["first_token_seconds"]
        rows.append([
            name,
            f"{first['median']:.3f} ({first['min']:.3f}-{first['max']:.3f})",
            f"{s['first_token_faults']['median']:.0f}",
            f"{s['first_token_read_mb']['median']:.0f}",
            f"{s['token_p50']:.4f}",
            f"{s['token_p99']:.4f}",
            f"{s['faults_a_token']:.2f}",
            f"{s['read_mb_a_token']:.1f}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def read_ahead_kb(path: Path) -> int | None:
    """What the kernel reads ahead of a fault in a file on this disk, in KiB."""
    device = path.stat().st_dev
    at = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for place in (at, at.parent):
        if (place / "queue" / "read_ahead_kb").exists():
            return int((place / "queue" / "read_ahead_kb").read_text())
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", type=Path)
    add("--rounds", type=int, default=7)
    add("--tokens", type=int, default=32, help="timed after the first one of each turn")
    add("--limit", type=float, default=0.5, help="share of the file's bytes; 0: no such run")
    add("--limited-tokens", type=int, default=8)
    add("--results", type=Path, default=HERE / "results" / "paging.jsonl")
    add("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    path, size = options.model.resolve(), options.model.stat().st_size
    with OthersWork() as others:
        reads = spread([plain_read(path) for _ in range(3)], 2)
        kernel = read_ahead_kb(path)
        print(f"{path.name}, {size / 1e6:.0f} MB; evicted, it is read at {reads['median']} GB/s;")
        print(f"the kernel reads {kernel} KiB ahead of a fault\n")
        cold = in_turn(path, options.rounds, options.tokens)
        print(table(cold) + "\n")
        under: dict[str, Any] | str | None = None
        if options.limit:
            with limited(int(size * options.limit)) as group:
                if group is None:
                    under = "unmeasured: no control group can be made here"
                    print(under)
                else:
                    under = in_turn(path, min(options.rounds, 3), options.limited_tokens, group)
                    print(f"in {options.limit:.0%} of the file's bytes:\n{table(under)}")
    if others.result.get("others_cpus", 0) > 0.1:
        print(f"not a quiet machine ({others.result}): these figures are not to be quoted")
    names = [Path(a).name if a == str(options.model) else a for a in sys.argv[1:]]
    result = {
        "benchmark": "paging",
        **provenance(names, ("--results",)),
        "machine": {**describe_machine(), **others.result},
        "model": path.name,
        "file_bytes": size,
        "read_gb_per_second": reads,
        "kernel_read_ahead_kib": kernel,
        "cold": cold,
        "limit": options.limit,
        "limited": under,
    }
    if not options.no_save:
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
