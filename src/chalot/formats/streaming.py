"""Weights that do not all fit a budget: some stay in memory, the rest passes through it.

A forward pass reads its units (a layer each, and the head) one after another, pass by pass, which
is what a cache that drops the longest unused page serves worst. So what stays is fixed, and of the
rest two units are in memory at a time: the one in use, and the next, which a thread reads and maps
meanwhile. What was used is unmapped, and given out of the page cache, so that the budget holds of
the machine's memory, not of this process's alone. Bits do not depend on any of it.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

from chalot.errors import LimitError, UnsupportedError
from chalot.formats.myai import MyaiFile
from chalot.formats.residency import PAGE_SIZE, PIECE, Run, address

POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14: read and map, as if every page were touched
DONTNEED = 4


@dataclass(frozen=True)
class Plan:
    """Which units pass through memory, by their numbers; the others stay. Sizes are in bytes."""

    streamed: frozenset[int]
    ahead: bool  # whether the next unit is read while one is in use
    stays: int
    window: int  # for what passes through

    @property
    def bytes(self) -> int:
        """The most weights in memory at a time."""
        return self.stays + self.window


def plan(sizes: Sequence[int], kept: Sequence[int], budget: int, what: Sequence[str]) -> Plan:
    """The plan that reads the least of a pass again and again, in `budget` bytes.

    `sizes` are of the units in the order of a pass, `kept` the numbers of those that must stay;
    `what` are their names. Reading ahead comes before reading less. Raises LimitError.
    """
    if sum(sizes) <= budget:
        return Plan(frozenset(), False, sum(sizes), 0)
    free = [i for i in range(len(sizes)) if i not in set(kept)]
    by_size = sorted(free, key=lambda i: (-sizes[i], i))
    for ahead in (True, False):
        best = None
        for large in range(len(by_size) + 1):  # so many of the largest stay, and some of the rest
            stay, rest = by_size[:large], sorted(by_size[large:])
            for count in range(len(rest)):
                streamed = spread(rest, len(rest) - count)
                largest = sorted((sizes[i] for i in streamed), reverse=True)
                window = sum(largest[: 2 if ahead else 1])
                staying = sum(sizes) - sum(largest)
                if staying + window > budget:
                    break
                if best is None or staying > best.stays:
                    best = Plan(frozenset(streamed), ahead, staying, window)
            if not stay and not rest:
                break
        if best is not None:
            return best
    held = sum(sizes[i] for i in kept)
    most = max(free, key=lambda i: sizes[i], default=None)
    need = held + (sizes[most] if most is not None else 0)
    parts = [f"{what[most]} takes {sizes[most]:,} bytes"] if most is not None else []
    parts += [f"what is kept {held:,}"] if held else []
    raise LimitError(
        f"--budget of {budget:,} bytes: {' and '.join(parts)}; "
        f"the least is {need:,}, --budget {-(-need // 1000)}kB"
    )


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """So many of them, evenly: work on what stays hides the reading of what does not."""
    return [numbers[i * len(numbers) // count] for i in range(count)]


class Stream:
    """Reads units ahead of use and drops them behind it. `before(unit)` is told what runs next."""

    def __init__(self, file: MyaiFile, units: Sequence[Sequence[Run]], plan: Plan) -> None:
        """Raises UnsupportedError where the system has no such calls."""
        if sys.platform != "linux":
            raise UnsupportedError(f"{file.path}: --budget needs Linux; leave it out")
        self.file, self.units, self.plan = file, units, plan
        self.order = sorted(plan.streamed)
        self.library = ctypes.CDLL(None, use_errno=True)
        self.descriptor = os.dup(file.descriptor)
        self.populates = True
        self.in_use: int | None = None
        self.ready: dict[int, threading.Event] = {}
        self.waited = 0.0  # seconds, for units that were not there yet
        self.bytes_read = 0  # asked for
        # a unit to fetch, and who waits for it; or to drop, where nobody does; or None: the end
        self.asked: SimpleQueue[tuple[int | None, threading.Event | None]] = SimpleQueue()
        self.thread: threading.Thread | None = None

    def before(self, unit: int) -> None:
        """`unit` is about to be read: wait for it, drop what was read before, ask for the next."""
        if self.in_use is not None and self.in_use != unit:
            self._ask(self.in_use, None)
            self.in_use = None
        if unit in self.plan.streamed:
            if unit not in self.ready:
                self._fetch_later(unit)
            start = time.perf_counter()
            self.ready.pop(unit).wait()
            self.waited += time.perf_counter() - start
            self.in_use = unit
        if self.plan.ahead and self.order:
            coming = next((u for u in self.order if u > unit), self.order[0])
            if coming != self.in_use and coming not in self.ready:
                self._fetch_later(coming)

    def _fetch_later(self, unit: int) -> None:
        self.ready[unit] = threading.Event()
        self._ask(unit, self.ready[unit])

    def _ask(self, unit: int, done: threading.Event | None) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._serve, name="stream", daemon=True)
            self.thread.start()
        self.asked.put((unit, done))

    def _serve(self) -> None:
        while True:
            unit, done = self.asked.get()
            if unit is None:
                return
            if done is None:
                self.drop(self.units[unit])
                continue
            try:
                self._fetch(unit)
            finally:
                done.set()  # what could not be read ahead is read by page faults

    def _fetch(self, unit: int) -> None:
        for start, end in self.units[unit]:
            begin = start // PAGE_SIZE * PAGE_SIZE
            self.bytes_read += end - begin
            with suppress(OSError):  # a hint
                for at in range(begin, end, PIECE):
                    size = min(PIECE, end - at)
                    os.posix_fadvise(self.descriptor, at, size, os.POSIX_FADV_WILLNEED)
            if self.populates and self._advise(begin, end, POPULATE_READ):
                self.populates = False  # an older system: page faults map what was read

    def drop(self, runs: Sequence[Run]) -> None:
        """Unmap whole pages of these runs, and let the page cache forget them."""
        for start, end in runs:
            begin = -(-start // PAGE_SIZE) * PAGE_SIZE
            stop = end // PAGE_SIZE * PAGE_SIZE
            if begin < stop:
                self._advise(begin, stop, DONTNEED)
                with suppress(OSError):
                    size = stop - begin
                    os.posix_fadvise(self.descriptor, begin, size, os.POSIX_FADV_DONTNEED)

    def _advise(self, begin: int, end: int, advice: int) -> int:
        where = ctypes.c_void_p(address(self.file, begin))
        return int(self.library.madvise(where, ctypes.c_size_t(end - begin), advice))

    def close(self) -> None:
        """End the thread."""
        if self.thread is not None:
            self.asked.put((None, None))
            self.thread.join()
            self.thread = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
