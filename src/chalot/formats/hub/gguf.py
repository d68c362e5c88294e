"""GGUF files of the hub, ORG/NAME/FILE.gguf: which there are, their parts, their headers by ranges.

A header is copied into an empty file of the whole one's length, and then read as from disk.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from chalot.errors import ChalotError, HubNotFoundError, OutputError
from chalot.formats.checkpoint import TensorInfo
from chalot.formats.documents import DOCUMENTS
from chalot.formats.hub.cache import PART, RemoteFile, part_names
from chalot.formats.hub.requests import Source, read_range

SUFFIX = ".gguf"
WORD = r"[A-Za-z0-9_][\w.+-]{0,200}"
FILE = re.compile(rf"([A-Za-z0-9][\w.-]{{0,95}}/{WORD})/((?:{WORD}/){{0,3}}{WORD}\.gguf)", re.ASCII)
SHOWN = 12  # files that a message names
READ = 1 << 20  # largest tensor that a configuration is made of

Files = Mapping[str, RemoteFile]


def split(text: str) -> tuple[str, str] | None:
    """(ORG/NAME, FILE) of ORG/NAME/FILE.gguf, where FILE may be in folders; None for all else.

    A path whose folder exists is a path.
    """
    found = FILE.fullmatch(text)
    if found is None or ".." in text or Path(text).parent.exists():
        return None
    return found[1], found[2]


def parts(repo_id: str, name: str, files: Files) -> list[RemoteFile]:
    """The named file, and all others that it is split into. Raises HubNotFoundError."""
    names = part_names(name)
    for wanted in names:
        if wanted not in files:
            raise HubNotFoundError(
                f"{repo_id}: has no file {wanted}; {choices(repo_id, files) or 'nor any GGUF file'}"
            )
    return [files[wanted] for wanted in names]


def choices(repo_id: str, files: Files) -> str:
    """The GGUF files of a repository, as a user would name them; "" if there are none."""
    found = []
    for name in sorted(n for n in files if n.endswith(SUFFIX)):
        pattern = PART.fullmatch(name)
        if (pattern is None or int(pattern[2]) == 1) and split(f"{repo_id}/{name}"):
            count = 1 if pattern is None else int(pattern[3])
            size = f"{files[name].size / 1e9:.2f} GB" + (f" x {count}" if count > 1 else "")
            found.append(f"{repo_id}/{name} ({size})")
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"its GGUF files: {', '.join(found[:SHOWN])}{more}" if found else ""


def header(
    files: list[RemoteFile], source: Callable[[str], Source]
) -> tuple[dict[str, TensorInfo], dict[str, bytes]]:
    """(tensors, documents) of a model in one file, or in parts, without its weights.

    Raises HubError, FormatError, UnsupportedError.
    """
    from chalot.formats.gguf import GgufFile
    from chalot.formats.one_by_one import listed

    with TemporaryDirectory(prefix="chalot-") as folder:
        paths = [Path(folder) / Path(file.name).name for file in files]
        try:
            for path, file in zip(paths, files, strict=True):
                _copy_header(path, file.size, source(file.name))
            with GgufFile(paths[0]) as opened:
                documents = {n: d for n in DOCUMENTS if (d := opened.document(n)) is not None}
                return dict(listed(opened.tensors, paths[0])), documents
        except ChalotError as error:
            place = str(source(files[0].name)).removesuffix(paths[0].name)
            raise type(error)(str(error).replace(f"{folder}/", place)) from error
        except OSError as error:
            raise OutputError(
                f"{folder}: a header cannot be kept there ({error.strerror}); set TMPDIR"
            ) from error


def _copy_header(path: Path, size: int, source: Source) -> None:
    """A file of `size` bytes, empty but for its header and what a configuration is made of."""
    from chalot.formats.gguf.header import parse_header
    from chalot.formats.gguf.names import COMPUTED

    with path.open("wb") as copy:
        copy.truncate(size)

        def read(offset: int, count: int) -> bytes:
            content = read_range(source, offset, offset + count)
            copy.seek(offset)
            copy.write(content)
            return content

        for name, tensor in parse_header(read, size, source).tensors.items():
            if name in COMPUTED and tensor.nbytes <= READ:
                read(tensor.begin, tensor.nbytes)
