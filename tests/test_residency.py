"""Where a model's bytes are: mapped, read ahead, locked, or in memory of the process's own."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot import cli, machine
from chalot.errors import FormatError, LimitError
from chalot.formats import residency
from chalot.formats.myai import MyaiFile
from myai_files import random_file
from tiny import config

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


def can_lock() -> bool:
    """Whether this process may lock as much as these tests do; few containers let it."""
    if sys.platform == "win32":
        return False
    memory = np.zeros(1 << 23, np.uint8)
    return not ctypes.CDLL(None).mlock(
        ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes)
    )


LOCKS = can_lock()
locks = pytest.mark.skipif(not LOCKS, reason="this process may not lock memory")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return random_file(tmp_path / "x.myai", config(), "nl4")


def locked() -> int:
    """Bytes that this process has locked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmLck:"))


def test_logits_are_the_same_wherever_the_bytes_are(file: Path) -> None:
    expected = None
    pinned = ({"mlock": True}, {"mmap": False, "mlock": True}) if LOCKS else ()
    for where in ({}, {"mmap": False}, *pinned):
        with chalot.load(file, **where) as model:
            found = model.logits([1, 2, 3])
        expected = found if expected is None else expected
        assert np.array_equal(found, expected), where


@linux
def test_a_file_that_is_not_mapped_is_in_memory_of_its_own(file: Path) -> None:
    with chalot.load(file) as mapped, chalot.load(file, mmap=False) as copied:
        expected = mapped.logits([1, 2])
        assert Path("/proc/self/maps").read_text().count(str(file)) == 1
        size = file.stat().st_size
        os.truncate(file, size // 2)
        with pytest.raises(FormatError, match="was cut"):
            mapped.logits([1, 2])
        assert np.array_equal(copied.logits([1, 2]), expected)
        os.truncate(file, size)


@linux
@locks
@pytest.mark.parametrize("mmap", [True, False])
def test_locked_bytes_stay_until_the_end(file: Path, mmap: bool) -> None:
    before = locked()
    with chalot.load(file, mlock=True, mmap=mmap):
        assert locked() - before >= file.stat().st_size


REFUSED = """
import os, resource, sys
from pathlib import Path
from chalot.formats.myai import MyaiFile
from chalot.formats.residency import lock
file = MyaiFile(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))
if os.geteuid() == 0:
    os.seteuid(65534)  # root may lock what it likes
try:
    lock(file)
except Exception as error:
    print(type(error).__name__, error)
"""


@linux
def test_a_lock_that_is_refused_names_the_limit(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("LimitError"), done.stderr
    assert f"{file.stat().st_size:,} bytes" in done.stdout
    assert "this process lock 4,096: raise that (ulimit -l)" in done.stdout


def test_a_copy_that_does_not_fit_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: file.stat().st_size - 1)
    with pytest.raises(LimitError, match="leave out --no-mmap"):
        chalot.load(file, mmap=False)
    opened = MyaiFile(file)
    assert residency.read_ahead(opened) is None, "later layers would drive out the first ones"
    opened.close()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
@pytest.mark.parametrize("there", [True, False])
def test_what_is_not_in_memory_is_asked_for(
    there: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, at, size, advice: asked.append((at, size)))
    monkeypatch.setattr(residency, "is_in_memory", lambda descriptor, at: there)
    monkeypatch.setattr(residency, "PIECE", 5000)
    opened = MyaiFile(file)
    thread = residency.read_ahead(opened)
    assert thread is not None
    thread.join()
    opened.close()
    extents = [e.extent for e in opened.manifest.tensors.values()]
    bytes_asked = [n for at, size in asked for n in range(at, at + size)]
    expected = [n for e in extents for n in range(e.offset, e.offset + e.bytes)]
    assert bytes_asked == ([] if there else expected)


@linux
def test_what_was_read_is_in_memory(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    os.pread(descriptor, size, 0)
    assert residency.is_in_memory(descriptor, size - 1)
    assert not residency.is_in_memory(descriptor, size), "past the end"
    os.close(descriptor)


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "900", "memory.max": "max"}, 900),
        ("0::/a/b\n", {"a/b/memory.max": "800", "a/memory.max": "900"}, 800),
        ("0::/not/there\n", {"memory.max": "700"}, 700),  # a container shows its own group as root
        (
            "3:cpu:/x\n2:memory:/a\n0::/\n",
            {"memory/a/memory.limit_in_bytes": "600", "cpu/x/memory.limit_in_bytes": "5"},
            600,
        ),
        ("2:memory:/a\n", {"memory/memory.limit_in_bytes": str((1 << 63) - 4096)}, None),
        ("", {}, None),
    ],
)
def test_the_least_limit_of_all_groups_counts(
    own: str,
    limits: dict[str, str],
    expected: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    assert machine.memory_limit() == expected


def test_commands_take_both(demo_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    pinned = (["--mlock"], ["--mlock", "--no-mmap"]) if LOCKS else ()
    for more in ([], ["--no-mmap"], *pinned):
        arguments = ["run", str(demo_file), "def f", "--max-tokens", "5", "--seed", "1", "-q"]
        assert cli.main([*arguments, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1


def test_the_prediction_knows_of_whole_files(demo_file: Path, file: Path) -> None:
    for path in (demo_file, file):  # tied; and with an embedding that is mostly not read
        report = chalot.describe(path)
        size = path.stat().st_size
        mapped, whole = report.memory(1), report.memory(1, whole=True)
        assert whole.weights == size and whole.unread == 0
        assert whole.total - mapped.total == size - (mapped.weights - mapped.unread)
