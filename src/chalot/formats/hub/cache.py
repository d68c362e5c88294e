"""huggingface_hub's cache on disk: files fetched into it, resumed, checked, and found again.

Layout, shared with every other tool (https://huggingface.co/docs/huggingface_hub/guides/manage-cache):

    HF_HUB_CACHE/models--ORG--NAME/
        blobs/HASH                 a file's bytes; HASH.incomplete while they arrive
        snapshots/COMMIT/FILE      a link to its blob
        refs/REVISION              the commit that a branch or tag was at

A hash is SHA-256 of the content for large files (64 digits), git's SHA-1 for small ones (40).
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from chalot.errors import ChalotError, HubError, LimitError, OutputError
from chalot.formats.documents import read_document
from chalot.formats.files import whole_file
from chalot.formats.hub.requests import Source, stream
from chalot.formats.safetensors.header import INDEX, parse_index, weight_files

try:
    import fcntl
except ImportError:  # Windows: no lock, a download that runs twice is checked at its end
    fcntl = None  # type: ignore[assignment]

SPARE_DISK = 100_000_000  # bytes that a download leaves free

PART = re.compile(r"(.+-)(\d{5})-of-(\d{5})\.gguf", re.ASCII)

Progress = Callable[[int, int], None]  # (bytes that are there, bytes in all)


class RemoteFile(NamedTuple):
    """A file as the hub lists it."""

    name: str
    size: int
    hash: str


def is_hash(text: Any) -> TypeGuard[str]:
    """Whether this is a commit's or a file's hash: 40 or 64 hexadecimal digits."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", text) is not None


def part_names(name: str) -> list[str]:
    """All parts of NAME-00001-of-00003.gguf, in order; of a file that is not split, itself."""
    found = PART.fullmatch(name)
    if found is None:
        return [name]
    return [f"{found[1]}{n + 1:05}-of-{found[3]}.gguf" for n in range(int(found[3]))]


