"""Text to learn from: files, folders and patterns, read piece by piece as UTF-8.

A file that a user names must be text. In a folder, and among what a pattern finds, other files are
passed over and counted. Hidden files and links inside a folder are not looked at.
"""

import codecs
import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chalot.errors import FormatError

PIECE = 1 << 16  # bytes; the trainer keeps 256 pieces waiting
LONGEST = 1 << 24  # characters of a piece in which no place to cut is found
# No style of text/styles.py has a word across such a place.
CUT = re.compile(r"\n(?=[A-Za-z])")
PATTERN = re.compile(r"[*?\[]")


@dataclass
class Corpus:
    """Files in the order of their names; counts are complete once `pieces` has ended."""

    named: list[Path]
    found: list[Path]
    files: int = 0
    bytes: int = 0
    skipped: list[Path] = field(default_factory=list)

    def pieces(self) -> Iterator[str]:
        """Texts, none empty. Raises FormatError for a named file that is not text."""
        named = set(self.named)
        for path in sorted(named | set(self.found)):
            if path not in named and not _is_text(path):
                self.skipped.append(path)
                continue
            self.files += 1
            for text, size in _read(path):
                self.bytes += size
                yield text
        if not self.bytes:
            raise FormatError(
                f"found no text in {self.files + len(self.skipped)} files; expected UTF-8 text"
            )


def find(sources: Sequence[str | Path]) -> Corpus:
    """The files that paths and patterns (`docs/**/*.md`) stand for.

    Raises FormatError where one stands for nothing.
    """
    corpus = Corpus([], [])
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            corpus.found += _inside(path)
        elif path.exists():
            corpus.named.append(path.resolve())
        elif PATTERN.search(str(source)):
            matches = [Path(p) for p in glob.glob(str(path), recursive=True)]  # noqa: PTH207
            corpus.found += [p.resolve() for p in matches if p.is_file()]
            if not matches:
                raise FormatError(f"{source}: the pattern finds no file")
        else:
            raise FormatError(f"{source}: there is no such file, folder or pattern")
    if not corpus.named and not corpus.found:
        raise FormatError(f"{', '.join(map(str, sources)) or 'nothing'}: found no files in it")
    return corpus


def _inside(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder.resolve()):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(place, name)
            if not name.startswith(".") and stat.S_ISREG(path.lstat().st_mode):
                yield path


def _is_text(path: Path) -> bool:
    """Whether all of it is UTF-8 without zero bytes."""
    try:
        return all(True for _ in _read(path))
    except FormatError:
        return False


def _read(path: Path) -> Iterator[tuple[str, int]]:
    """(text, bytes read for it) in pieces that end where a word does."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, size, at = "", 0, 0
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FormatError(f"{path}: is not a regular file; expected text")
            while raw := file.read(PIECE):
                if b"\0" in raw:
                    raise FormatError(
                        f"{path}: found a zero byte after byte {at + raw.index(0):,}, expected text"
                    )
                held += decoder.decode(raw)
                size, at = size + len(raw), at + len(raw)
                cut = None
                for cut in CUT.finditer(held, max(0, len(held) - PIECE)):  # noqa: B007
                    pass
                end = cut.end() if cut else len(held) if len(held) > LONGEST else 0
                if end:
                    yield held[:end], size
                    held, size = held[end:], 0
            held += decoder.decode(b"", True)
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}: a byte at or before {at + error.end:,} is not UTF-8; expected UTF-8 text"
        ) from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    if held:
        yield held, size
