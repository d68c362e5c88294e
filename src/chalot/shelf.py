"""The verbs `models` and `rm`: short names, what is converted, what was downloaded; taking one off.

Nothing outside of CHALOT_HOME/models is ever removed: a name is looked up among the files that lie
there, and is never used as a path.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from chalot.calibrated import beside
from chalot.errors import ChalotError, FormatError, OutputError
from chalot.formats.hub.cache import downloaded, part_names
from chalot.formats.myai import MyaiFile
from chalot.library import SUFFIX, folder, place
from chalot.short_names import NAMES, short_name
from chalot.table import rows, size


@dataclass(frozen=True)
class Name:
    """A short name, and what it stands for."""

    name: str
    id: str
    parameters: int
    licence: bool  # to be accepted on the model's page first


@dataclass(frozen=True)
class Kept:
    """A converted model in CHALOT_HOME."""

    name: str
    path: str
    scheme: str  # of its matrices, several with commas; "" for a file that cannot be read
    bytes: int
    made: str  # ISO 8601
    source: str  # what it was made from, or why it cannot be read
    other: str = ""  # the file beside it that holds bytes of it


@dataclass(frozen=True)
class Downloaded:
    """A checkpoint in the hub's cache."""

    id: str
    name: str | None  # its short name
    path: str
    bytes: int


@dataclass(frozen=True)
class ModelsReport:
    """All that is known by name."""

    folder: str
    names: tuple[Name, ...]
    converted: tuple[Kept, ...]
    downloaded: tuple[Downloaded, ...]


def models() -> ModelsReport:
    """Short names, converted models and downloaded checkpoints. Raises OutputError (no home)."""
    return ModelsReport(
        str(folder()),
        tuple(Name(name, k.id, k.parameters, k.licence) for name, k in NAMES.items()),
        tuple(kept()),
        tuple(
            Downloaded(repo_id, short_name(repo_id), str(path), _bytes_in(path))
            for repo_id, path in downloaded()
        ),
    )


def kept() -> list[Kept]:
    """Converted models, by name."""
    found = []
    for path in sorted(folder().glob(f"*{SUFFIX}")):
        try:
            status = path.stat()
        except OSError:  # a link to nowhere, or just removed
            continue
        scheme, source, other = _contents(path)
        made = datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="seconds")
        found.append(Kept(path.stem, str(path), scheme, status.st_size, made, source, other))
    return found


def _contents(path: Path) -> tuple[str, str, str]:
    """(schemes, source, the other file) of a file."""
    try:
        file = MyaiFile(path)
    except (ChalotError, OSError) as error:
        return "", f"cannot be read: {error}", ""
    try:
        found = {t.scheme for t in file.manifest.tensors.values() if len(t.shape) == 2}
        return ", ".join(sorted(found)), file.manifest.source.name, file.manifest.other
    finally:
        file.close()


def _bytes_in(path: Path) -> int:
    """Of a folder's files, or of a file and the other parts of it."""
    named = [path.parent / name for name in part_names(path.name)]
    return sum(
        p.stat().st_size for p in (path.iterdir() if path.is_dir() else named) if p.is_file()
    )


def find(name: str) -> list[Kept]:
    """Converted models of that name, or made from that source. Raises FormatError for none."""
    everything = kept()
    plain = name.removesuffix(SUFFIX)
    made = place(name, "").stem  # NAME-KEY-
    found = [k for k in everything if k.name == plain or k.name.startswith(made)]
    if not found:
        there = ", ".join(k.name for k in everything) or "none"
        raise FormatError(
            f"{name}: no converted model of that name or source in {folder()}; there are: {there}"
        )
    return found


def remove(names: Iterable[str], dry_run: bool = False) -> list[Kept]:
    """Remove converted models by their names or sources, a source in each scheme that it has.

    Returns what was, or with `dry_run` would be, removed. Raises FormatError for a name that is not
    there, before anything is removed; OutputError, also where another model has bytes in one.
    """
    found = list(dict.fromkeys(kept for name in names for kept in find(name)))
    going = {Path(model.path).name for model in found}
    for model in kept():
        if model not in found and model.other in going:
            raise OutputError(
                f"{model.other}: {model.name} has bytes in it; remove {model.name} too"
            )
    for model in [] if dry_run else found:
        try:
            Path(model.path).unlink()
            beside(Path(model.path)).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{model.path}: cannot be removed ({error.strerror})") from None
    return found


def render(report: ModelsReport) -> str:
    """The report as text."""
    there = {d.id for d in report.downloaded}
    table = [["short name", "parameters", "licence", "downloaded", "hub id"]]
    for n in report.names:
        marks = ("to accept" if n.licence else "-", "yes" if n.id in there else "-")
        table.append([n.name, f"{n.parameters / 1e9:.2f} B", *marks, n.id])
    parts = [rows(table)]
    if report.converted:
        table = [["converted", "scheme", "size", "made", "from"]]
        for k in report.converted:
            made = k.made.replace("T", " ")[:16]
            table.append([k.name, k.scheme or "-", size(k.bytes), made, k.source[:80]])
        parts.append(rows(table))
    if report.downloaded:
        table = [["downloaded", "short name", "size", "folder"]]
        for d in report.downloaded:
            table.append([d.id, d.name or "-", size(d.bytes), d.path])
        parts.append(rows(table))
    total = sum(k.bytes for k in report.converted)
    parts.append(f"{len(report.converted)} converted, {size(total)}, in {report.folder}")
    return "\n\n".join(parts)