def cache_folder() -> Path:
    """Where the hub's files are kept (HF_HOME, HF_HUB_CACHE). It may not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def downloaded() -> list[tuple[str, Path]]:
    """(name, place) of every model that the cache holds whole, by name.

    A repository's id and its folder, or ORG/NAME/FILE.gguf and that file, the first of its parts.
    """
    found = []
    for path in sorted(cache_folder().glob("models--*")):
        repo_id = path.name.removeprefix("models--").replace("--", "/")
        repository = Repository(repo_id)
        folder = repository.find("main")
        if folder is not None:
            found.append((repo_id, folder))
        found += [(f"{repo_id}/{file}", place) for file, place in repository.gguf_files("main")]
    return found


class Repository:
    """The cache's directory of one repository."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id
        self.path = cache_folder() / f"models--{repo_id.replace('/', '--')}"
        self.blobs = self.path / "blobs"

    def find(self, revision: str, file: str | None = None) -> Path | None:
        """A snapshot with configuration and all weights that an earlier download left, if any.

        With `file`, a .gguf, that file: if all its parts are there.
        """
        folder = self._snapshot(revision)
        if folder is None:
            return None
        if file is not None:
            return (
                folder / file
                if all((folder / part).exists() for part in part_names(file))
                else None
            )
        try:
            names = [entry.name for entry in folder.iterdir() if entry.exists()]
            wanted = weight_files(names, folder)
            if not wanted:
                index = read_document(folder, INDEX) or b""
                wanted = [*parse_index(index, folder / INDEX).values()]
        except (OSError, ChalotError):
            return None
        return folder if {"config.json", *wanted} <= set(names) else None

    def gguf_files(self, revision: str) -> list[tuple[str, Path]]:
        """(name, place) of each whole GGUF file of a snapshot; of a split one the first part."""
        folder = self._snapshot(revision)
        found = [] if folder is None else sorted(folder.rglob("*.gguf"))
        names = [(path.relative_to(folder or path).as_posix(), path) for path in found]
        return [
            (name, path)
            for name, path in names
            if name == part_names(name)[0] and self.find(revision, name) is not None
        ]

    def _snapshot(self, revision: str) -> Path | None:
        """The folder of a commit, branch or tag; it may not be there."""
        commit = revision
        if not is_hash(commit):
            with suppress(OSError, UnicodeDecodeError):
                commit = (self.path / "refs" / revision).read_text("ascii").strip()
        return self.path / "snapshots" / commit if is_hash(commit) else None

    def download(
        self,
        files: list[tuple[RemoteFile, Source]],
        commit: str,
        revision: str,
        progress: Progress | None,
    ) -> Path:
        """Bring every file into the snapshot of `commit`, and return that folder.

        Raises HubError and its kinds, LimitError (free disk), OutputError (not writable, full).
        """
        snapshot = self.path / "snapshots" / commit
        try:
            self.blobs.mkdir(parents=True, exist_ok=True)
            snapshot.mkdir(parents=True, exist_ok=True)
            missing = [pair for pair in files if not _is_there(snapshot / pair[0].name, pair[0])]
            self._check_disk([file for file, _ in missing])
            total = sum(file.size for file, _ in files)
            done = total - sum(file.size for file, _ in missing)
            for file, source in missing:
                for arrived in self._blob(file, source):
                    if progress:
                        progress(done + arrived, total)
                (snapshot / file.name).parent.mkdir(parents=True, exist_ok=True)
                _link(self.blobs / file.hash, snapshot / file.name)
                done += file.size
            if revision != commit:
                reference = self.path / "refs" / revision
                reference.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(reference) as output:
                    output.write(commit.encode())
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror or error}); make room, or set "
                "HF_HOME to another place. What arrived is kept"
            ) from error
        return snapshot

    def _check_disk(self, missing: list[RemoteFile]) -> None:
        needed = 0
        for file in missing:
            if not _is_there(self.blobs / file.hash, file):
                part = self.blobs / f"{file.hash}.incomplete"
                with suppress(OSError):
                    needed -= min(part.stat().st_size, file.size)
                needed += file.size
        free = shutil.disk_usage(self.blobs).free
        if needed and needed + SPARE_DISK > free:
            raise LimitError(
                f"{self.repo_id}: needs {needed / 1e9:.2f} GB more in {self.path}, and "
                f"{free / 1e9:.2f} GB are free; make room, or set HF_HOME to another disk"
            )

    def _blob(self, file: RemoteFile, source: Source) -> Iterator[int]:
        """Fetch one blob, from where an earlier attempt ended; yields the bytes that are there."""
        blob, part = self.blobs / file.hash, self.blobs / f"{file.hash}.incomplete"
        if _is_there(blob, file):
            return
        with part.open("ab+") as output:
            try:
                if fcntl is not None:
                    fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HubError(
                    f"{source}: another process is downloading it; wait for that one to end"
                ) from None
            if _is_there(blob, file):  # the other process has just ended
                return
            digest = _new_digest(file)
            position = output.seek(0, os.SEEK_END)
            if position > file.size:
                position = output.truncate(0)
            output.seek(0)
            while piece := output.read(1 << 20):
                digest.update(piece)
            for piece in stream(source, position, file.size):
                output.write(piece)
                digest.update(piece)
                position += len(piece)
                yield position
            output.flush()
            os.fsync(output.fileno())
            if digest.hexdigest() != file.hash:
                output.truncate(0)
                raise HubError(
                    f"{source}: content has hash {digest.hexdigest()}, hub lists {file.hash}; "
                    "damaged on the way and discarded: run the command again"
                )
            part.replace(blob)


def _is_there(path: Path, file: RemoteFile) -> bool:
    try:
        return path.stat().st_size == file.size
    except OSError:
        return False


def _new_digest(file: RemoteFile) -> "hashlib._Hash":
    """SHA-256, or SHA-1 as git computes it: over "blob SIZE", a zero byte, and the content."""
    if len(file.hash) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _link(blob: Path, place: Path) -> None:
    """Put a blob into a snapshot; on a file system without links, move it there."""
    with suppress(FileNotFoundError):
        place.unlink()
    try:
        place.symlink_to(os.path.relpath(blob, place.parent))
    except OSError:
        blob.replace(place)
