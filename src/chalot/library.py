"""Converted models that chalot keeps: CHALOT_HOME/models/NAME-KEY-SCHEME.myai.

What is run, talked to or measured and is no `.myai` file yet is converted once, and found again by
KEY: 12 digits of the SHA-256 of its hub id or whole path. A source that is newer than the file is
converted again.
"""

import hashlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from chalot.convert.keeping import KEEP, usual
from chalot.errors import FormatError, OutputError
from chalot.home import home
from chalot.sources import as_path, called, hub_id, resolve

SCHEME = "nl4"  # of what is converted without being asked how
SUFFIX = ".myai"
MAGIC = b"IAYM"  # how such a file begins; its version follows, little-endian
OLD_VERSION = 2  # read as a source, as another tool's
PARTS = re.compile(r"-\d{5}-of-\d{5}|_manifest|_quantized")  # after the name that files share

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def folder() -> Path:
    """Where converted models are. It may not exist yet."""
    return home() / "models"


def is_ready(path: Path) -> bool:
    """Whether a file is run as it is: a `.myai` file, of any version but that of older tools.

    Raises FormatError for one that cannot be read.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(8)
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be read ({error.strerror}); expected a file that you may read: "
            "see its owner and mode with ls -l"
        ) from None
    if begin.startswith(MAGIC):
        return int.from_bytes(begin[4:], "little") != OLD_VERSION
    return path.suffix == SUFFIX  # and if it is none after all, its reader says so


def place(source: str | Path, scheme: str) -> Path:
    """The file that a source's conversion is kept in."""
    named = hub_id(source)
    path = as_path(source).resolve()
    name = path.name if named is None else named.replace("/", "--")
    key = hashlib.sha256((named or str(path)).encode()).hexdigest()[:12]
    return folder() / f"{name}-{key}-{scheme}{SUFFIX}"


def converted(
    source: str | Path,
    scheme: str | None = None,
    *,
    threads: int | None = None,
    say: Say = lambda _: None,
    progress: Progress = lambda *_: None,
) -> Path:
    """The `.myai` file of what a user named, made now if there is none yet.

    `say` gets a line once the source has been opened and found good. Raises a ChalotError as
    `convert` does, OutputError where CHALOT_HOME cannot be written.
    """
    path = as_path(source)
    if path.is_file() and is_ready(path):
        return path
    if not path.exists():  # of the hub: nobody is asked again
        for kept in (place(source, s) for s in ([scheme] if scheme else [KEEP, SCHEME])):
            if kept.exists():
                return kept
    found = resolve(source, progress)
    scheme = scheme or usual(found, SCHEME)
    kept = place(source, scheme)
    if kept.exists() and kept.stat().st_mtime >= _newest(found):
        return kept
    from chalot.convert import convert

    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{kept.parent}: cannot be made ({error}); set CHALOT_HOME") from None
    begun = False

    def advance(what: str, done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            begun = True
            keeps = f"what keeps its own codes best, {SCHEME} if it has none"
            kinds = keeps if scheme == KEEP else scheme
            say(f"converting {source} to {kinds}, once, into {kept}")
        progress(what, done, total)

    command = shlex.join(["chalot", "convert", str(source), "--scheme", scheme])
    report = convert(
        found, kept, scheme,
        threads=threads, progress=advance, command=command, name=called(source),
    )  # fmt: skip
    for note in report.notes:
        say(note)
    return kept


def _newest(source: Path) -> float:
    """When a folder, or a file with those that belong to it, was changed last."""
    files = [source]
    if source.is_dir():
        files += source.iterdir()
    elif (shared := PARTS.split(source.name, maxsplit=1)[0]) != source.name:
        files += [p for p in source.parent.iterdir() if p.name.startswith(shared)]
    # a file that was moved here keeps its date; only its change time says that it is new here
    return max(max(s.st_mtime, s.st_ctime) for s in (p.stat() for p in files))
