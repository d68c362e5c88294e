"""A request on its way: which of its tokens are in the cache, and what was reported of them."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from chalot.engine.drafting import Drafter, most_wanted, verified
from chalot.engine.likelihood import Candidates, Likelihood, best_among, candidates
from chalot.engine.requests import NO_TOKEN, PromptToken, Step, Ticket
from chalot.engine.sampler import Exp, Sampling, choose, wanted
from chalot.kernels.program import PAGE
from chalot.model.cache import PageCache, Sequence

Floats = NDArray[np.float32]


class Text:
    """The tokens of one request, prompt and answer, and its place in the cache."""

    def __init__(
        self, ticket: Ticket, cache: PageCache, context: int, drafter: Drafter | None = None
    ) -> None:
        request = ticket.request
        self.drafter = drafter
        self.ticket = ticket
        self.request = request
        self.tokens = list(request.ids)
        self.start = len(self.tokens)  # where the answer begins
        self.end = min(self.start + request.max_tokens, context)  # the most there may be
        self.sequence = Sequence(cache)
        self.keys: list[bytes] = []  # of full pages, as far as they are known
        self.found = 0  # tokens that the prefix cache had
        self.kept = 0  # full pages that were offered to the prefix cache
        self.prompt: list[PromptToken] = []
        self.let_in = False  # once at least

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen."""
        return self.request.sampling

    @property
    def unread(self) -> int:
        """Tokens that the model has not read."""
        return len(self.tokens) - self.sequence.length

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of its prompt are still to be found."""
        return self.request.prompt_logprobs and len(self.prompt) < self.start

    def count(self, vocabulary: int, draft: list[int]) -> int:
        """Candidates that its next choice needs to see, and those that check a draft."""
        if draft:
            return most_wanted(self, draft, vocabulary)
        return wanted(self.tokens, self.sampling, vocabulary, self.start)

    def propose(self) -> list[int]:
        """A draft of what follows, within the pages that it has and what may still come."""
        if self.drafter is None or self.unread != 1 or self.needs_row():
            return []
        room = min(len(self.sequence.pages) * PAGE, self.end - 1) - len(self.tokens)
        return self.drafter.propose(self, room) if room > 0 else []

    def needs_row(self) -> bool:
        """Whether its next choice needs all logits rather than the best few."""
        r = self.request
        return bool(r.bias) or r.mask is not None or r.logprobs is not None

    def score(self, rows: Floats, exp: Exp) -> None:
        """Note the prompt's log-probabilities; `rows` follow the last positions that were read."""
        if not self.prompt:
            self.prompt.append(PromptToken(self.tokens[0], None, []))
        first = self.sequence.length - len(rows)  # the position of the token before rows[0]'s
        for position, row in enumerate(rows, first + 1):
            if position != len(self.prompt) or position >= self.start:  # read once already
                continue
            said, token = Likelihood(row, exp), self.tokens[position]
            top = said.top(self.request.logprobs or 0)
            self.prompt.append(PromptToken(token, said.of(token), top))

    def from_row(self, row: Floats, exp: Exp) -> Step:
        """Choose the next token, from the whole row of logits.

        Raises KernelError where logits are not finite, and what the mask raises.
        """
        r, answer = self.request, self.tokens[self.start :]
        bits = None if r.mask is None else r.mask.allowed(answer)
        best = candidates(row, self.count(len(row), []), bits, r.bias)
        at = len(self.tokens)
        token = choose(*best, self.tokens, self.sampling, at, exp, self.start)
        if r.logprobs is None:
            return self._step(token)
        said = Likelihood(row, exp)
        return self._step(token, said.of(token), said.top(r.logprobs))

    def from_best(
        self, draft: list[int], best: Callable[[int], Candidates], exp: Exp
    ) -> list[Step]:
        """Choose the next token, and those behind it that were drafted rightly, by the best few.

        Raises KernelError where logits are not finite.
        """
        if not draft:
            at = len(self.tokens)
            return [self._step(choose(*best(0), self.tokens, self.sampling, at, exp, self.start))]
        found = verified(self, draft, best, exp)
        if self.drafter is not None:
            self.drafter.learn(len(found) - 1)
        steps: list[Step] = []
        for token in found:
            steps.append(self._step(token))
            if steps[-1].finished:
                break
        self.sequence.truncate(len(self.tokens) - 1)
        return steps

    def nothing_more(self) -> Step:
        """The step of a request that asked for no token."""
        return Step(NO_TOKEN, prompt=self._prompt(), finished="length")

    def _prompt(self) -> list[PromptToken] | None:
        first = len(self.tokens) == self.start
        return self.prompt if self.request.prompt_logprobs and first else None

    def _step(
        self, token: int, logprob: float | None = None, top: list[tuple[int, float]] | None = None
    ) -> Step:
        prompt = self._prompt()
        self.tokens.append(token)
        full = "length" if len(self.tokens) >= self.end else None
        finished = "stop" if token in self.request.ends else full
        return Step(token, logprob, top or [], prompt, finished)


def few_of(row: Floats, count: int) -> Candidates:
    """The best candidates of a row, as the native pass gives them."""
    if not np.isfinite(row).all():
        return np.full(1, -1, np.int32), row[:1]
    return best_among(None, row, count)
