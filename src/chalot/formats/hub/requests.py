"""Requests to a model hub: byte ranges of files, bounded, resumed when cut, and errors told apart.

It speaks through huggingface_hub's own session, so its proxies, certificates, HF_ENDPOINT, HF_TOKEN
and HF_HUB_OFFLINE hold here too. That session is httpx from version 1 on and requests before.
Neither forwards the token to another host that a file is redirected to.
"""

import logging
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from chalot.errors import (
    FormatError,
    HubAccessError,
    HubBusyError,
    HubError,
    HubNotFoundError,
    HubOfflineError,
)

DELAYS = (1.0, 2.0, 4.0, 8.0)  # seconds before each new attempt; then the error is raised
PROGRESS = 1_000_000  # bytes received since the last cut that make the attempts count anew

TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "http")


class Source(NamedTuple):
    """What is asked for: an address of the hub and the names that errors should speak of."""

    url: str
    repo_id: str
    name: str  # a file of the repository, or "" for its description
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.repo_id}/{self.name}" if self.name else self.repo_id


class _CutError(Exception):
    """The answer ended early, or the hub failed for the moment: worth another attempt."""


def read(source: Source, limit: int) -> bytes:
    """A whole answer of at most `limit` bytes. Raises HubError; FormatError when it is longer."""
    content = bytearray()
    with closing(stream(source)) as pieces:
        for piece in pieces:
            content += piece
            if len(content) > limit:
                raise FormatError(
                    f"{source}: found more than {limit:,} bytes, expected at most that"
                )
    return bytes(content)


def read_range(source: Source, first: int, last: int) -> bytes:
    """Bytes `first:last` of a file, exactly. Raises HubError."""
    return b"".join(stream(source, first, last))


def stream(source: Source, first: int = 0, last: int | None = None) -> Generator[bytes, None, None]:
    """Bytes `first:last` of a file in pieces; to its end, as the hub tells it, without `last`.

    A cut is resumed where it happened, with a Range, after each of DELAYS. Raises HubError.
    """
    position, since_cut, attempts = first, 0, 0
    while last is None or position < last:
        try:
            with closing(_pieces(source, position, last)) as pieces:
                for piece in pieces:
                    position, since_cut = position + len(piece), since_cut + len(piece)
                    yield piece
            if last is None or position == last:
                return
            raise _CutError(f"stream cut at byte {position:,} of {last:,}")
        except (_CutError, HubOfflineError) as error:
            if isinstance(error, HubOfflineError) and position == first:
                raise  # there never was a connection
            attempts = 0 if since_cut >= PROGRESS else attempts
            since_cut = 0
            if attempts == len(DELAYS):
                raise HubError(
                    f"{source}: failed {attempts + 1} times ({error}); what arrived of a file is "
                    "kept: run the command again"
                ) from error
            logging.getLogger(__name__).warning("%s: %s; trying again", source, error)
            time.sleep(DELAYS[attempts])
            attempts += 1


def _pieces(source: Source, first: int, last: int | None) -> Generator[bytes, None, None]:
    """One request. A hub that ignores the Range sends the start too: it is skipped."""
    headers = {"Accept-Encoding": "identity"}
    if first or last is not None:
        headers["Range"] = f"bytes={first}-{'' if last is None else last - 1}"
    with _open(source, headers) as (status, answer, pieces):
        position = 0
        if status == 206:
            position = _first_byte(answer)
            if position != first:
                raise HubError(f"{source}: asked for bytes from {first}, hub sent {position}")
        elif status != 200:
            raise _refusal(source, status, answer)
        while last is None or position < last:
            try:
                piece = next(pieces, None)
            except Exception as error:
                if not _is_transport(error):
                    raise
                raise _CutError(f"stream cut, {_one_line(error)}") from error
            if piece is None:
                return
            start, position = position, position + len(piece)
            wanted = piece[max(first - start, 0) : None if last is None else last - start]
            if wanted:
                yield wanted


