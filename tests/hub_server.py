"""A stand-in for the model hub on 127.0.0.1: listing, files by range, redirects, and faults.

It answers as the hub does: https://huggingface.co/docs/hub/api, error codes in X-Error-Code, large
files redirected to another host (here "localhost" against "127.0.0.1"), the commit in
X-Repo-Commit. Every request is logged with its range and the bytes that were sent.
"""

import hashlib
import json
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class HeaderOnly(bytes):
    """A file of weights that has its header and its size; the rest reads as zeros."""

    size = 0

    @classmethod
    def of(cls, content: bytes, payload: int) -> "HeaderOnly":
        """A safetensors file's length and header, and so many bytes after them."""
        made = cls(content)
        made.size = len(content) + payload
        return made

    def __len__(self) -> int:
        return self.size


@dataclass
class Fault:
    """What happens to the next `times` requests whose path ends with `suffix`."""

    suffix: str
    status: int = 0  # answer this instead
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # send so many bytes of the body, then close
    reset: bool = False  # close with a reset instead of a clean end
    garble: bool = False  # the right length, other bytes
    ignore_range: bool = False  # send the whole file with 200
    body: bytes | None = None  # send this instead
    times: int = 1


@dataclass
class Logged:
    """A request that was answered."""

    path: str
    range: str | None
    token: str | None
    host: str
    status: int = 0
    sent: int = 0


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A connection that was reset on purpose is no news."""


class HubServer:
    """`with HubServer({"org/name": {"config.json": b"..."}}) as hub:` and use `hub.endpoint`."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.large: set[str] = set()  # names of files that are redirected, as large ones are
        self.faults: list[Fault] = []
        self.log: list[Logged] = []
        self.server = _QuietServer(("127.0.0.1", 0), _handler(self))
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, suffix: str, **what: object) -> None:
        """Let something go wrong with the next request whose path ends with `suffix`."""
        self.faults.append(Fault(suffix, **what))

    def requests(self, suffix: str) -> list[Logged]:
        """The logged requests whose path ends with `suffix`."""
        return [entry for entry in self.log if entry.path.endswith(suffix)]

    def take_fault(self, path: str) -> Fault | None:
        for fault in self.faults:
            if path.endswith(fault.suffix) and fault.times:
                fault.times -= 1
                return fault
        return None

    def listing(self, files: dict[str, bytes]) -> bytes:
        siblings = []
        for name, content in files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"rfilename": name, "size": len(content), "blobId": blob}
            if name in self.large:
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            siblings.append(entry)
        return json.dumps({"id": "x", "sha": COMMIT, "siblings": siblings}).encode()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            host = self.headers["Host"].partition(":")[0]
            token = self.headers["Authorization"]
            entry = Logged(address.path, self.headers["Range"], token, host)
            hub.log.append(entry)
            fault = hub.take_fault(address.path) or Fault("")
            if fault.status:
                self.answer(entry, fault.status, b"<h1>no</h1>", fault.headers, fault)
                return
            parts = [unquote(part) for part in address.path.strip("/").split("/")]
            if parts[:2] == ["api", "models"] and len(parts) == 6:
                self.describe(entry, "/".join(parts[2:4]), parts[5], fault)
            elif parts[2:3] == ["resolve"] and len(parts) >= 5:
                self.resolve(entry, "/".join(parts[:2]), parts[3], "/".join(parts[4:]), fault)
            elif parts[0] == "large":
                name = "/".join(parts[3:])
                content = hub.repositories["/".join(parts[1:3])][name]
                self.answer(entry, 200, content, fault.headers, fault)
            else:
                self.answer(entry, 404, b"", {}, fault)

        def describe(self, entry: Logged, repo: str, revision: str, fault: Fault) -> None:
            if repo not in hub.repositories:
                self.answer(entry, 401, b"", {"X-Error-Code": "RepoNotFound"}, fault)
            elif revision not in ("main", "v1", COMMIT):
                self.answer(entry, 404, b"", {"X-Error-Code": "RevisionNotFound"}, fault)
            else:
                self.answer(entry, 200, hub.listing(hub.repositories[repo]), {}, fault)

        def resolve(self, entry: Logged, repo: str, revision: str, name: str, fault: Fault) -> None:
            content = hub.repositories.get(repo, {}).get(name)
            headers = {"X-Repo-Commit": COMMIT}
            if content is None or revision not in ("main", "v1", COMMIT):
                self.answer(entry, 404, b"", {"X-Error-Code": "EntryNotFound"}, fault)
            elif name in hub.large:
                place = f"http://localhost:{hub.port}/large/{repo}/{name}?signed=1"
                self.answer(entry, 302, b"", {**headers, "Location": place}, fault)
            else:
                self.answer(entry, 200, content, headers, fault)

        def answer(
            self, entry: Logged, status: int, content: bytes, headers: dict[str, str], fault: Fault
        ) -> None:
            body = content if fault.body is None else fault.body
            if fault.garble:
                body = bytes(byte ^ 255 for byte in body)
            etag = hashlib.sha256(content).hexdigest()
            if entry.range and status == 200 and not fault.ignore_range:
                first, _, last = entry.range.removeprefix("bytes=").partition("-")
                end = min(int(last) + 1 if last else len(body), len(body))
                status = 206
                headers = {**headers, "Content-Range": f"bytes {first}-{end - 1}/{len(body)}"}
                body = body[int(first) : end]
            entry.status = status
            self.send_response(status)
            for key, value in {**headers, "ETag": f'"{etag}"'}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            part = body if fault.cut_after is None else body[: fault.cut_after]
            with suppress(OSError):  # the client has heard enough
                for start in range(0, len(part), 1 << 16):
                    piece = part[start : start + (1 << 16)]
                    entry.sent += len(piece)  # before the client can have seen it
                    self.wfile.write(piece)
            if fault.cut_after is not None:
                self.cut(fault)

        def cut(self, fault: Fault) -> None:
            self.close_connection = True
            if fault.reset:
                # linger on, for 0 seconds: the kernel sends a reset instead of what is queued
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()

    return Handler
