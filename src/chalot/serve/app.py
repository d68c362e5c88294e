"""The application: routes, and what stands before them; and the process that serves it."""

import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from chalot.errors import OutputError
from chalot.load import Model
from chalot.serve import chat, completions, embeddings, information, messages, responses
from chalot.serve.connection import Drained, connection_of
from chalot.serve.events import as_json
from chalot.serve.exchange import Handler, Server, endpoint
from chalot.serve.faults import Fault
from chalot.serve.guard import Guard
from chalot.serve.served import Served
from chalot.serve.settings import Settings

PAGE = Path(__file__).parent / "page"
TYPES = {  # of the page's files; others are not served
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webmanifest": "application/manifest+json",
}
ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/chat/completions", chat.handle),
    ("POST", "/v1/completions", completions.handle),
    ("POST", "/v1/responses", responses.handle),
    ("POST", "/v1/messages", messages.handle),
    ("POST", "/v1/messages/count_tokens", messages.count),
    ("POST", "/v1/embeddings", embeddings.handle),
    ("GET", "/v1/models", information.models),
    ("GET", "/v1/models/{name:path}", information.model),
    ("POST", "/v1/cancel/{id}", information.cancel),
    ("POST", "/tokenize", information.tokenize),
    ("POST", "/detokenize", information.detokenize),
    ("GET", "/tokenizer_info", information.tokenizer_info),
    ("GET", "/health", information.health),
    ("GET", "/ready", information.ready),
    ("GET", "/metrics", information.metrics),
    ("GET", "/openapi.json", information.description),
)


def page_routes(folder: Path) -> list[Route]:
    """The chat page: every file of its folder at its own path, index.html at / too."""

    def sends(path: Path) -> Callable[[Request], Any]:
        async def send(_: Request) -> Response:
            return FileResponse(path, media_type=TYPES[path.suffix])

        return send

    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix in TYPES]
    found = [Route(f"/{p.relative_to(folder).as_posix()}", sends(p)) for p in files]
    index = folder / "index.html"
    if index.is_file():
        return [Route("/", sends(index)), *found]

    async def none(_: Request) -> Response:
        return PlainTextResponse("This server has no chat page; its API is at /v1.\n", 404)

    return [Route("/", none)]


async def refused(request: Request, error: Exception) -> Response:
    """A path or method that there is not."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = f"{request.method} {request.url.path[:200]}"
    message = f"found {what}, expected a path of /openapi.json with its method"
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    fault = Fault(message, status, code="not_found" if status == 404 else None)
    return as_json(fault.body(request.url.path), status, headers)


def make_app(served: Served, page: Path = PAGE) -> Starlette:
    """The application around a model. Its lifespan starts and stops the worker."""
    server, settings = Server(served), served.settings
    routes = [Route(p, endpoint(server, p, h), methods=[m]) for m, p, h in ROUTES]
    pages = page_routes(page)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        served.start()
        yield
        served.stop()
        server.threads.shutdown(wait=False, cancel_futures=True)

    public = {route.path for route in pages}
    middleware = [Middleware(Guard, settings=settings, metrics=server.metrics, public=public)]
    if settings.origins:
        allowed: Any = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        middleware.append(Middleware(CORSMiddleware, allow_origins=settings.origins, **allowed))
    app = Starlette(
        routes=[*routes, *pages],
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={HTTPException: refused},
    )
    app.state.server = server
    return app


def server_of(app: Starlette, settings: Settings, verbose: bool = False) -> Drained:
    """uvicorn with settings of ours: quiet, bounded, and drained when told to stop."""
    config = uvicorn.Config(
        app,
        http=connection_of(settings),
        ws="none",
        loop="asyncio",
        log_level="info" if verbose else "critical",
        access_log=verbose,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(settings.idle_seconds),
        timeout_graceful_shutdown=int(settings.drain_seconds) + 5,
        limit_concurrency=settings.connections,
        h11_max_incomplete_event_size=64 << 10,
    )
    return Drained(config, app.state.server.drain, settings.drain_seconds)


def listen(settings: Settings) -> socket.socket:
    """The socket. Raises OutputError where there is none to be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"cannot listen at {settings.host[:80]}, port {settings.port}: {reason}; choose "
            "another --port or --host"
        ) from None


def run(model: Model, settings: Settings, say: Callable[[str], None], verbose: bool) -> None:
    """Serve until SIGTERM or Ctrl-C; answers that run then have `drain_seconds` to end.

    Raises OutputError if it cannot listen.
    """
    logging.getLogger("chalot.serve").addHandler(logging.StreamHandler())
    with listen(settings) as found:
        served = Served(model, settings)
        served.start()
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        port = found.getsockname()[1]
        say(f"{settings.name} at http://{host}:{port}, API at /v1 (Ctrl-C stops)")
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # uvicorn raises them again when it has ended
            signal.signal(number, lambda *_: None)
        server_of(make_app(served), settings, verbose).run(sockets=[found])
