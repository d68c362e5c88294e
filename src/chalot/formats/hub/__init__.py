"""Models of the Hugging Face hub: what they hold, before any download; and their files.

The download is chalot's own (cache.py), not huggingface_hub's snapshot_download: that one
throws a part away when it fails, so that the next run begins anew, ends at a reset connection, and
waits as long as the hub says (429). Each file is checked against the hash that the hub lists, is
asked for at one commit, and pickles are never fetched.
"""

import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from chalot.errors import FormatError, HubBusyError, HubError, HubOfflineError
from chalot.formats.checkpoint import TensorInfo
from chalot.formats.documents import DOCUMENTS, parse_json
from chalot.formats.files import check_plain_name, quoted
from chalot.formats.hub import gguf as hub_gguf
from chalot.formats.hub.cache import Progress, RemoteFile, Repository, is_hash
from chalot.formats.hub.requests import Source, read, read_range
from chalot.formats.safetensors.header import (
    INDEX,
    Extent,
    header_length,
    merge,
    parse_header,
    parse_index,
    weight_files,
)

MAX_LISTING = 32_000_000  # bytes of JSON about a repository
MAX_REMOTE_HEADER = 16_000_000  # bytes; 120,000 tensors in one file
WORKERS = 4  # headers read at a time

WEIGHTS = (".safetensors", hub_gguf.SUFFIX)  # files that are fetched
FILE_SUFFIXES = (".myai", ".gguf", ".safetensors", ".npz", ".json", ".bin")


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    repo_id: str
    revision: str
    commit: str
    files: Mapping[str, RemoteFile]

    def source(self, name: str) -> Source:
        """Where to ask for a file; at the commit, so that all files belong together."""
        from huggingface_hub import constants

        url = f"{constants.ENDPOINT}/{self.repo_id}/resolve/{self.commit}/{quote(name)}"
        return Source(url, self.repo_id, name, self.revision)

    def document(self, name: str) -> bytes | None:
        """A document's content, if it is there. Raises HubError, FormatError (too large)."""
        if name not in self.files:
            return None
        if self.files[name].size > DOCUMENTS[name]:
            raise FormatError(
                f"{self.repo_id}/{name}: has {self.files[name].size:,} bytes, "
                f"expected at most {DOCUMENTS[name]:,}"
            )
        return read(self.source(name), DOCUMENTS[name])

    def weights(self) -> tuple[list[str], dict[str, str]]:
        """The files of weights to read, and the index over them or {}."""
        choices = hub_gguf.choices(self.repo_id, self.files)
        if choices and not any(name.endswith((".safetensors", INDEX)) for name in self.files):
            raise FormatError(f"{self.repo_id}: holds no *.safetensors; name one of {choices}")
        names = weight_files(list(self.files), self.repo_id)
        if names:
            return [check_plain_name(name, self.repo_id) for name in names], {}
        promised = parse_index(self.document(INDEX) or b"", f"{self.repo_id}/{INDEX}")
        names = sorted(set(promised.values()))
        for name in names:
            if name not in self.files:
                raise FormatError(f"{self.repo_id}/{INDEX}: names {name}, which is not there")
        return names, promised


@dataclass(frozen=True)
class RemoteCheckpoint:
    """What can be known of a model without its weights. `weight_bytes` are those of their files,
    `document_bytes` those of documents: a GGUF file's are in it, and made of its metadata.
    """

    repo_id: str
    commit: str
    tensors: Mapping[str, TensorInfo]
    weight_bytes: int
    download_bytes: int
    document_bytes: int
    _document: Callable[[str], bytes | None] = field(repr=False)

    def document(self, name: str) -> bytes | None:
        """A small file ("config.json", ...), fetched when asked for; None if there is none."""
        return self._document(name)


