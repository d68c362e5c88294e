"""One HTTP request and its answer: the body within its limits, faults as JSON, work that stops."""

import asyncio
import logging
import re
import secrets
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from chalot.errors import ChalotError
from chalot.serve.answers import Answers, Delta, Mailbox
from chalot.serve.events import ClientGone, EventStream, as_json, event, while_connected
from chalot.serve.faults import Fault, fault_of
from chalot.serve.jobs import Job
from chalot.serve.metrics import Metrics
from chalot.serve.served import Served
from chalot.serve.settings import Settings

Body = TypeVar("Body")
Result = TypeVar("Result")
LOG = logging.getLogger("chalot.serve")
NAMED = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAMED_EVENTS = ("/v1/messages", "/v1/responses")
GONE = Response(status_code=499)  # nobody reads it


class Server:
    """What all requests share."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.settings: Settings = served.settings
        self.metrics = Metrics(served)
        self.threads = ThreadPoolExecutor(2, "chalot-text")  # tokenizers, templates, grammars
        self.preparing = 0
        self.running: dict[tuple[bytes, str], Answers] = {}  # namespace, id
        self.embedding = asyncio.Lock()  # one text at a time
        self.draining = False

    @cached_property
    def mailbox(self) -> Mailbox:
        """Made within the event loop."""
        return Mailbox()

    def drain(self, now: bool) -> None:
        """The server stops: answers end by themselves, or `now`."""
        self.draining = True
        for answers in list(self.running.values()) if now else ():
            answers.cancel()


class Exchange:
    """See module. `handle` does what is the same for every route."""

    def __init__(self, server: Server, request: Request) -> None:
        self.server, self.request = server, request
        self.served, self.metrics = server.served, server.metrics
        self.namespace: bytes = request.scope.get("state", {}).get("namespace", b"")
        given = request.headers.get("x-request-id", "")
        self.id = given if NAMED.fullmatch(given) else secrets.token_hex(12)

    async def body(self, shape: type[Body]) -> Body:
        """The body as `shape`. Raises Fault."""
        kind = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Fault(f"found content type {kind[:60]!r}, expected application/json", 415)
        most = self.server.settings.body_bytes
        length = self.request.headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > most:
            raise Fault(f"found a body of {length[:20]} bytes, expected at most {most:,}", 413)
        raw = bytearray()
        try:
            async with asyncio.timeout(self.server.settings.body_seconds):
                async for part in self.request.stream():
                    raw += part
                    if len(raw) > most:
                        raise Fault(f"found a body of over {most:,} bytes, expected less", 413)
        except TimeoutError:
            seconds = self.server.settings.body_seconds
            raise Fault(f"the body did not arrive within {seconds:g} seconds", 408) from None
        return decode(bytes(raw), shape)

    async def prepared(self, work: Callable[[], Result]) -> Result:
        """What a thread makes of text: tokenizers, templates and grammars take their time.

        Raises Fault 429 where too much is waiting.
        """
        server = self.server
        if server.preparing >= server.settings.queue + server.settings.slots:
            raise Fault("the server is busy; try again", 429, code="queue_full", retry_after=1)
        server.preparing += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(server.threads, work)
        finally:
            server.preparing -= 1

    # ---- answers

    async def begin(self, make: Callable[[], Job], name: str) -> Answers:
        """Answers that are under way, to be cancelled by `name`."""
        job = await self.prepared(make)
        answers = Answers(self.served, job, self.metrics, self.server.mailbox)
        answers.start()
        names = {(self.namespace, name), (self.namespace, self.id)}
        self.server.running.update(dict.fromkeys(names, answers))
        answers.names = names
        return answers

    async def deltas(self, answers: Answers) -> AsyncGenerator[tuple[int, Delta], None]:
        """What the answers get, until the end, or until they are not wanted any more."""
        try:
            async for found in answers.deltas():
                yield found
        finally:
            answers.cancel()
            for name in answers.names:
                self.server.running.pop(name, None)

    async def gathered(self, answers: Answers) -> list[list[Delta]]:
        """All that each answer got. Raises ClientGone, Fault."""

        async def gather() -> list[list[Delta]]:
            found: list[list[Delta]] = [[] for _ in answers.answers]
            async for index, delta in self.deltas(answers):
                found[index].append(delta)
            return found

        work = asyncio.ensure_future(gather())
        return await while_connected(self.request.receive, work)

    def stream(self, chunks: AsyncIterator[bytes]) -> EventStream:
        """Chunks as a response; a fault on the way is the last event."""
        path = self.request.url.path

        async def guarded() -> AsyncGenerator[bytes, None]:
            try:
                async for chunk in chunks:
                    yield chunk
            except Exception as error:
                fault = noted(error)
                yield event(fault.body(path), "error" if path in NAMED_EVENTS else None)
            finally:
                if isinstance(chunks, AsyncGenerator):
                    await chunks.aclose()

        return EventStream(guarded(), self.server.settings.quiet_seconds, {"x-request-id": self.id})


Handler = Callable[[Exchange], Awaitable[Any]]


def decode(raw: bytes, shape: type[Body]) -> Body:
    """JSON as `shape`. Raises Fault that names the place."""
    try:
        return msgspec.json.decode(raw, type=shape)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `")
        param = place.rstrip("`").removeprefix("$").lstrip(".") or None
        where = f"{param}: " if param else ""
        raise Fault(
            f"{where}{message[:300]}; /openapi.json describes what is expected", param=param
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Fault(f"the body is not JSON in UTF-8: {str(error)[:200]}") from None


def noted(error: Exception) -> Fault:
    """The fault of an error; what should not have happened is logged, without what it was about."""
    fault = fault_of(error)
    if not isinstance(error, ChalotError):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        LOG.error("%s at %s:%s", type(error).__name__, frame.filename, frame.lineno)
    return fault


def endpoint(server: Server, path: str, handler: Handler) -> Callable[[Request], Awaitable[Any]]:
    """A route's function: `handler`, with its faults as responses."""

    async def answer(request: Request) -> Any:
        request.scope["route_path"] = path  # for the metrics, which bound their labels
        exchange = Exchange(server, request)
        try:
            response = await handler(exchange)
        except (ClientGone, ClientDisconnect):
            return GONE
        except Exception as error:
            fault = noted(error)
            headers = dict(fault.headers)
            if fault.status in (408, 413, 415):  # what is left of the body is not read
                headers["connection"] = "close"
            response = as_json(fault.body(request.url.path), fault.status, headers)
        if isinstance(response, Response):
            response.headers.setdefault("x-request-id", exchange.id)
        return response

    return answer
