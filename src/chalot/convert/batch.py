"""Many sources in one call of `convert`: which they are, what each becomes, and how each went."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from chalot.convert import ConvertReport
from chalot.errors import ChalotError, FormatError, OutputError, told
from chalot.formats.files import boundary
from chalot.formats.hub.cache import downloaded
from chalot.sources import as_path

FILES = ("myai", "gguf")  # targets that are one file; others are folders
DEPTH = 4  # folders below the one that is searched
LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")  # opened with the first one


@dataclass(frozen=True)
class Failure:
    """A source that could not be converted, and why."""

    source: str
    error: str


@dataclass(frozen=True)
class BatchReport:
    """What became of each source."""

    reports: tuple[ConvertReport, ...]
    failed: tuple[Failure, ...]


def name_of(source: str) -> str:
    """What to call a source: a short name or a hub id's last part; a folder's, a file's name."""
    path = as_path(source)
    if path.is_file() or (not path.exists() and path.suffix == ".gguf"):
        return re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
    if not path.exists():
        return source.split("/")[-1] if "/" in source else source.lower()
    inside = boundary(path).name  # of the hub's cache: models--ORG--NAME, and not a commit's digits
    return inside.split("--")[-1] if inside.startswith("models--") else path.resolve().name


def place(source: str, kind: str, to: str, folder: Path) -> Path:
    """Where a source goes that no name was given for: NAME-KIND.myai, KIND a scheme or a type."""
    kind = re.sub(r"[^\w.]+", "-", kind.lower())
    stem = "-".join(filter(None, (name_of(source), kind)))
    return folder / (f"{stem}.{to}" if to in FILES else stem)


def sources(named: Sequence[str], everything: bool) -> list[str]:
    """What to convert: the sources as they were named, or all that are inside of them.

    With `everything` a named folder stands for each checkpoint below it, and no folder at all for
    each model that was downloaded from the hub earlier. Raises FormatError where that is nothing,
    OutputError where two sources would have one name.
    """
    if not everything:
        found = list(named)
    elif named:
        found = [str(path) for folder in named for path in _checkpoints_in(folder)]
    else:
        found = [repo_id for repo_id, _ in downloaded()]
        if not found:
            raise FormatError("--all: nothing was downloaded from the hub yet; name a folder")
    owners: dict[str, str] = {}
    for source in found:
        other = owners.setdefault(name_of(source), source)
        if other != source:
            raise OutputError(
                f"{source} and {other} would both be written as {name_of(source)}; "
                "convert them one by one, with -o"
            )
    return list(dict.fromkeys(found))


def _checkpoints_in(folder: str) -> list[Path]:
    """Checkpoints in a folder or below it. Raises FormatError if there are none."""
    path = as_path(folder)
    if not path.is_dir():
        raise FormatError(f"{folder}: is no folder here; --all takes folders of checkpoints")
    found = list(_search(path, DEPTH))
    if not found:
        raise FormatError(
            f"{folder}: holds no checkpoint; expected folders with config.json and *.safetensors, "
            "or .gguf files"
        )
    return found


def _search(folder: Path, depth: int) -> Iterator[Path]:
    """Folders with a configuration and weights, and .gguf files; a checkpoint is not searched."""
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    if (folder / "config.json").is_file() and any(p.suffix == ".safetensors" for p in entries):
        yield folder
        return
    for entry in entries:
        if entry.suffix == ".gguf" and entry.is_file() and not LATER_PART.search(entry.name):
            yield entry
        elif depth and entry.is_dir() and not entry.is_symlink():
            yield from _search(entry, depth - 1)


def run(
    named: Sequence[str],
    convert: Callable[[str], ConvertReport],
    failed: Callable[[Failure], None] = lambda _: None,
) -> BatchReport:
    """`convert` each source in turn, on past those that fail; `failed` hears of each at once."""
    reports, failures = [], []
    for source in named:
        try:
            reports.append(convert(source))
        except (ChalotError, OSError, MemoryError) as error:
            reason = " ".join(told(error).split()) or "out of memory"
            reason = reason if reason.startswith(source) else f"{source}: {reason}"
            failures.append(Failure(source, reason))
            failed(failures[-1])
    return BatchReport(tuple(reports), tuple(failures))
