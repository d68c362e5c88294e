"""A request on its way: which of its tokens are in the cache, and what was reported of them."""

import numpy as np
from numpy.typing import NDArray

from chalot.engine.likelihood import Candidates, Likelihood, best_among, candidates
from chalot.engine.requests import PromptToken, Step, Ticket
from chalot.engine.sampler import Exp, choose, wanted
from chalot.model.cache import PageCache, Sequence

Floats = NDArray[np.float32]


class Text:
    """The tokens of one request, prompt and answer, and its place in the cache."""

    def __init__(self, ticket: Ticket, cache: PageCache, context: int) -> None:
        request = ticket.request
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
    def unread(self) -> int:
        """Tokens that the model has not read."""
        return len(self.tokens) - self.sequence.length

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of its prompt are still to be found."""
        return self.request.prompt_logprobs and len(self.prompt) < self.start

    def count(self, vocabulary: int) -> int:
        """Candidates that its next choice needs to see."""
        return wanted(self.tokens, self.request.sampling, vocabulary, self.start)

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

    def advance(self, best: Candidates | None, row: Floats | None, exp: Exp) -> Step:
        """Choose the next token, from the best candidates or the whole row of logits.

        Raises KernelError where logits are not finite, and what the mask raises.
        """
        r, answer = self.request, len(self.tokens) - self.start
        prompt = self.prompt if r.prompt_logprobs and not answer else None
        if not r.max_tokens:
            return Step(-1, prompt=prompt, finished="length")
        if row is not None:
            bits = None if r.mask is None else r.mask.allowed(self.tokens[self.start :])
            count = self.count(len(row))
            best = candidates(row, count, bits, r.bias)
        assert best is not None
        sampling, position = r.sampling, len(self.tokens)
        token = choose(*best, self.tokens, sampling, position, exp, self.start)
        logprob, top = None, []
        if r.logprobs is not None and row is not None:
            said = Likelihood(row, exp)
            logprob, top = said.of(token), said.top(r.logprobs)
        self.tokens.append(token)
        finished = "stop" if token in r.ends else "length" if len(self.tokens) >= self.end else None
        return Step(token, logprob, top, prompt, finished)


def few_of(row: Floats, count: int) -> Candidates:
    """The best candidates of a row, as the native pass gives them."""
    ids, logits = best_among(None, row, count)
    if not np.isfinite(row).all():
        ids = np.full(1, -1, np.int32)
    return ids, logits
