"""Experts of a mapped file in memory: the most used of each layer stay, the rest comes and goes.

Before a forward pass, experts that the pass before used, and that are not among the `resident` most
used of their layer so far, are given back: their pages leave this process, and the page cache where
no other process maps them. Page faults, or a prefetch, bring them in again. No bit of an answer
depends on any of that.
"""

import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chalot.errors import LimitError, UnsupportedError
from chalot.formats.myai import MyaiFile
from chalot.formats.residency import PAGE_SIZE, Run

OPTION = "--experts-resident"


@dataclass(frozen=True)
class ExpertsRead:
    """What a text touched of a mixture's experts. `counted` are those that a token took."""

    resident: int | None  # of each layer, that stay; None: all
    experts: int
    counted: int
    expert_bytes: int
    touched_bytes: int  # of those that were taken
    kept_bytes: int  # of those that stay now

    def __str__(self) -> str:
        """A line for people."""
        return (
            f"{self.counted} of {self.experts} experts taken, {self.touched_bytes:,} of "
            f"{self.expert_bytes:,} bytes; {self.kept_bytes:,} of them stay"
        )


class ExpertPages:
    """Which experts' bytes lie where, and which of them stay."""

    def __init__(
        self,
        file: MyaiFile,
        experts: Mapping[int, Sequence[Sequence[str]]],
        resident: int | None = None,
    ) -> None:
        """`experts` are, by layer, the tensors of each; `resident` is how many of a layer stay.

        Raises LimitError or UnsupportedError where that cannot be.
        """
        self.file = file
        self.resident = resident
        self.runs = {
            layer: [expert_runs(file, names) for names in each] for layer, each in experts.items()
        }
        self.counts = {i: np.zeros(len(each), np.int64) for i, each in experts.items()}
        if resident is None:
            return
        count = max((len(each) for each in experts.values()), default=0)
        if not count:
            raise UnsupportedError(f"{OPTION} {resident}: {file.path} has no experts; leave it out")
        if not 0 <= resident <= count:
            raise LimitError(
                f"{OPTION} {resident}: a layer has {count} experts; choose 0 to {count}"
            )
        if not file.mapped:
            raise LimitError(f"{OPTION} needs the file mapped; leave out --no-mmap")
        file.refuse_elsewhere(OPTION)
        if not hasattr(mmap, "MADV_DONTNEED"):
            raise UnsupportedError(f"{OPTION} is not known on this system; leave it out")
        for layer in self.runs:  # opening the file has read of all of them
            self._give_back(layer, range(len(self.runs[layer])))

    def kept(self, layer: int) -> list[int]:
        """The experts of a layer that stay: the most used, of equals the lower."""
        counts = self.counts[layer]
        if self.resident is None:
            return list(range(len(counts)))
        order = np.argsort(-counts, kind="stable")[: self.resident]
        return sorted(int(e) for e in order if counts[e])

    def update(self, counts: Mapping[int, NDArray[np.int64]]) -> None:
        """Take note of how many tokens each expert has had, and give back what does not stay."""
        for layer, now in counts.items():
            used = np.flatnonzero(now != self.counts[layer])
            self.counts[layer] = now
            if self.resident is not None and len(used):
                stay = set(self.kept(layer))
                self._give_back(layer, [int(e) for e in used if int(e) not in stay])

    def _give_back(self, layer: int, experts: Sequence[int]) -> None:
        """Let pages go that lie wholly in these experts, and in none that stays."""
        stay = {run for e in self.kept(layer) for run in self.runs[layer][e]}
        for start, end in {r for e in experts for r in self.runs[layer][e]} - stay:
            first, last = -(-start // PAGE_SIZE) * PAGE_SIZE, end // PAGE_SIZE * PAGE_SIZE
            if last <= first:
                continue
            with suppress(OSError, AttributeError):  # hints; macOS has only the first
                self.file.map.madvise(mmap.MADV_DONTNEED, first, last - first)
                os.posix_fadvise(self.file.descriptor, first, last - first, os.POSIX_FADV_DONTNEED)

    def report(self) -> ExpertsRead:
        """What was touched so far."""
        all_runs = {run for each in self.runs.values() for runs in each for run in runs}
        taken = [(i, int(e)) for i, n in self.counts.items() for e in np.flatnonzero(n)]
        touched = {run for i, e in taken for run in self.runs[i][e]}
        kept = {run for i, e in taken if e in self.kept(i) for run in self.runs[i][e]}
        sizes = [sum(b - a for a, b in runs) for runs in (all_runs, touched, kept)]
        return ExpertsRead(self.resident, sum(map(len, self.runs.values())), len(taken), *sizes)


def expert_runs(file: MyaiFile, names: Sequence[str]) -> list[Run]:
    """The bytes of an expert's tensors, each by itself: an equal one may belong to others."""
    extents = (file.manifest.tensors[name].extent for name in names)
    return sorted({(e.offset, e.offset + e.bytes) for e in extents if not e.elsewhere})
