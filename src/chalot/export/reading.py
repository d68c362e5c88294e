"""What the targets of `convert` share: a checkpoint read in runs of rows, and what storing it cost.

The targets are export/gguf.py, export/npz.py and export/safetensors.py; `.myai` files are convert's
own.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chalot.checking import RUN, check_shapes, read_config
from chalot.convert import ConvertReport
from chalot.convert.conversion import KindReport, Progress, source_error
from chalot.convert.keeping import notes
from chalot.errors import UnsupportedError, WeightError
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.names import hugging_face
from chalot.model.layers import KINDS, TensorSpec, model_tensors

Floats = NDArray[np.float32]
DENSE = ("f32", "f16", "bf16")


class Export:
    """One checkpoint on its way out, checked against its configuration."""

    def __init__(self, checkpoint: Checkpoint, progress: Progress) -> None:
        self.checkpoint = checkpoint
        self.config = read_config(checkpoint)
        if self.config.experts is not None and self.config.experts.ones:
            raise UnsupportedError(
                f"{checkpoint.path}: holds slices of a dense feed-forward, which count whole; no "
                "other format's mixtures can say that: write a .myai file"
            )
        check_shapes(self.config, checkpoint)
        self.specs = model_tensors(self.config)
        self.progress = progress
        self.errors: dict[str, tuple[float, float]] = {}  # squared error, squared weights
        self.total, self.done = sum(int(np.prod(s.shape)) for s in self.specs), 0

    def read(self, spec: TensorSpec, first: int, last: int) -> Floats:
        """Rows of a tensor. Raises WeightError for NaN or Inf."""
        name = hugging_face(spec.name)
        values = self.checkpoint.float32(name, first, last)
        if not np.isfinite(values).all():
            raise WeightError(
                f"{self.checkpoint.path}: tensor {name} has NaN or Inf among its weights; take "
                "another checkpoint"
            )
        self.done += values.size
        self.progress(name, self.done, self.total)
        return values

    def runs(self, spec: TensorSpec, multiple: int = 1) -> Iterator[Floats]:
        """A tensor, a multiple of so many rows at a time."""
        rows = spec.shape[0]
        columns = spec.shape[1] if len(spec.shape) > 1 else 1
        size = max(multiple, RUN // columns // multiple * multiple)
        for first in range(0, rows, size):
            yield self.read(spec, first, min(first + size, rows))

    def note(self, spec: TensorSpec, was: Floats, now: Floats) -> None:
        """Add to what a tensor lost. Of the report only: numpy's sums differ between machines."""
        missing = (now - was).reshape(-1)
        lost, had = self.errors.get(spec.name, (0.0, 0.0))
        had += float(np.vdot(was, was))
        self.errors[spec.name] = lost + float(np.vdot(missing, missing)), had

    def kinds(self, stored: Callable[[TensorSpec], tuple[str, int]]) -> Iterator[KindReport]:
        """A row for each kind of tensor there is; `stored` gives a tensor's type and bytes."""
        for kind in (*KINDS, "vector"):
            specs = [s for s in self.specs if s.kind == kind]
            if not specs:
                continue
            errors = {s.name: self.errors.get(s.name, (0.0, 0.0)) for s in specs}
            lost, had = (sum(e[i] for e in errors.values()) for i in range(2))
            found = [stored(s) for s in specs]
            yield KindReport(
                kind,
                ", ".join(sorted({name for name, _ in found})),
                len(specs),
                sum(int(np.prod(s.shape)) for s in specs),
                sum(size for _, size in found),
                lost / had if had else 0.0,
                0,
                0,
                source_error(self.checkpoint, errors) if kind != "vector" else None,
            )

    def report(
        self,
        path: Path,
        size: int,
        stored: Callable[[TensorSpec], tuple[str, int]],
        said: tuple[str, ...] = (),
    ) -> ConvertReport:
        """What was made: `size` bytes at `path`. A source in codes is the first thing said."""
        kinds = tuple(self.kinds(stored))
        becomes = {
            s.name: None if stored(s)[0] in DENSE else stored(s)[0]
            for s in self.specs
            if s.kind != "vector"
        }
        lines = (*notes(self.checkpoint.path, self.checkpoint.tensors, becomes), *said)
        bits = sum(k.bytes for k in kinds) * 8 / self.total
        return ConvertReport(str(path), size, self.total, bits, kinds, lines)
