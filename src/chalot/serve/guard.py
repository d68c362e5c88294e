"""What stands before every route: names of the host, headers of every response, keys.

On loopback a page of any site can have its name resolve to 127.0.0.1 and then read what is served
there (DNS rebinding); so a Host that does not name this machine is refused.
"""

import hmac
from collections.abc import MutableMapping
from hashlib import blake2b
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from chalot.serve.events import Receive, Scope, Send, as_json
from chalot.serve.faults import Fault
from chalot.serve.metrics import Metrics
from chalot.serve.settings import LOOPBACK, Settings

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
OPEN = ("/health", "/ready")  # and the page; everything else wants a key where there are keys


def host_of(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def key_of(headers: Headers) -> str:
    """The key of a request: OpenAI's way, or Anthropic's."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        return str(key.strip())
    return str(headers.get("x-api-key", ""))


def known(key: str, keys: tuple[str, ...]) -> bool:
    """Whether a key is one of these, in a time that says nothing of how near it is."""
    found = False
    for one in keys:
        found |= hmac.compare_digest(one.encode(), key.encode("utf-8", "replace"))
    return found


def namespace_of(key: str) -> bytes:
    """What separates the prefix cache of one key from another's."""
    return blake2b(key.encode("utf-8", "replace"), digest_size=16).digest() if key else b""


class Guard:
    """The outermost application."""

    def __init__(self, app: Any, settings: Settings, metrics: Metrics, public: set[str]) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.public = public | set(OPEN)
        self.hosts: set[str] | None = None
        if settings.on_loopback or settings.hosts:
            self.hosts = {*LOOPBACK, settings.host.lower(), *map(str.lower, settings.hosts)}

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise Fault for a request that is not to be served."""
        if self.hosts is not None and host_of(headers.get("host", "")) not in self.hosts:
            raise Fault(
                f"found Host {headers.get('host', '')[:80]!r}, expected this machine's; "
                "`--allow-host NAME` adds a name",
                403,
                code="host_refused",
            )
        keys = self.settings.keys
        if keys and scope["path"] not in self.public and scope["method"] != "OPTIONS":
            key = key_of(headers)
            if not known(key, keys):
                found = "a key that is not known" if key else "no key"
                raise Fault(
                    f"found {found}, expected one of this server's in `Authorization: Bearer KEY`",
                    401,
                    code="invalid_api_key",
                )
            scope.setdefault("state", {})["namespace"] = namespace_of(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message.get("headers", [])))
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                message = {**message, "headers": headers.raw}
                path = scope.get("route_path", "other")
                self.metrics.answered(path, int(message["status"]))
            await send(message)

        try:
            self._check(scope, Headers(scope=scope))
        except Fault as fault:
            # the body was not read, so the connection cannot go on
            headers = {**fault.headers, "connection": "close"}
            response = as_json(fault.body(scope["path"]), fault.status, headers)
            await response(scope, receive, guarded)
            return
        await self.app(scope, receive, guarded)
