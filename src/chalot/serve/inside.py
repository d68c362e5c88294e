"""A request through the whole server, without a network: what `chalot replay` compares with."""

import asyncio
import json
from typing import Any

from chalot.errors import FormatError
from chalot.load import Model
from chalot.serve.app import make_app
from chalot.serve.served import Served
from chalot.serve.settings import Settings


async def answer(model: Model, path: str, body: dict[str, Any], name: str) -> Any:
    """The body of the answer to a POST. Raises FormatError where the server refuses it."""
    app = make_app(Served(model, Settings(name=name)))
    sent: list[dict[str, Any]] = []
    asked = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not asked:  # the client stays for the answer
            await asyncio.Event().wait()
        return asked.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:8080"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8080),
    }
    async with app.router.lifespan_context(app):
        await app(scope, receive, send)
    status = next(m["status"] for m in sent if m["type"] == "http.response.start")
    raw = b"".join(m.get("body", b"") for m in sent)
    if status != 200:
        raise FormatError(f"request: the server refuses it ({status}): {raw[:300].decode()}")
    return json.loads(raw)
