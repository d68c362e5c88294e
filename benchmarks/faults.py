#!/usr/bin/env python3
"""Conversions that are killed, starved and disturbed: what is left, and what the next one makes.

    python benchmarks/faults.py SOURCE [--kills 100] [--writes 50] [--others 20]
        [--cases killed,full] [--convert "--refine gptq"] [--seed 0] [--out FILE.jsonl]

Each trial is the real command in a process of its own, disturbed at a random moment. The same
command then runs again, and must make the bytes of an undisturbed one, and leave nothing beside.

    killed     SIGKILL at a random moment of the undisturbed time
    again      killed again and again, until it ends before its moment has come
    full       a disk (tmpfs; without root a limit on a file's length) that ends at a random byte;
               chalot is told that there is room, as it is where another program fills the disk
    two        a second converter of the same file, begun at a random moment
    changed    the source is touched, rewritten, replaced, cut or removed at a random moment while
               it is read
    between    killed; then a weight changes: the next one must make the changed source's file
    memory     limits of address space (RLIMIT_AS) from 100 MB up

Ends with 1 if a file was other than it should be, something was left that should not, or an error
was not one line. A signal that ended a process by itself is an outcome, and is counted.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

CHALOT = "import sys; from chalot.cli import main; sys.exit(main())"
ROOM = "import chalot.machine; chalot.machine.disk_free = lambda _: 1 << 60; "
NAME, PARTS = "x.myai", {".x.myai.partial", ".x.myai.journal"}
Row = dict[str, Any]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Trials:
    """A source, a folder to convert in, and what an undisturbed conversion makes."""

    source: Path
    folder: Path
    options: list[str]
    random: random.Random
    whole: str = ""
    bytes: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def start(self, before: str = "", **limits: int) -> subprocess.Popen[str]:
        """The command. `limits` are of `resource`, by the end of their names."""
        for name, value in limits.items():
            before += f"import resource as r; r.setrlimit(r.RLIMIT_{name}, ({value}, {value})); "
        command = [sys.executable, "-c", before + CHALOT, "convert", str(self.source), "-o", NAME]
        return subprocess.Popen(
            command + self.options,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def killed(self, after: float) -> bool:
        """Start, and kill after some seconds; whether there was something to kill."""
        process = self.start()
        try:
            process.communicate(timeout=after)
            return False
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return True

    def left(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def check(self, holds: bool, what: str) -> bool:
        if not holds:
            self.wrong.append(what)
            print("WRONG:", what, file=sys.stderr)
        return holds

    def outcome(self, process: subprocess.Popen[str], *others: str) -> str:
        """How a process ended, in words, and whether that was as it should be."""
        said = process.communicate()[1]
        if process.returncode == 0:
            made = digest(self.folder / NAME) in (self.whole, *others)
            self.check(made and self.left() == {NAME}, f"other bytes, or {self.left()}")
            return "done"
        if process.returncode < 0:
            self.check(NAME not in self.left(), "a file after a signal")
            return f"ended by signal {-process.returncode}"
        lines = said.splitlines()
        kept = "are kept in" in said
        self.check(len(lines) == 1 and lines[0].startswith("chalot: "), f"not one line: {said}")
        self.check(self.left() == (PARTS if kept else set()), f"{self.left()} after {said}")
        text = re.sub(r"[\w./-]*/|[\d,]+ bytes", "", lines[-1]).removeprefix("chalot: ")
        return text.split("; ")[0][:100] + ("; kept" if kept else "")

    def finish(self, whole: str = "") -> tuple[int, float]:
        """The same command once more: how many tensors it found finished, and its seconds."""
        started = time.perf_counter()
        process = self.start()
        said = process.communicate()[1]
        took = time.perf_counter() - started
        if self.check(process.returncode == 0, said) and self.check(self.left() == {NAME}, "left"):
            self.check(digest(self.folder / NAME) == (whole or self.whole), "other bytes")
        found = re.search(r"(\d+) of \d+ tensors that an interrupted", said)
        return (int(found[1]) if found else 0), round(took, 2)

    def moment(self, part: float = 1.0) -> float:
        return self.random.uniform(0, self.seconds * part)


def killed(t: Trials, count: int) -> Row:
    moments, kept, seconds, early, late = [], [], [], 0, 0
    for _ in range(count):
        t.clear()
        moments.append(round(t.moment(), 2))
        was = t.killed(moments[-1])
        t.check(was or t.left() == {NAME}, "ended without its file")
        t.check(t.left() in (set(), {NAME}, PARTS, {".x.myai.partial"}), f"{t.left()}")
        early, late = early + (not t.left()), late + (NAME in t.left())
        if NAME in t.left():
            t.check(digest(t.folder / NAME) == t.whole, "a file under its name that is not whole")
        found, took = t.finish()
        kept.append(found)
        seconds.append(took)
    return {"moments": moments, "kept": kept, "seconds": seconds, "early": early, "late": late}


def again(t: Trials, count: int) -> Row:
    kills = []
    for _ in range(count):
        t.clear()
        kills.append(0)
        while kills[-1] < 100 and t.killed(t.moment(1.5)):
            kills[-1] += 1
        t.finish()
    return {"kills": kills}


@contextmanager
def disk(t: Trials) -> Iterator[Callable[[int], dict[str, int]]]:
    """A function that makes the disk so large, and gives the limits to start with."""
    if os.geteuid() or subprocess.call(["mount", "-t", "tmpfs", "tmpfs", str(t.folder)]):
        yield lambda size: {"FSIZE": size}
        return

    def resize(size: int) -> dict[str, int]:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(t.folder)], check=True)
        return {}

    try:
        yield resize
    finally:
        subprocess.run(["umount", str(t.folder)], check=True)


def full(t: Trials, count: int) -> Row:
    outcomes: Counter[str] = Counter()
    kept, sizes, how = [], [], ""
    t.clear()
    with disk(t) as resize:
        for _ in range(count):
            sizes.append(t.random.randrange(4096, t.bytes - 8192))
            limits = resize(sizes[-1])
            how = "limit" if limits else "tmpfs"
            outcomes[t.outcome(t.start(ROOM, **limits))] += 1
            resize(2 * t.bytes)
            kept.append(t.finish()[0])
            t.clear()
        if how == "tmpfs":
            resize(t.bytes // 2)
            outcomes[t.outcome(t.start())] += 1  # asked before the first byte
    return {"disk": how, "sizes": sizes, "kept": kept, "outcomes": outcomes}


def two(t: Trials, count: int) -> Row:
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        t.clear()
        first = t.start()
        time.sleep(t.moment())
        second = t.start()
        ends = []
        for process in (first, second):
            said = process.communicate()[1]
            busy = said.count("\n") == 1 and "another conversion is writing it" in said
            t.check(process.returncode == 0 or busy, said)
            ends.append("done" if process.returncode == 0 else "refused")
        t.check("done" in ends, "both were refused")
        t.check(t.left() == {NAME} and digest(t.folder / NAME) == t.whole, "other bytes")
        outcomes[", ".join(ends)] += 1
    return {"outcomes": outcomes}


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x3f\x3f")


def replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy(path, other)
    rewrite(other)
    other.replace(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "touched": lambda path: os.utime(path, (1, 1)),
    "rewritten": rewrite,
    "replaced": replace,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "removed": Path.unlink,
}


@contextmanager
def copied(t: Trials) -> Iterator[Callable[[], Path]]:
    """The trials' source becomes a copy; the function puts its weights back, and gives them."""
    original = t.source
    with tempfile.TemporaryDirectory() as folder:
        t.source = Path(folder) / original.name
        shutil.copytree(original, t.source)

        def restore() -> Path:
            (t.source / "model.safetensors").unlink(missing_ok=True)
            return Path(shutil.copy(original / "model.safetensors", t.source))

        undisturbed(t)
        yield restore
    t.source = original


