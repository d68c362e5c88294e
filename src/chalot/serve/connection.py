"""Deadlines of a connection: for a request's head, and for a reader that takes nothing.

uvicorn has one for idle connections alone. https://en.wikipedia.org/wiki/Slowloris_(cyber_attack)
"""

import asyncio
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from chalot.serve.settings import Settings


class Connection(H11Protocol):
    """uvicorn's protocol with deadlines."""

    header_seconds = 10.0
    stall_seconds = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The head is awaited from here on."""
        super().connection_made(transport)
        self._await_head()

    def _await_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _forget(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)

    def data_received(self, data: bytes) -> None:
        """A head that has begun is awaited; one that is there is not."""
        super().data_received(data)
        waits = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if waits and self.timeout_keep_alive_task is None:
            self._await_head()
        else:
            self._forget("_head")

    def pause_writing(self) -> None:
        """The reader has taken nothing for a while: there is a deadline."""
        super().pause_writing()
        self._stall = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The reader goes on."""
        super().resume_writing()
        self._forget("_stall")

    def timeout_keep_alive_handler(self) -> None:
        """An idle connection; one with a rest that nobody takes is not waited for."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """No deadline is left."""
        super().connection_lost(exc)
        self._forget("_head")
        self._forget("_stall")


class Drained(uvicorn.Server):
    """uvicorn's server; told to stop, it gives answers so many seconds, and then calls `end`."""

    def __init__(self, config: uvicorn.Config, end: Callable[[bool], None], seconds: float) -> None:
        super().__init__(config)
        self.end, self.seconds = end, seconds

    async def shutdown(self, sockets: Any = None) -> None:
        """No new connections; those that there are end."""
        self.end(False)
        asyncio.get_running_loop().call_later(self.seconds, self.end, True)
        await super().shutdown(sockets)


def connection_of(settings: Settings) -> type[Connection]:
    """The protocol with a server's own deadlines."""
    return type(
        "Deadlined",
        (Connection,),
        {"header_seconds": settings.header_seconds, "stall_seconds": settings.stall_seconds},
    )
