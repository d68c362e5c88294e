"""What is sent back: JSON, or server-sent events as they come; and who has left meanwhile.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Result = TypeVar("Result")
WAITING = b": waiting\n\n"  # a comment: keeps proxies from closing a quiet stream
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody is there to be answered."""


def as_json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON document."""
    return Response(
        msgspec.json.encode(value),
        status,
        {**(headers or {})},
        media_type="application/json",
    )


def event(value: object, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(value) + b"\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: "asyncio.Future[Result]") -> Result:
    """The result of work, which is cancelled when the client leaves. Raises ClientGone then."""
    gone = asyncio.ensure_future(_gone(receive))
    try:
        waits: set[asyncio.Future[Any]] = {gone, work}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return work.result()
    finally:
        await _end(gone, work)


async def _end(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


class EventStream:
    """A response made of chunks; closed, with what makes them, when the client leaves."""

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], quiet: float, headers: Mapping[str, str]
    ) -> None:
        self.chunks, self.quiet = chunks, quiet
        self.sent = 0  # chunks
        self.left = False  # the client
        self.headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "x-accel-buffering": "no",  # nginx would hold events back
            **headers,
        }

    async def _watch(self, receive: Receive, task: "asyncio.Task[Any]") -> None:
        await _gone(receive)
        self.left = True
        task.cancel()

    async def _keep_open(self, send: Send) -> None:
        while True:
            before = self.sent
            await asyncio.sleep(self.quiet)
            if self.sent == before:
                await send({"type": "http.response.body", "body": WAITING, "more_body": True})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in self.headers.items()]
        task = asyncio.current_task()
        assert task is not None
        beside = [
            asyncio.ensure_future(self._watch(receive, task)),
            asyncio.ensure_future(self._keep_open(send)),
        ]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for chunk in self.chunks:
                self.sent += 1
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            for one in beside:  # before the end, which looks like a client that leaves
                one.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not self.left:
                raise
            task.uncancel()
        finally:
            await _end(*beside)
            await self.chunks.aclose()
