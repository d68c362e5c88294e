"""What a result must carry so that it can be judged and repeated: machine, commit, date, command.

Also measures how fast the machine reads memory, by read_bandwidth.cpp.
"""

import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHOWN_FEATURES = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8",
    "asimddp", "i8mm", "sve",
)  # fmt: skip


def first_line(*command: str) -> str:
    """The first line that a command prints, or '' where it fails."""
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return (done.stdout.splitlines() or [""])[0]


def field(path: str, key: str) -> str:
    """The value of the first `key : value` line of a file under /proc, or ''."""
    file = Path(path)
    for line in file.read_text().splitlines() if file.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def describe_machine() -> dict[str, Any]:
    cpu = "/proc/cpuinfo"
    features = (field(cpu, "flags") or field(cpu, "Features")).split()
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": field(cpu, "model name") or platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "features": [name for name in SHOWN_FEATURES if name in features],
        "memory": field("/proc/meminfo", "MemTotal"),
        "huge_pages": huge.read_text().strip() if huge.exists() else "",
        "system": f"{platform.system()} {platform.release()}",
    }


class OthersWork:
    """How many CPUs were busy with anything but this process and its children, in a `with` block.

    Children count once they have ended, so they must end inside the block. `result` then has
    "others_cpus" and "stolen_cpus" (taken by the hypervisor), or is empty without /proc.
    """

    def __enter__(self) -> "OthersWork":
        self.result: dict[str, float] = {}
        self.before = self._clocks()
        return self

    def __exit__(self, *_: object) -> None:
        if self.before:
            wall, busy, stolen, own = (
                after - before for after, before in zip(self._clocks(), self.before, strict=True)
            )
            self.result["others_cpus"] = round(max(0.0, busy - own) / wall, 2)
            self.result["stolen_cpus"] = round(stolen / wall, 2)

    @staticmethod
    def _clocks() -> tuple[float, ...]:
        """Seconds: of the wall, of all CPUs at work, of those stolen, of our own processes."""
        file = Path("/proc/stat")
        if not file.exists():
            return ()
        ticks = [int(word) for word in file.read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _idle, _wait, irq, soft, stolen = (
            tick / os.sysconf("SC_CLK_TCK") for tick in ticks
        )
        return time.monotonic(), user + nice + system + irq + soft, stolen, sum(os.times()[:4])


def provenance(arguments: list[str], hidden: tuple[str, ...]) -> dict[str, Any]:
    """Date, commit and command; options in `hidden` hold paths of one machine and are left out."""
    shown: list[str] = []
    skip = False
    for word in arguments:
        name, _, value = word.partition("=")
        if not skip and name not in hidden:
            shown.append(word)
        skip = name in hidden and not value
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": first_line("git", "rev-parse", "HEAD"),
        "changed_files": bool(first_line("git", "status", "--porcelain", "-uno")),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *shown]),
        "python": platform.python_version(),
    }


class ReadBandwidth:
    """Plain and four-stream read loops over a buffer in 2 MB pages, compiled here and now."""

    def __init__(self, folder: Path, threads: int) -> None:
        compiler = os.environ.get("CXX", "c++")
        program = folder / "read_bandwidth"
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [compiler, "-O3", "-march=native", "-std=c++20", "-pthread",
             str(HERE / "read_bandwidth.cpp"), "-o", str(program)],
            check=True,
        )  # fmt: skip
        self.compiler = first_line(compiler, "--version")
        self.command = [str(program), str(threads)]

    def measure(self) -> dict[str, Any]:
        done = subprocess.run(self.command, stdout=subprocess.PIPE, text=True, check=True)
        result: dict[str, Any] = json.loads(done.stdout)
        return result
