"""What a scheduler is asked for, and what it answers with. Token ids only."""

import queue
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from chalot.engine.sampler import Sampling
from chalot.errors import ChalotError, LimitError

NO_TOKEN = -1  # of a step that ends a request without another token


class QueueFull(LimitError):
    """As many requests wait as may; later there will be room."""


class OutOfPages(LimitError):
    """The cache has no pages for a request, though nothing else uses them."""


class Mask(Protocol):
    """What may come next, for structured output."""

    def allowed(self, tokens: list[int]) -> NDArray[np.uint32] | None:
        """Bits of the ids that may follow the generated `tokens`, 32 a word; None: all may.

        Id i is bit i % 32 of word i // 32; ids beyond the last word are not allowed. Called once
        for each new token, in order. Raises ChalotError to end the request alone.
        """


class PromptToken(NamedTuple):
    """A token of the prompt, as likely as the tokens before it made it; the first has none."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


class Step(NamedTuple):
    """One new token, or NO_TOKEN with a reason for the end.

    `logprob` and `top` are of the model's own distribution: before bias, mask, penalties and
    temperature. `prompt` comes with a request's first step where it was asked for. `finished` is
    "stop" (an end id), "length" (`max_tokens`, or the context is full), "cancelled", or None.
    """

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []  # (id, log-probability), most likely first
    prompt: list[PromptToken] | None = None
    finished: str | None = None


@dataclass(frozen=True)
class Request:
    """A prompt and what is wanted after it."""

    ids: list[int]
    sampling: Sampling
    max_tokens: int
    ends: frozenset[int] = frozenset()  # generation stops after one of these, which is reported
    logprobs: int | None = None  # so many likeliest candidates with each new token; None: none
    prompt_logprobs: bool = False  # and with each token of the prompt
    namespace: bytes = b""  # beginnings of prompts are shared within one namespace only
    mask: Mask | None = None
    bias: Mapping[int, float] = field(default_factory=dict)  # id -> added to its logit


@dataclass(eq=False)
class Ticket:
    """A request in the scheduler's hands.

    What comes of it goes to `on_step` and `on_error`, in the scheduler's thread; without those to
    `steps`, which `results()` reads.
    """

    request: Request
    on_step: Callable[[Step], None]
    on_error: Callable[[ChalotError], None]
    steps: "queue.SimpleQueue[Step | ChalotError]"
    cached_tokens: int = 0  # of the prompt, that were in the cache already
    drafted: int = 0  # tokens that were guessed
    accepted: int = 0  # of those, that were kept
    done: bool = False
    cancelled: bool = False

    def results(self, timeout: float | None = None) -> Iterator[Step]:
        """Steps as they come, the last has `finished`. Raises the request's error."""
        while True:
            step = self.steps.get(timeout=timeout)
            if isinstance(step, ChalotError):
                raise step
            yield step
            if step.finished:
                return