@contextmanager
def _open(
    source: Source, headers: dict[str, str]
) -> Iterator[tuple[int, Mapping[str, str], Iterator[bytes]]]:
    """Status, headers and body of an answer, the body not yet read."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    utils: Any = import_module("huggingface_hub.utils")  # its names are not marked as exported
    if constants.HF_HUB_OFFLINE:
        raise HubOfflineError(f"{source}: HF_HUB_OFFLINE is set; unset it to download")
    session: Any = utils.get_session()
    sent = {**utils.build_hf_headers(library_name="chalot"), **headers}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds without a byte
    is_httpx = callable(getattr(session, "stream", None))
    try:
        if is_httpx:
            context = session.stream("GET", source.url, headers=sent, timeout=timeout)
        else:
            context = session.get(source.url, headers=sent, timeout=timeout, stream=True)
        response = context.__enter__()
    except OfflineModeIsEnabled as error:
        raise HubOfflineError(f"{source}: HF_HUB_OFFLINE is set; unset it to download") from error
    except Exception as error:
        if not _is_transport(error):
            raise
        raise HubOfflineError(
            f"{source}: {constants.ENDPOINT} did not answer ({_one_line(error)}); "
            "is there a network? HF_ENDPOINT and HTTPS_PROXY can name another way"
        ) from error
    try:
        body = response.iter_bytes() if is_httpx else response.iter_content(1 << 16)
        yield response.status_code, response.headers, iter(body)
    finally:
        context.__exit__(None, None, None)


def _first_byte(answer: Mapping[str, str]) -> int:
    """The first byte of a partial answer; -1 where its Content-Range cannot be read."""
    unit, _, rest = answer.get("Content-Range", "").partition(" ")
    first = rest.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdecimal() and len(first) < 20 else -1


def _is_transport(error: Exception) -> bool:
    """Whether an exception means the network, in any of the libraries a session may stand on."""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or not modules.isdisjoint(TRANSPORTS)


def _one_line(error: Exception) -> str:
    text = str(error).partition("\n")[0].strip()
    return f"{type(error).__name__}: {text[:150]}" if text else type(error).__name__


def _refusal(source: Source, status: int, answer: Mapping[str, str]) -> Exception:
    """The one clear line for an answer that is not the file."""
    code = answer.get("X-Error-Code", "")
    page = f"https://huggingface.co/{source.repo_id}"
    if code == "GatedRepo" or status == 403:
        return HubAccessError(
            f"{source}: access is gated ({status}); accept the licence at {page}, and set HF_TOKEN "
            "to a token of that account that may read it (https://huggingface.co/settings/tokens)"
        )
    if status == 401 and code != "RepoNotFound":
        return HubAccessError(
            f"{source}: the hub wants to know who asks (401); set HF_TOKEN to a valid token from "
            "https://huggingface.co/settings/tokens, or unset one that has expired"
        )
    if code == "RevisionNotFound":
        return HubNotFoundError(
            f"{source.repo_id}: has no revision {source.revision!r} ({status}); see {page}"
        )
    if code == "EntryNotFound" or (status == 404 and source.name and code != "RepoNotFound"):
        return HubNotFoundError(f"{source}: no such file ({status}); see {page}/tree/main")
    if status in (401, 404):
        return HubNotFoundError(
            f"{source.repo_id}: no such model ({status}), or a private one; check the name at "
            f"{page}, or set HF_TOKEN"
        )
    if status == 429:
        wait = answer.get("Retry-After", "")
        after = f"in {wait} seconds" if wait.isdecimal() and len(wait) < 7 else "later"
        return HubBusyError(
            f"{source}: too many requests (429); try again {after}, or set HF_TOKEN to be allowed "
            "more"
        )
    if status in (408, 500, 502, 503, 504):
        return _CutError(f"the hub answered {status}")
    return HubError(f"{source}: the hub answered {status}, expected 200 or 206; try again later")
