"""What this machine has: cores this process may use, memory, disk, as the system says."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cpu_quota() -> float | None:
    """Cores that the control group grants (v2 cpu.max, v1 cfs_quota_us), None if unlimited."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        if quota != "max":
            return int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        base = Path("/sys/fs/cgroup/cpu")
        quota_us = int((base / "cpu.cfs_quota_us").read_text())
        if quota_us > 0:
            return quota_us / int((base / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        pass
    return None


def allowed_cpus() -> list[int]:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Distinct cores among the allowed processors: two threads of one core share its arithmetic."""
    cores = set()
    for cpu in allowed_cpus():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def default_threads() -> int:
    """Threads to compute with: allowed cores, but no more than the control group's quota."""
    quota = cpu_quota()
    cores = physical_cores()
    return max(1, cores if quota is None else min(cores, int(quota + 0.5)))


class CpuTime(NamedTuple):
    """Seconds since the system began, over the processors that this process may run on."""

    total: float
    busy: float  # of all processes
    stolen: float  # that the host of a virtual machine gave to others
    own: float  # of this process and its threads


def cpu_time() -> CpuTime | None:
    """What the processors did so far, None where the system does not say."""
    try:
        ticks = os.sysconf("SC_CLK_TCK")
        lines = Path("/proc/stat").read_text().splitlines()
        table = {line.split()[0]: [int(n) for n in line.split()[1:9]] for line in lines[1:]
                 if line.startswith("cpu")}  # fmt: skip
        counted = [
            sum(n) / ticks for n in zip(*(table[f"cpu{i}"] for i in allowed_cpus()), strict=True)
        ]
        _, _, _, idle, waiting, _, _, stolen = counted
    except (AttributeError, OSError, ValueError, KeyError):
        return None
    total, own = sum(counted), os.times()
    return CpuTime(total, total - idle - waiting - stolen, stolen, own.user + own.system)


def others_share(before: CpuTime | None, after: CpuTime | None) -> tuple[float, float] | None:
    """Shares of the processors that other processes and other virtual machines took meanwhile."""
    if before is None or after is None or after.total <= before.total:
        return None
    passed = after.total - before.total
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others / passed), max(0.0, (after.stolen - before.stolen) / passed)


def memory_limit() -> int | None:
    """The least limit in bytes of this process's control group and those above it, or None."""
    limits = []
    for file in _memory_limit_files():
        with suppress(OSError, ValueError):  # "max" is no number
            limits.append(int(file.read_text()))
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def _memory_limit_files() -> Iterator[Path]:
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:  # number:controllers:path, of version 2 without controllers
        _, controllers, path = line.split(":", 2)
        root, name = GROUPS, "memory.max"
        if controllers:
            root, name = root / "memory", "memory.limit_in_bytes"
            if "memory" not in controllers.split(","):
                continue
        group = root / path.lstrip("/")  # in a container it may not be there, but its root is
        for place in (group, *group.parents):
            if place.is_relative_to(root):
                yield place / name


def memory_available() -> int | None:
    """Bytes that can be had without swapping, None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line[:13] == "MemAvailable:")
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    limit = memory_limit()
    return free if limit is None else min(free, limit)


def memory_total() -> int | None:
    """Bytes of memory, or the control group's limit where it is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    limit = memory_limit()
    return total if limit is None else min(total, limit)


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, file pages included; 0 where unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def peak_resident_bytes() -> int | None:
    """The most memory of this process that was in RAM at once, or None where unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def disk_free(folder: Path) -> int:
    """Free bytes on the disk that holds `folder` or its nearest existing parent."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
