"""What of a half-written file is finished, so that the next process need not make it again.

A journal lies beside the partial file. Its first line says what is being made, each other line one
tensor that is whole. Nothing is synced on the way: after a power cut the two may disagree, so that
a tensor counts only if its bytes still have their digest, and none does behind one that has not.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from chalot.formats.myai.manifest import TensorEntry


class Finished(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor that is whole: its entry, and what the report says of it."""

    name: str
    made_of: str  # a digest of all that decides its bytes
    entry: TensorEntry
    errors: tuple[float, float] | None = None  # squares: what was lost, what there was
    products: tuple[float, float, float] | None = None  # of refinement
    taken: bool = False  # the source's own codes


class Journal:
    """The lines of one file. Who opens it holds the partial file's lock. Raises OSError."""

    def __init__(self, path: Path, making: str) -> None:
        """Lines of what is not `making` are not believed, nor is any behind a damaged one."""
        self.path = path
        self.head = making.encode() + b"\n"
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self.descriptor = os.open(path, flags, 0o644)
        size = os.fstat(self.descriptor).st_size
        head, *lines = os.pread(self.descriptor, size, 0).splitlines(keepends=True) or [b""]
        self.found, self.lines = len(lines), 0  # that were there; that stay or came
        self.left: list[tuple[Finished, int]] = []  # not yet asked for, and the bytes of each line
        self.at = len(head) if head == self.head else 0
        with suppress(msgspec.DecodeError):
            for line in lines if self.at else ():
                whole = line.removesuffix(b"\n")
                if whole == line:  # cut in the middle, or just at its end
                    break
                self.left.append((msgspec.json.decode(whole, type=Finished), len(line)))
        self.left.reverse()

    def take(self) -> None:
        """The next line stays."""
        self.lines += 1
        self.at += self.left.pop()[1]

    def add(self, finished: Finished) -> None:
        """A line more; those that were not taken go."""
        self.left = []
        os.ftruncate(self.descriptor, self.at)
        line = (b"" if self.at else self.head) + msgspec.json.encode(finished) + b"\n"
        if os.pwrite(self.descriptor, line, self.at) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.at += len(line)
        self.lines += 1

    def close(self) -> None:
        """Leave it for the next process."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def remove(self) -> None:
        """There is nothing to go on with."""
        if self.descriptor >= 0:
            with suppress(OSError):
                self.path.unlink()
            self.close()
