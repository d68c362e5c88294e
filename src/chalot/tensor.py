"""The verb `tensor`: one weight of a model times one input, y = W x.

From a `.myai` file by the kernels that run the model, on the codes as they lie there; from any
other source by the same kernels' float32 product of the decoded rows, in their one written order.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, WeightError
from chalot.formats.checkpoint import Checkpoint, open_checkpoint
from chalot.formats.files import quoted
from chalot.formats.myai import MyaiFile
from chalot.formats.myai.manifest import MAGIC, VERSION
from chalot.formats.names import hugging_face
from chalot.formats.npy import read_array, write_array
from chalot.kernels.backend import Backend, open_backend
from chalot.model.calibration import dense
from chalot.quant.scheme import PANEL

Floats = NDArray[np.float32]
RUN = 4 << 20  # numbers in memory at once
MOST = 1 << 28  # numbers of an answer
SHOWN = 8


@dataclass(frozen=True)
class TensorReport:
    """What was multiplied, how, and the answer in a few numbers."""

    path: str
    tensor: str
    stored: str
    shape: tuple[int, int]  # rows, columns
    input: tuple[int, ...]
    output: tuple[int, ...]
    by: str  # "codes" or "float32", and on which inputs
    kernels: str
    least: float
    greatest: float
    mean: float
    root_mean_square: float
    first: tuple[float, ...]
    out: str | None


def tensor(
    path: str | Path,
    name: str,
    x: str | Path | NDArray[np.floating],
    out: str | Path | None = None,
    *,
    threads: int | None = None,
) -> tuple[TensorReport, Floats]:
    """The report and y: (rows,) for an x of (columns,), (tokens, rows) for (tokens, columns).

    `x` is an array or a .npy file, `out` a .npy file to write. Raises a ChalotError for a tensor
    that is not there, and for an input of another shape or with NaN or Inf.
    """
    from chalot.sources import resolve

    given = read_array(Path(x)) if isinstance(x, str | Path) else np.asarray(x)
    where = str(x) if isinstance(x, str | Path) else "x"
    place = resolve(path)
    backend = open_backend(threads=threads)
    file = _as_myai(place)
    if file is not None:
        try:
            stored, shape, by, y = _by_codes(file, name, given, where, backend)
        finally:
            file.close()
    else:
        checkpoint = open_checkpoint(place)
        try:
            stored, shape, by, y = _by_floats(checkpoint, name, given, where, backend)
        finally:
            checkpoint.close()
    y = y[0] if given.ndim == 1 else y
    if out is not None:
        write_array(Path(out), y)
    wide = y.astype(np.float64)
    report = TensorReport(
        str(path),
        name,
        stored,
        shape,
        given.shape,
        y.shape,
        by,
        backend.name,
        float(wide.min()),
        float(wide.max()),
        float(wide.mean()),
        float((wide * wide).mean() ** 0.5),
        tuple(map(float, y.reshape(-1)[:SHOWN])),
        None if out is None else str(out),
    )
    return report, y


def _as_myai(path: Path) -> MyaiFile | None:
    """A `.myai` file of this format's version; None for anything else."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        begin = file.read(8)
    own = MAGIC.to_bytes(4, "little") + VERSION.to_bytes(4, "little")
    return MyaiFile(path) if begin == own else None


def _by_codes(
    file: MyaiFile, name: str, given: NDArray[np.floating], where: str, backend: Backend
) -> tuple[str, tuple[int, int], str, Floats]:
    entries = file.manifest.tensors
    known = {hugging_face(n): n for n in entries} | {n: n for n in entries}
    own = known[_known(name, known, file.path)]
    shape = _matrix(entries[own].shape, name, file.path)
    x = _inputs(given, shape, where)
    matrix, planes = file.matrix(own), entries[own].activation // 8
    by = f"codes, {planes * 8}-bit inputs" if matrix.scheme.is_coded else "float32"
    return entries[own].scheme, shape, by, backend.product(matrix, x, planes)


def _by_floats(
    checkpoint: Checkpoint, name: str, given: NDArray[np.floating], where: str, backend: Backend
) -> tuple[str, tuple[int, int], str, Floats]:
    tensors = checkpoint.tensors
    info = tensors[_known(name, tensors, checkpoint.path)]
    shape = _matrix(info.shape, name, checkpoint.path)
    x = _inputs(given, shape, where)
    rows, columns = shape
    y = np.empty((len(x), rows), np.float32)
    size = max(PANEL, RUN // columns)
    for first in range(0, rows, size):
        last = min(first + size, rows)
        weights = checkpoint.float32(name, first, last)
        if not np.isfinite(weights).all():
            raise WeightError(f"{checkpoint.path}: tensor {quoted(name)} has NaN or Inf")
        y[:, first:last] = backend.product(dense(weights), x, 1)
    return info.dtype, shape, "float32", y


def _known(name: str, names: Iterable[str], path: Path) -> str:
    """`name`, if there is such a tensor. Raises FormatError, which names those most like it."""
    every = list(names)
    if name in every:
        return name
    like = difflib.get_close_matches(name, every[:20000], 3, 0.3) or every[:3]
    raise FormatError(
        f"{path}: has no tensor {quoted(name)}; there are {', '.join(map(quoted, like))}"
    )


def _matrix(shape: tuple[int, ...], name: str, path: Path) -> tuple[int, int]:
    if len(shape) != 2:
        raise FormatError(f"{path}: {quoted(name)} is a vector of {shape}; expected a matrix")
    return shape[0], shape[1]


def _inputs(given: NDArray[np.floating], shape: tuple[int, int], where: str) -> Floats:
    """(tokens, columns) float32 of what a user gave."""
    rows, columns = shape
    if given.ndim not in (1, 2) or given.shape[-1] != columns or not given.size:
        raise FormatError(
            f"{where}: has shape {given.shape}; a weight of {rows} x {columns} takes ({columns},) "
            f"or (tokens, {columns})"
        )
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(given, np.float32).reshape(-1, columns)
    if not np.isfinite(x).all():
        raise FormatError(f"{where}: has NaN or Inf, or numbers too large for float32")
    if len(x) * rows > MOST:
        raise FormatError(f"{where}: {len(x):,} tokens are too many; expected {MOST // rows:,}")
    return x


def render(report: TensorReport) -> str:
    """The report as text."""
    r = report
    numbers = " ".join(f"{value:.6g}" for value in r.first)
    more = " ..." if int(np.prod(r.output)) > len(r.first) else ""
    return "\n".join(
        [
            f"{r.tensor}: {r.shape[0]} x {r.shape[1]}, stored as {r.stored}",
            f"y = W x: {r.input} -> {r.output}, by {r.by} ({r.kernels})",
            f"from {r.least:.6g} to {r.greatest:.6g}, mean {r.mean:.6g}, "
            f"root mean square {r.root_mean_square:.6g}",
            f"{numbers}{more}",
            *([] if r.out is None else [f"written to {r.out}"]),
        ]
    )
