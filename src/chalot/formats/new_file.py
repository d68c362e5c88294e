"""Files and folders of our own that appear whole or not at all, written by one process at a time.

Bytes go to `.NAME.partial` beside the target, under an advisory lock that dies with its process; at
the end they are synced and renamed. A killed process leaves the partial file or folder, which the
next one writes over, or, a `.myai` file, goes on with (myai/writer.py).
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from chalot.errors import OutputError
from chalot.formats.files import is_other_file, remedy

try:
    import fcntl
except ImportError:  # Windows: no lock, the last writer wins
    fcntl = None  # type: ignore[assignment]

AT_ONCE = 1 << 26  # bytes of one write; more than 2 GB are refused by some systems


def cannot_be_written(path: Path, error: Exception) -> OutputError:
    """The error a user sees when the system refuses to write."""
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(
        f"{path}: cannot be written ({reason}); nothing was left under that name. "
        f"{remedy(error, path)}"
    )


def partial_of(place: Path) -> Path:
    """Where a file or folder is while it is not whole."""
    return place.with_name(f".{place.name}.partial")


def lock(descriptor: int, path: Path, partial: Path) -> None:
    """Take the lock of a partial file or folder, or close it and raise OutputError."""
    if fcntl is None:
        return
    busy = OutputError(
        f"{path}: another conversion is writing it; wait for it, or choose another name"
    )
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise busy from None
    # another process may have finished, and renamed this very file, before the lock was ours
    try:
        same = os.path.samestat(partial.stat(), os.fstat(descriptor))
    except OSError:
        same = False
    if not same:
        os.close(descriptor)
        raise busy


class NewFile:
    """A file on its way; `commit` makes it appear. Leaving the block without it drops all."""

    def __init__(
        self, path: Path, magic: bytes, kind: str, start: int = 0, anew: bool = True
    ) -> None:
        """`kind` is the ending of such files; bytes before `start` are filled in by `commit`.

        What a killed process left goes if it begins `anew`, else is written over bit by bit.
        Raises OutputError if the place cannot be written, holds a file that does not begin with
        `magic`, or another process is writing it.
        """
        self.path = path
        self.at = start
        try:
            self.place = Path(os.path.realpath(path))  # a link stays, what it leads to is written
            if path.is_dir():
                raise OutputError(f"{path}: is a directory; expected a file name like model{kind}")
            if is_other_file(path, magic):
                raise OutputError(
                    f"{path}: is there, and is no {kind} file; choose another name, or remove it"
                )
            self.partial = partial_of(self.place)
            # a link that someone planted there is not followed
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            self.descriptor = os.open(self.partial, flags, 0o644)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise self.failed(error) from None
        lock(self.descriptor, path, self.partial)
        try:
            if anew:
                os.ftruncate(self.descriptor, 0)
        except OSError as error:
            self.__exit__()
            raise self.failed(error) from None

    def failed(self, error: Exception) -> OutputError:
        """The error a user sees when the system refuses to write."""
        return cannot_be_written(self.path, error)

    def write(self, data: bytes | memoryview | NDArray[Any]) -> None:
        """Append bytes, or an array's."""
        if isinstance(data, np.ndarray):
            data = np.ascontiguousarray(data).data
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        try:
            while view:
                done = os.pwrite(self.descriptor, view[:AT_ONCE], self.at)
                view = view[done:]
                self.at += done
        except OSError as error:
            raise self.failed(error) from None

    def align(self, multiple: int) -> None:
        """Append zeros up to a multiple."""
        self.write(b"\0" * (-self.at % multiple))

    def commit(self, front: bytes = b"", check: Callable[[Path], None] = lambda _: None) -> None:
        """Write `front` at the beginning, sync, let `check` look at what is there, and rename."""
        try:
            os.ftruncate(self.descriptor, self.at)
            if front:
                os.pwrite(self.descriptor, front, 0)
            os.fsync(self.descriptor)
        except OSError as error:
            raise self.failed(error) from None
        check(self.partial)
        try:
            self.partial.replace(self.place)
        except OSError as error:
            raise self.failed(error) from None
        os.close(self.descriptor)
        self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor >= 0:  # not finished: leave nothing
            with suppress(OSError):
                self.partial.unlink()
            os.close(self.descriptor)
            self.descriptor = -1


class _FileInside(NewFile):
    """A file of a folder that is on its way."""

    def __init__(self, folder: "NewFolder", name: str) -> None:
        self.folder = folder
        super().__init__(folder.partial / name, b"", "")

    def failed(self, error: Exception) -> OutputError:
        return cannot_be_written(self.folder.path, error)


class NewFolder:
    """A folder of plain files on its way; `commit` makes it appear, else all of it goes."""

    def __init__(self, path: Path) -> None:
        """Raises OutputError if `path` is there and not an empty folder, or cannot be written."""
        self.path = path = Path(os.path.abspath(path))  # noqa: PTH100  "." and ".." have no names
        self.partial = partial_of(path)
        try:
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise OutputError(f"{path}: is there, and is no folder; choose another name")
            if path.is_dir() and any(path.iterdir()):
                raise OutputError(f"{path}: is there, and not empty; choose another name")
            with suppress(FileExistsError):
                self.partial.mkdir(mode=0o755)
            if self.partial.is_symlink():
                raise OutputError(f"{self.partial}: is a link; remove it")
            self.descriptor = os.open(self.partial, os.O_RDONLY)
        except (OSError, ValueError) as error:
            raise cannot_be_written(path, error) from None
        lock(self.descriptor, path, self.partial)
        try:
            self._clear()
        except OSError as error:  # a folder in it: not of our making
            os.close(self.descriptor)
            raise cannot_be_written(path, error) from None

    def _clear(self) -> None:
        for left in self.partial.iterdir():
            left.unlink()

    def file(self, name: str) -> NewFile:
        """A new file in the folder. Errors name the folder."""
        return _FileInside(self, name)

    def commit(self) -> None:
        """Sync, and rename to the folder's own name."""
        try:
            os.fsync(self.descriptor)
            self.partial.rename(self.path)
        except OSError as error:
            raise cannot_be_written(self.path, error) from None
        os.close(self.descriptor)
        self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor >= 0:  # not finished: leave nothing
            with suppress(OSError):
                self._clear()
                self.partial.rmdir()
            os.close(self.descriptor)
            self.descriptor = -1
