"""A loaded mixture of experts: which experts its texts took, and which of them stay in memory."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from chalot import machine
from chalot.formats.expert_pages import ExpertPages, ExpertsRead
from chalot.formats.myai import MyaiFile
from chalot.kernels.backend import Compiled
from chalot.kernels.program import Program
from chalot.model.config import ModelConfig
from chalot.model.transformer import FEED_FORWARD, Weights


class ExpertsMemory:
    """Joins what a program counts with where the file holds it."""

    def __init__(self, file: MyaiFile, config: ModelConfig, resident: int | None) -> None:
        """Raises LimitError or UnsupportedError as `ExpertPages`."""
        self.file, self.config = file, config
        named = {
            i: [[f"layers.{i}.experts.{e}.{m}" for m in FEED_FORWARD] for e in range(found.count)]
            for i in range(config.layers)
            if (found := config.experts_of(i)) is not None
        }
        self.pages = ExpertPages(file, named, resident)
        self.runnable: Compiled | None = None
        self.layers: list[int | None] = []  # of each operation that runs experts; None: shared

    @property
    def paged(self) -> bool:
        """Whether experts are read when they are used: asking ahead for them helps."""
        free = machine.memory_available()
        large = self.file.mapped and free is not None and self.file.all_bytes > free
        return bool(self.pages.runs) and (self.pages.resident is not None or large)

    def with_paging(self, weights: Weights) -> Weights:
        """The weights, and whether a program of them is to ask ahead for experts."""
        return replace(weights, paged=self.paged)

    def attach(self, runnable: Compiled, program: Program, weights: Weights) -> None:
        """Count by this program from now on."""
        first = {
            weights.matrices[f"layers.{i}.experts.0.gate"].data.ctypes.data: i
            for i in self.pages.runs
        }
        mixtures = (op for op in program.ops if op.kind == "experts")
        self.layers = [first.get(op.parts[0].matrix.data.ctypes.data) for op in mixtures]
        self.runnable = runnable

    def before_step(self) -> None:
        """Give back what does not stay; the file's length is as it was."""
        self.file.check_length()
        if self.pages.resident is not None:
            self.pages.update(self._counts())

    def _counts(self) -> dict[int, NDArray[np.int64]]:
        if self.runnable is None or not any(i is not None for i in self.layers):
            return {}
        both = zip(self.layers, self.runnable.taken, strict=True)
        return {i: counts for i, counts in both if i is not None}

    def report(self) -> ExpertsRead | None:
        """What was touched so far; None for a dense model."""
        if self.runnable is None or not self.pages.runs:
            return None
        self.pages.update(self._counts())
        return self.pages.report()
