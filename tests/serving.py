"""A server of a real model in a thread of this process, and the plainest of clients."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from chalot.load import Model
from chalot.serve.app import make_app, server_of
from chalot.serve.served import Served
from chalot.serve.settings import Settings
from chalot.text.tokenizer import Tokenizer

JSON = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    """A response. `body` is parsed where it is JSON."""

    status: int
    headers: dict[str, str]
    body: Any


class Running:
    """A server that runs; `port` is where."""

    def __init__(self, model: Model, settings: Settings, page: Path | None = None) -> None:
        self.served = Served(model, settings)
        app = make_app(self.served) if page is None else make_app(self.served, page)
        self.server = server_of(app, settings)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port: int = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self.server.serve([self.socket]))

    def __enter__(self) -> "Running":
        self.thread.start()
        until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.socket.close()
        assert not self.thread.is_alive(), "the server did not stop"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        method: str | None = None,
    ) -> Answer:
        """A GET, or a POST where there is a body: bytes, or what becomes JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        verb = method or ("GET" if body is None else "POST")
        try:
            connection.request(
                verb, path, raw, {**(JSON if raw is not None else {}), **(headers or {})}
            )
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        found = {k.lower(): v for k, v in response.getheaders()}
        is_json = found.get("content-type", "").startswith("application/json")
        return Answer(response.status, found, json.loads(content) if is_json else content)

    def good(self, path: str, body: Any = None, **headers: str) -> Any:
        """The body of an answer that went well."""
        found = self.ask(path, body, headers)
        assert found.status == 200, found
        return found.body

    def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream, parsed; [DONE] is left out."""
        text = self.good(path, {**body, "stream": True}).decode()
        found = []
        for block in text.split("\n\n"):
            data = [line[6:] for line in block.split("\n") if line.startswith("data: ")]
            if data and data[0] != "[DONE]":
                found.append(json.loads(data[0]))
        return found

    def raw(self, text: bytes = b"") -> socket.socket:
        """A connection, on which so much was sent."""
        found = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        if text:
            found.sendall(text)
        return found

    @property
    def idle(self) -> bool:
        """Whether nothing runs, and no page is used but by what is kept for later."""
        stats = self.served.scheduler.stats
        at_work = stats.running or stats.waiting
        return not at_work and stats.pages_used == stats.prefix_pages


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.005)


def head(path: str, length: int, *more: str) -> bytes:
    """The head of a POST."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {length}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@contextmanager
def speaking(model: Model, template: str) -> Iterator[None]:
    """The model with another chat template."""
    document = model.file.document
    tokenizer, config = document("tokenizer.json"), document("tokenizer_config.json")
    assert tokenizer is not None and config is not None
    generation = json.loads(document("generation_config.json") or b"{}")
    before = model.tokenizer
    model._tokenizer = Tokenizer.from_documents(tokenizer, json.loads(config), generation, template)
    try:
        yield
    finally:
        model._tokenizer = before