def is_hub_id(text: str) -> bool:
    """Whether this reads as ORG/NAME of the hub, and is no path that exists nor a file's name."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", text, re.ASCII)
        is not None
        and ".." not in text
        and "--" not in text
        and not text.endswith(FILE_SUFFIXES)
        and not Path(text).exists()
    )


def is_name(text: str) -> bool:
    """Whether this reads as a model of the hub: ORG/NAME, or ORG/NAME/FILE.gguf."""
    return is_hub_id(text) or hub_gguf.split(text) is not None


def kept(name: str, revision: str | None = None) -> Path | None:
    """The folder or file of what `fetch` of this name has brought here earlier, if it is whole."""
    repo_id, file = hub_gguf.split(name) or (name, None)
    return Repository(repo_id).find(revision or "main", file)


def headers(name: str, revision: str | None = None) -> RemoteCheckpoint:
    """Tensors and sizes of a model on the hub, by ranges of its headers: no weight is transferred.

    `name` is ORG/NAME, or ORG/NAME/FILE.gguf. Raises HubError and its kinds, and FormatError or
    UnsupportedError as a folder's reader does.
    """
    repo_id, file = hub_gguf.split(name) or (name, None)
    listing = _list(repo_id, revision)
    if file is not None:
        wanted = hub_gguf.parts(repo_id, file, listing.files)
        tensors, held = hub_gguf.header(wanted, listing.source)
        total = sum(part.size for part in wanted)
        made = sum(map(len, held.values()))
        return RemoteCheckpoint(name, listing.commit, tensors, total, total, made, held.get)
    names, promised = listing.weights()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            extents = list(pool.map(lambda name: _extents(listing, name), names))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    shards = dict(zip(names, extents, strict=True))
    places = merge(shards, promised, repo_id)
    weight_bytes = sum(listing.files[name].size for name in names)
    documents = sum(file.size for file in listing.files.values() if file.name in DOCUMENTS)
    return RemoteCheckpoint(
        repo_id,
        listing.commit,
        {tensor: shards[file][tensor].info for tensor, file in places.items()},
        weight_bytes,
        weight_bytes + documents,
        documents,
        listing.document,
    )


def documents(name: str, revision: str | None = None) -> RemoteCheckpoint | Listing:
    """What gives a model's documents, its tokenizer among them; weights need not be there.

    Raises HubError and its kinds, FormatError where only a GGUF file could have a tokenizer.
    """
    if hub_gguf.split(name) is not None:
        return headers(name, revision)
    listing = _list(name, revision)
    if "tokenizer.json" not in listing.files:
        listing.weights()
    return listing


def fetch(name: str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """A folder with a model's configuration, tokenizer and safetensors, downloaded where needed.

    Of ORG/NAME/FILE.gguf that file, with its other parts beside it. Resumes what an earlier run
    began. Without a network, a complete older copy is used, with a warning. Raises HubError and its
    kinds, LimitError (disk), OutputError (cache not writable).
    """
    repo_id, file = hub_gguf.split(name) or (name, None)
    repository = Repository(repo_id)
    try:
        listing = _list(repo_id, revision)
    except (HubOfflineError, HubBusyError) as error:
        found = kept(name, revision)
        if found is None:
            raise
        logging.getLogger(__name__).warning("%s; using the copy in %s", error, found)
        return found
    if file is not None:
        wanted = hub_gguf.parts(repo_id, file, listing.files)
        pairs = [(part, listing.source(part.name)) for part in wanted]
        folder = repository.download(pairs, listing.commit, listing.revision, progress)
        return folder / file
    names, _ = listing.weights()
    if "config.json" not in listing.files:
        raise FormatError(f"{repo_id}: has no config.json; expected a model in transformers' form")
    names = [name for name in DOCUMENTS if name in listing.files] + names
    files = [(listing.files[name], listing.source(name)) for name in names]
    return repository.download(files, listing.commit, listing.revision, progress)


def _list(repo_id: str, revision: str | None) -> Listing:
    """Ask the hub which files there are."""
    from huggingface_hub import constants

    wanted = revision or "main"
    if re.fullmatch(r"\w[\w.-]*(/[\w-][\w.-]*)*", wanted, re.ASCII) is None or ".." in wanted:
        raise HubError(f"{repo_id}: {wanted!r} is no revision; expected a branch, tag or commit")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII) is None or ".." in repo_id:
        raise HubError(f"{repo_id!r} is no repository of the hub; expected ORG/NAME")
    path = f"{repo_id}/revision/{quote(wanted, safe='')}"
    url = f"{constants.ENDPOINT}/api/models/{path}?blobs=true"
    answer = parse_json(read(Source(url, repo_id, "", wanted), MAX_LISTING), repo_id)
    entries = answer.get("siblings") if isinstance(answer, dict) else None
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(entries, list) or not is_hash(commit):
        raise HubError(f"{repo_id}: {constants.ENDPOINT} lists no files; is it a Hugging Face hub?")
    files = (_remote_file(repo_id, entry) for entry in entries)
    return Listing(repo_id, wanted, commit, {file.name: file for file in files})


def _remote_file(repo_id: str, entry: Any) -> RemoteFile:
    """One entry of a listing; checked where it may be fetched, a name only where it may not."""
    name = entry.get("rfilename") if isinstance(entry, dict) else None
    if isinstance(name, str) and name not in DOCUMENTS and not name.endswith(WEIGHTS):
        return RemoteFile(name, 0, "")
    if isinstance(name, str):
        large, size = entry.get("lfs"), entry.get("size")
        content = large.get("sha256") if isinstance(large, dict) else entry.get("blobId")
        if type(size) is int and 0 <= size < 1 << 63 and is_hash(content):
            return RemoteFile(name, size, content)
    raise HubError(
        f"{repo_id}: the hub gives no size and hash for {quoted(name)}; download it with "
        "`hf download` and pass the folder"
    )


def _extents(listing: Listing, name: str) -> dict[str, Extent]:
    """A remote safetensors file's header, in two requests: its length, then just it."""
    size, where = listing.files[name].size, f"{listing.repo_id}/{name}"
    length = header_length(read_range(listing.source(name), 0, min(8, size)), size, where)
    if length > MAX_REMOTE_HEADER:
        raise FormatError(f"{where}: header of {length:,} bytes, expected {MAX_REMOTE_HEADER:,}")
    return parse_header(read_range(listing.source(name), 8, 8 + length), size - 8 - length, where)
