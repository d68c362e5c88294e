"""Many prompts on one model at once, in one thread of the model's own: each gets its own bits.

Prompts that come from several callers meet in the same forward passes (engine/scheduler.py). The
thread starts with the first prompt, sleeps while there is none, and ends with the model.
"""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from chalot import machine
from chalot.engine.generate import CHUNK, Engine
from chalot.engine.requests import NO_TOKEN, Request, Step, Ticket
from chalot.engine.sampler import Sampling
from chalot.engine.scheduler import Scheduler
from chalot.engine.worker import Worker
from chalot.errors import ChalotError
from chalot.load import sessions
from chalot.load.drafts import Drafters
from chalot.model.cache import PageCache
from chalot.text.stream import TextStream
from chalot.text.tokenizer import Tokenizer
from chalot.typed import MAY_COUNT, check_types, token_ids

SLOTS = 32  # prompts that are answered at the same time
QUEUE = 1 << 20  # prompts that wait
Prompt = str | Iterable[int]


class Host(Protocol):
    """The model: what is needed of it here."""

    context: int
    kv_budget: int | None
    lock: Any
    drafters: Drafters
    engine: Engine

    @property
    def tokenizer(self) -> Tokenizer: ...

    def sampling(self, **options: Any) -> Sampling: ...


def scheduler(model: Host, slots: int = SLOTS, queue: int = QUEUE) -> Scheduler:
    """A scheduler with a cache of its own: a context for each slot.

    That is memory reserved, and taken as it is used: at most the model's `kv_budget`, by default
    half of what is free. Raises ContextError where that is no page.
    """
    shape, budget = model.engine.cache.shape, model.kv_budget
    if budget is None and (free := machine.memory_available()) is not None:
        budget = max(free // 2, shape.page_bytes)
    cache = PageCache(shape, slots * (model.context + CHUNK), budget)
    engine = replace(model.engine, cache=cache, native_seconds=0.0)
    return Scheduler(engine, slots=slots, queue=queue, drafter=model.drafters.by_text())


class Concurrent:
    """A model's worker, and what it takes to turn prompts into requests and steps into text.

    Options are those of `Model.stream`, and raise what they raise there.
    """

    def __init__(self, model: Host) -> None:
        self.model = model
        self.process = os.getpid()
        self._starting = threading.Lock()
        self._worker: Worker | None = None

    def worker(self) -> Worker:
        """The thread, started if need be; a forked child starts one of its own."""
        with self._starting:
            if self._worker is None or self.process != os.getpid():
                self._worker = Worker(scheduler(self.model), self.model.lock).start()
                self.process = os.getpid()
            return self._worker

    def close(self) -> None:
        """End the thread; what it answers is cancelled."""
        if self._worker is not None and self.process == os.getpid():
            self._worker.stop()
        self._worker = None

    def request(self, prompt: Prompt, max_tokens: int | None = None, **options: Any) -> Request:
        """What is asked of the scheduler. Raises SamplingError, WrongTypeError."""
        check_types(max_tokens=(max_tokens, MAY_COUNT))
        model = self.model
        for name in ("draft", "draft_tokens"):  # the model's own hold; no answer depends on them
            options.pop(name, None)
        ids = (
            model.tokenizer.encode(prompt)
            if isinstance(prompt, str)
            else token_ids(prompt, "prompt")
        )
        most = sessions.room(model.context - len(ids), max_tokens)
        return Request(ids, model.sampling(**options), most, model.tokenizer.eos_ids)

    def generate(
        self, prompts: Sequence[Prompt], *, stop: Iterable[str] = (), **options: Any
    ) -> list[str]:
        """The answers, in the order of the prompts. The first error ends them all."""
        stops = sessions.stops(stop)
        requests = [self.request(prompt, **options) for prompt in prompts]
        there = self.worker().scheduler
        tickets: list[Ticket] = []
        try:
            tickets += (there.submit(request) for request in requests)
            return ["".join(self._pieces(ticket, stops)) for ticket in tickets]
        finally:
            for ticket in tickets:
                if not ticket.done:
                    there.cancel(ticket)

    def _pieces(self, ticket: Ticket, stops: tuple[str, ...]) -> Iterator[str]:
        text = Answer(self.model.tokenizer, ticket.request, stops)
        for step in ticket.results():
            yield text.push(step)
            if text.ended:
                return

    async def stream(
        self, prompt: Prompt, *, stop: Iterable[str] = (), **options: Any
    ) -> AsyncGenerator[str, None]:
        """Text as it comes; cancelled when nobody iterates any more."""
        request = self.request(prompt, **options)
        text = Answer(self.model.tokenizer, request, sessions.stops(stop))
        loop = asyncio.get_running_loop()
        heard: asyncio.Queue[Step | ChalotError] = asyncio.Queue()

        def hear(item: Step | ChalotError) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(heard.put_nowait, item)

        there = self.worker().scheduler
        ticket = there.submit(request, hear, hear)
        try:
            while not text.ended:
                item = await heard.get()
                if isinstance(item, ChalotError):
                    raise item
                piece = text.push(item)
                if piece:
                    yield piece
        finally:
            if not ticket.done:
                there.cancel(ticket)


class Answer:
    """Steps in, text out: without the token that ended it, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, request: Request, stops: tuple[str, ...]) -> None:
        self.stream = TextStream(tokenizer, stops)
        self.ends = request.ends
        self.ended = False

    def push(self, step: Step) -> str:
        """Text that a step completes."""
        shown = step.token != NO_TOKEN and step.token not in self.ends
        piece = self.stream.push(step.token) if shown else ""
        self.ended = bool(step.finished or self.stream.stopped)
        return piece + self.stream.flush() if step.finished else piece
