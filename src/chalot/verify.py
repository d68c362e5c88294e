"""The verb `verify`: whether every byte of a `.myai` file is the one that was written.

Opening checks the header and the manifest. Here each extent is read and its checksum compared, the
fill between extents must be zero, the configuration must fit the tensors, and no scale, vector or
dense weight may be NaN or Inf. Memory stays small: the file is read in pieces of 16 MB.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chalot.errors import ChalotError
from chalot.formats.files import quoted
from chalot.formats.myai import MyaiFile
from chalot.formats.myai.manifest import TensorEntry
from chalot.quant.scheme import SCHEMES
from chalot.reading import read_frequencies, read_model_config
from chalot.table import size

Progress = Callable[[str, int, int], None]  # what, bytes done, of
EXPONENT = {"f32": ("<u4", 0x7F800000), "bf16": ("<u2", 0x7F80), "f16": ("<u2", 0x7C00)}


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written. `what` says how it shows."""

    name: str
    what: str


@dataclass(frozen=True)
class VerifyReport:
    """What was found. `ok` is whether nothing is damaged."""

    path: str
    bytes: int
    extents: int
    ok: bool
    damaged: tuple[Damage, ...]


def verify(path: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Check a whole `.myai` file. `progress` is told what is read, bytes done, and of how many.

    Raises FormatError or UnsupportedError when header or manifest are damaged, so that nothing
    behind them can be named; every other damage is in the report.
    """
    file = MyaiFile(Path(path).expanduser())
    try:
        found = [
            *_checksums(file, progress or (lambda *_: None)),
            *_fill(file),
            *_numbers(file),
        ]
        return VerifyReport(
            str(path), file.all_bytes, len(list(file.extents())), not found, tuple(found)
        )
    finally:
        file.close()


def _checksums(file: MyaiFile, progress: Progress) -> Iterator[Damage]:
    total, done = sum(extent.bytes for _, extent in file.extents()), 0
    for name, extent in file.extents():
        start = done

        def advance(count: int, name: str = name) -> None:
            nonlocal done
            done += count
            progress(name, done, total)

        if not file.is_whole(extent, advance):
            home, start_at = file.home(extent)
            at = f"{extent.bytes:,} bytes at {start_at:,}"
            at += f" of {home.path.name}" if extent.elsewhere else ""
            yield Damage(quoted(name), f"wrong checksum ({at})")
        done = start + extent.bytes


def _fill(file: MyaiFile) -> Iterator[Damage]:
    for name, fill in file.gaps():
        if fill.any():
            yield Damage(quoted(name), f"the {len(fill)} bytes of fill before it are not zero")


def _numbers(file: MyaiFile) -> Iterator[Damage]:
    """Contradictions between configuration and tensors; numbers that are not finite."""
    try:
        config = read_model_config(file)
        read_frequencies(file, config)
    except ChalotError as error:
        yield Damage("configuration", _without_path(error, file))
    shared = file.aliases
    for name, entry in file.manifest.tensors.items():
        if name in shared:
            continue
        try:
            if len(entry.shape) == 1:
                file.vector(name)
            elif SCHEMES[entry.scheme].is_coded:
                file.matrix(name)
            elif not _is_finite(file, entry):
                yield Damage(quoted(name), "has weights that are NaN or Inf")
        except ChalotError as error:
            yield Damage(quoted(name), _without_path(error, file))


def _is_finite(file: MyaiFile, entry: TensorEntry) -> bool:
    kind, exponent = EXPONENT[entry.scheme]
    return not any(
        bool(np.any((piece.view(kind) & exponent) == exponent))
        for piece in file.pieces(entry.extent)
    )


def _without_path(error: ChalotError, file: MyaiFile) -> str:
    return str(error).removeprefix(f"{file.path}: ")


def render(report: VerifyReport) -> str:
    """The report as text: one line if all is well, else one for each damaged part."""
    head = f"{report.path}: {size(report.bytes)}, {report.extents} extents"
    if report.ok:
        return f"{head}, all as written"
    lines = [f"{head}, {len(report.damaged)} damaged; copy, download or convert it again"]
    return "\n".join(lines + [f"  {d.name}: {d.what}" for d in report.damaged])
