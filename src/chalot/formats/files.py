"""Files that may be hostile, opened carefully; files of our own, whole or absent.

Reading: a name out of a checkpoint is one plain file name, and what it opens is a regular file that
lies in the checkpoint's folder, or, for a folder of the hub's cache, in the same `models--*`
directory (its snapshots are symbolic links to ../../blobs). Writing: a temporary name in the same
directory, synced, then renamed, so that a kill or a full disk leaves nothing under the final name.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from chalot.errors import FormatError, OutputError


def quoted(name: object, width: int = 80) -> str:
    """A name out of a file, safe to print: escaped, and cut to `width` characters."""
    if not isinstance(name, str):
        return f"a {type(name).__name__}"
    return repr(name) if len(name) <= width else f"{name[:width]!r}..."


LARGEST_TEXT = 256 << 20  # bytes: of a text to measure on, or to calibrate with
REMEDIES = {  # what the system said -> what helps
    errno.ENOSPC: "Free some space, or choose another place",
    errno.EDQUOT: "Free some space, or choose another place",
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f), or choose another place",
    errno.ENOENT: "Make the folder {folder} first, or choose another place",
    errno.ENOTDIR: "{folder} is no folder; choose another place",
    errno.EACCES: "Choose a place that you may write to",
    errno.EPERM: "Choose a place that you may write to",
    errno.EROFS: "Choose a place that you may write to",
    errno.ENAMETOOLONG: "Choose a shorter name",
}


def remedy(error: Exception, path: Path) -> str:
    """What helps against an error of writing `path`."""
    code = getattr(error, "errno", None)
    text = REMEDIES.get(code, "Choose another place") if code else "Choose another place"
    return text.format(folder=path.parent)


def boundary(folder: Path) -> Path:
    """The directory that links in `folder` may not leave: its `models--*` ancestor, or itself."""
    real = folder.resolve()
    # only the hub's own layout, <cache>/models--org--name/snapshots/<commit>, or a folder in it
    for inside in (real, *real.parents[:3]):
        repository = inside.parent.parent
        if inside.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository
    return real


def check_plain_name(name: object, where: object) -> str:
    """`name` if it is a single file name; FormatError for a path, `..`, or what is no name."""
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or len(name) > 255
        or any(character in "/\\:" or ord(character) < 32 for character in name)
    ):
        raise FormatError(
            f"{where}: found {quoted(name)}, expected the plain name of a file in the same folder; "
            "do not use this checkpoint"
        )
    return name


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Open a regular file of a checkpoint's folder for reading.

    Raises FormatError if it is missing, unreadable, not a regular file, or links out of `boundary`.
    """
    path = folder / check_plain_name(name, folder)
    try:
        target = path.resolve(strict=True)
        if not target.is_relative_to(boundary(folder)):
            raise FormatError(
                f"{path}: is a link to {target}, outside the checkpoint's folder; "
                "copy the file into the folder"
            )
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"{path}: cannot be opened ({reason})") from error
    return open_regular(target, path)


def open_regular(target: Path, path: Path) -> BinaryIO:
    """Open a regular file for reading; `path` is what errors call it. Raises FormatError."""
    try:
        # without O_NONBLOCK, opening a named pipe would wait for its writer for ever
        descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"{path}: cannot be opened ({reason})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path}: is not a regular file; expected one")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_at(file: BinaryIO, path: Path, offset: int, size: int) -> bytes:
    """Exactly `size` bytes at `offset` of an open file. Raises FormatError where it ends before."""
    pieces = []
    while size:
        try:
            piece = os.pread(file.fileno(), size, offset)
        except (OSError, ValueError) as error:  # a failing disk; a file closed already
            raise FormatError(f"{path}: cannot be read ({error})") from error
        if not piece:
            raise FormatError(f"{path}: file ends at {offset}; it was cut while being read")
        pieces.append(piece)
        offset, size = offset + len(piece), size - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_text(path: Path, where: str = "") -> str:
    """A text file that a user named; `where` is what errors call it. Raises FormatError."""
    where = where or str(path)
    try:
        with path.expanduser().open("rb") as file:
            raw = file.read(LARGEST_TEXT + 1)  # a device may never end
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte; ~ of nobody
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"{where}: cannot be read ({reason})") from None
    if len(raw) > LARGEST_TEXT:
        raise FormatError(f"{where}: more than {LARGEST_TEXT:,} bytes; take a part of it")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{where}: not UTF-8 at byte {error.start}; expected plain text"
        ) from None


def is_other_file(path: Path, magic: bytes) -> bool:
    """Whether `path` holds something that does not begin with `magic`: a source's weights, say."""
    if not path.exists():
        return False
    if not path.is_file():
        return True
    with path.open("rb") as file:
        begin = file.read(len(magic))
    return begin not in (b"", magic)


def check_kind(path: Path, magic: bytes) -> None:
    """Raise OutputError where a file of another kind would be replaced; without `magic`, none."""
    if magic and is_other_file(path, magic):
        raise OutputError(f"{path}: is there, and is of another kind; choose another name")


def check_place(path: Path, magic: bytes = b"") -> Path:
    """Where `whole_file` will write, links followed. Raises OutputError where it could not."""
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    check_kind(place, magic)
    folder = place.parent
    if not folder.is_dir():
        raise OutputError(
            f"{path}: cannot be written (there is no folder {folder}); make it, or choose another "
            "place"
        )
    if not os.access(folder, os.W_OK | os.X_OK) or (
        place.exists() and not os.access(place, os.W_OK)
    ):
        raise OutputError(f"{path}: cannot be written; choose a place that you may write to")
    return place


@contextmanager
def whole_file(path: Path, magic: bytes = b"") -> Iterator[BinaryIO]:
    """A new file that appears at `path` only if the block ends without an error.

    It is written beside `path` under a temporary name, synced and renamed; an existing `path` is
    replaced in one step, and keeps who may read it. Raises OutputError when the disk is full or the
    directory not writable.
    A killed process can leave the temporary file (`.NAME.*.part`), never a part under `path`. With
    `magic`, a file that is there must begin with it.
    """
    path = check_place(path, magic)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            if path.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"{path}: cannot be written ({reason}); nothing was left there. {remedy(error, path)}"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync_directory(folder: Path) -> None:
    """Make a rename survive a power cut; some file systems refuse, and lose nothing but that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
