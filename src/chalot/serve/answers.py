"""Answers as they come: steps of the scheduler become text, scored tokens, calls and an end."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from chalot.engine.requests import NO_TOKEN, PromptToken, Step, Ticket
from chalot.errors import ChalotError
from chalot.serve.faults import Fault, fault_of
from chalot.serve.jobs import Job
from chalot.serve.metrics import Metrics
from chalot.serve.served import Served
from chalot.serve.structured import GrammarMask
from chalot.serve.tools import Call, CallReader
from chalot.text.stream import TextStream


class Scored(NamedTuple):
    """A token's bytes, its log-probability, and the likeliest tokens there; a first has none."""

    piece: bytes
    logprob: float | None
    top: list[tuple[bytes, float]]


@dataclass
class Delta:
    """What one step added to an answer."""

    text: str = ""
    tokens: list[Scored] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finish: str | None = None  # stop, length, tool_calls, cancelled
    stopped: str | None = None  # the stop string that was found


class Answer:
    """One answer on its way."""

    def __init__(self, served: Served, job: Job, index: int) -> None:
        self.tokenizer = served.tokenizer
        self.request = job.requests[index]
        self.prompt = job.prompts[index // job.choices]
        self.job = job
        # tools are marked by special tokens in some families
        shown = job.style is not None
        self.stream = TextStream(self.tokenizer, job.stops, skip_specials=not shown)
        self.reader = CallReader(job.style, job.tool_names) if job.style else None
        self.tokens: list[int] = []
        self.called = False
        self.finish: str | None = None

    def _scored(self, token: int, logprob: float | None, top: list[tuple[int, float]]) -> Scored:
        piece = self.tokenizer.piece
        return Scored(piece(token), logprob, [(piece(id_), said) for id_, said in top])

    def _echo(self, prompt: list[PromptToken] | None) -> Delta:
        """The prompt itself, before what follows it."""
        text = self.prompt if isinstance(self.prompt, str) else self.tokenizer.decode(self.prompt)
        return Delta(text, [self._scored(*one) for one in prompt or []])

    def take(self, step: Step) -> Delta:
        """What a step adds. Raises StructureError if an end comes where the grammar has none."""
        first = not self.tokens and self.job.echo
        delta = self._echo(step.prompt) if first else Delta()
        text, ended = "", step.finished
        if step.token != NO_TOKEN:
            self.tokens.append(step.token)
            if step.logprob is not None:
                delta.tokens.append(self._scored(step.token, step.logprob, step.top))
            if step.token not in self.request.ends:
                text = self.stream.push(step.token)
        if self.stream.stopped is not None:
            ended, delta.stopped = "stop", self.stream.stopped
        elif ended:
            text += self.stream.flush()
        delta.text += self._read(text, delta, bool(ended))
        if ended == "stop":
            self._check_whole()
            ended = "tool_calls" if self.called else ended
        self.finish = delta.finish = ended
        return delta

    def _read(self, text: str, delta: Delta, last: bool) -> str:
        """Calls out of the text."""
        if self.reader is None:
            return text
        text, calls = self.reader.push(text)
        if last:
            rest, more = self.reader.flush()
            text, calls = text + rest, [*calls, *more]
        delta.calls += calls
        self.called = self.called or bool(calls)
        return text if text.strip() or not self.called else ""

    def _check_whole(self) -> None:
        mask = self.request.mask
        if isinstance(mask, GrammarMask) and not mask.holds(self.tokens):
            raise Fault("structured output: the answer does not keep its grammar", 500)


class Mailbox:
    """From the scheduler's thread to the event loop: one call wakes it for all that has come."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._letters: deque[tuple[Answers, int, Step | ChalotError]] = deque()
        self._called = False

    def put(self, answers: "Answers", index: int, item: Step | ChalotError) -> None:
        """Any thread."""
        self._letters.append((answers, index, item))
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # what comes from here on calls again
        while self._letters:
            answers, index, item = self._letters.popleft()
            answers.heard.put_nowait((index, item))


class Answers:
    """All answers to one job: `start`, read `deltas`, and `cancel` when nobody listens."""

    def __init__(self, served: Served, job: Job, metrics: Metrics, mailbox: Mailbox) -> None:
        self.served, self.job, self.metrics, self.mailbox = served, job, metrics, mailbox
        self.answers = [Answer(served, job, i) for i in range(len(job.requests))]
        self.tickets: list[Ticket] = []
        self.names: set[tuple[bytes, str]] = set()  # that they can be cancelled by
        self.heard: asyncio.Queue[tuple[int, Step | ChalotError]] = asyncio.Queue()

    def start(self) -> None:
        """Hand all requests to the scheduler, or none. Raises Fault."""
        try:
            for index, request in enumerate(self.job.requests):
                hear = partial(self.mailbox.put, self, index)
                self.tickets.append(self.served.scheduler.submit(request, hear, hear))
        except ChalotError as error:
            self.cancel()
            raise fault_of(error) from None
        self.metrics.began(len(self.tickets), self.job.prompt_tokens)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(answer, what it got) until all have ended. Raises Fault."""
        left = len(self.tickets)
        clocks = [self.metrics.clock() for _ in self.tickets]
        try:
            while left:
                index, item = await self.heard.get()
                answer = self.answers[index]
                if answer.finish is not None:  # it ended at a stop string
                    continue
                if isinstance(item, ChalotError):
                    raise fault_of(item)
                delta = answer.take(item)
                clocks[index].token(item.token != NO_TOKEN)
                if delta.finish is not None:
                    left -= 1
                    self.metrics.ended(delta.finish)
                    if not item.finished:
                        self.served.scheduler.cancel(self.tickets[index])
                yield index, delta
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End what has not ended."""
        for ticket in self.tickets:
            if not ticket.done and not ticket.cancelled:
                self.served.scheduler.cancel(ticket)

    @property
    def new_tokens(self) -> int:
        """Of all answers so far."""
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def drafts(self) -> tuple[int, int]:
        """Drafted tokens that were kept, and that were not."""
        kept = sum(ticket.accepted for ticket in self.tickets)
        return kept, sum(ticket.drafted for ticket in self.tickets) - kept

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, that were in the cache already when their first answer began."""
        return sum(ticket.cached_tokens for ticket in self.tickets[:: self.job.choices])
