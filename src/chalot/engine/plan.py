"""What goes into one pass, what drafts cost in it, and what is counted of passes."""

from dataclasses import dataclass, field

from chalot.engine.generate import Engine
from chalot.engine.pacing import MOST, YIELD, StepCosts
from chalot.engine.requests import OutOfPages, Request
from chalot.engine.sampler import SamplingError
from chalot.engine.text import Text
from chalot.errors import ContextError
from chalot.kernels.program import PAGE


@dataclass
class SchedulerStats:
    """What was done since the scheduler was made, and how it stands."""

    waiting: int = 0
    running: int = 0
    pages: int = 0
    pages_used: int = 0  # those of the prefix cache included
    prefix_pages: int = 0
    prefix_hits: int = 0  # requests that found at least one page of their prompt
    prompt_tokens: int = 0  # of requests that were let in
    cached_tokens: int = 0  # of those, that were in the cache already
    read_tokens: int = 0  # in passes
    new_tokens: int = 0
    passes: int = 0
    pass_seconds: float = 0.0
    last_pass_seconds: float = 0.0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


@dataclass
class Due:
    """What a text reads in a pass: so many of its tokens and a draft of what follows them.

    Logits are wanted after the last, all, or none of them.
    """

    text: Text
    tokens: int
    wanted: str
    draft: list[int] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows of logits that it gets."""
        return {"all": self.tokens + len(self.draft), "last": 1, "none": 0}[self.wanted]


@dataclass
class SharedCosts:
    """Costs of drafts in a pass that `texts` share, as if each of them drafted as much."""

    measured: StepCosts
    texts: int = 1

    @property
    def one(self) -> float | None:
        """See Costs."""
        return self.measured.one

    def pays(self) -> bool:
        """Whether a draft that is right would save anything at all."""
        return any(n >= YIELD * self.of(n) for n in (2, 5, MOST))

    def of(self, tokens: int) -> float:
        """See Costs."""
        return self.measured.of(self.texts * tokens) / self.measured.of(self.texts)


def shares(prompts: list[Text], chunk: int, rows: int) -> dict[Text, int]:
    """Tokens of each prompt in a pass: half of the chunk to the oldest, the rest in equal parts.

    What one does not need, the others share. Prompts that are scored give a row of logits for each
    token, and there may be so many `rows`.
    """
    left = {t: t.unread for t in prompts}
    for text in prompts:
        if text.scoring:
            left[text] = min(left[text], max(1, rows))
            rows -= left[text]
    out = dict.fromkeys(prompts, 0)
    budget = chunk
    for text in prompts[:1]:
        out[text] = min(left[text], -(-budget // 2))
        budget -= out[text]
    while budget and (open_ := [t for t in prompts if out[t] < left[t]]):
        part = max(1, budget // len(open_))
        for text in open_[:budget]:
            more = min(part, left[text] - out[text])
            out[text] += more
            budget -= more
    return out


def check(request: Request, engine: Engine) -> None:
    """Raise ContextError, OutOfPages or SamplingError for what could not be answered."""
    ids = request.ids
    if not ids:
        raise ContextError("the prompt is empty; expected at least one token")
    if not all(0 <= i < engine.vocabulary for i in ids):
        raise ContextError(
            f"token ids must be 0 to {engine.vocabulary - 1}, found {min(ids)} to {max(ids)}; "
            "were they made with another tokenizer?"
        )
    need = len(ids) + (request.max_tokens > 0)
    if need > engine.context:
        raise ContextError(
            f"the prompt and one new token need {need} tokens, the context holds "
            f"{engine.context}; shorten it or {engine.remedy}"
        )
    if -(-len(ids) // PAGE) > engine.cache.count:
        raise OutOfPages(no_pages(len(ids), engine.cache.count))
    if request.max_tokens < 0:
        raise SamplingError(f"max_tokens is {request.max_tokens}; expected 0 or more")
    if not 0 <= (request.logprobs or 0) <= engine.vocabulary:
        raise SamplingError(f"logprobs is {request.logprobs}; expected 0 or more")
    for token, number in request.bias.items():
        if not (0 <= token < engine.vocabulary and -1e30 <= number <= 1e30):
            raise SamplingError(
                f"bias of token {token} is {number}; expected a number and ids of 0 to "
                f"{engine.vocabulary - 1}"
            )


def no_pages(tokens: int, pages: int) -> str:
    """What is said of a text that the whole cache cannot hold."""
    return (
        f"{tokens} tokens need {-(-tokens // PAGE)} pages of the cache, which has {pages}; "
        "shorten the text or choose a larger --kv-budget"
    )