def of_changed(t: Trials, weights: Path) -> str:
    """The digest of what a changed source becomes."""
    rewrite(weights)
    t.clear()
    t.start().communicate()
    found = digest(t.folder / NAME)
    t.check(found != t.whole, "the change is not seen")
    return found


def changed(t: Trials, count: int) -> Row:
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in CHANGES}
    with copied(t) as restore:
        other = of_changed(t, restore())
        for name, change in CHANGES.items():
            for _ in range(count):
                weights = restore()
                t.clear()
                process = t.start()
                while process.poll() is None and not t.left():
                    time.sleep(0.001)
                time.sleep(t.moment(0.7))
                change(weights)
                outcomes[name][t.outcome(process, other)] += 1
                restore()
                t.finish()
    return {"outcomes": outcomes}


def between(t: Trials, count: int) -> Row:
    kept = []
    with copied(t) as restore:
        other = of_changed(t, restore())
        for _ in range(count):
            weights = restore()
            t.clear()
            t.killed(t.moment())
            rewrite(weights)
            kept.append(t.finish(other)[0])
    return {"kept": kept}


def memory(t: Trials, count: int) -> Row:
    outcomes: dict[str, str] = {}
    for i in range(count):
        t.clear()
        limit = int(100e6 * 20 ** (i / max(count - 1, 1)))  # to 2 GB
        outcomes[f"{limit / 1e6:.0f} MB"] = t.outcome(t.start(AS=limit))
        t.finish()
    return {"outcomes": outcomes}


CASES: dict[str, tuple[Callable[[Trials, int], Row], str]] = {  # and whose count it takes
    "killed": (killed, "kills"),
    "again": (again, "others"),
    "full": (full, "writes"),
    "two": (two, "others"),
    "changed": (changed, "others"),
    "between": (between, "others"),
    "memory": (memory, "others"),
}


def undisturbed(t: Trials) -> None:
    """Note what is made, and in what time."""
    t.clear()
    started = time.perf_counter()
    process = t.start()
    said = process.communicate()[1]
    if process.returncode:
        raise SystemExit(said)
    t.seconds = time.perf_counter() - started
    t.whole, t.bytes = digest(t.folder / NAME), (t.folder / NAME).stat().st_size


def main() -> None:
    """A line for each case, on stdout and appended to --out."""
    from machine import describe_machine, provenance

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--writes", type=int, default=50)
    parser.add_argument("--others", type=int, default=20, help="trials of each other case")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--convert", default="", help="options of chalot convert")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a .jsonl file to append to")
    given = parser.parse_args()
    words = [given.source.name if w == str(given.source) else w for w in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        options = shlex.split(given.convert)
        t = Trials(given.source.resolve(), Path(folder), options, random.Random(given.seed))
        for name in given.cases.split(","):
            case, counted = CASES[name]
            t.wrong = []
            undisturbed(t)
            found = case(t, getattr(given, counted))
            said: Row = {"case": name, "count": getattr(given, counted), "wrong": t.wrong}
            said |= {"model": given.source.name, "options": given.convert, "bytes": t.bytes}
            said |= {"undisturbed_seconds": round(t.seconds, 2), **found}
            print(json.dumps(said), flush=True)
            if given.out:
                about = provenance(words, ("--out",)) | {"machine": describe_machine()}
                row = json.dumps(about | said)
                with Path(given.out).open("a") as file:
                    file.write(row + "\n")
            if t.wrong:
                raise SystemExit(1)


if __name__ == "__main__":
    main()
