"""Drafting by a small model that speaks the same ids, with a cache of its own.

It draws each token as the large one would, with the same options and the random numbers of the same
positions: where both models expect the same, both draw the same, sampled text included.
"""

import time

from chalot.engine.drafting import Text
from chalot.engine.generate import Engine, Session
from chalot.engine.pacing import MOST, Pace, StepCosts
from chalot.engine.sampler import Sampling
from chalot.errors import ContextError, KernelError

BELIEF = 0.6  # share of its tokens that are kept, before there were any
BEHIND = 64  # tokens to catch up with, above which that is no part of a draft's cost


class ModelDrafter:
    """A small model's text beside the large one's. Nothing is drafted beyond its context."""

    def __init__(self, engine: Engine, vocabulary: int, costs: StepCosts, most: int = MOST) -> None:
        """`vocabulary` and `costs` are the large model's."""
        self.session = Session(engine, Sampling(temperature=0))
        self.vocabulary = vocabulary
        self.pace = Pace(costs, BELIEF, most)
        self.same = 0  # tokens of its text that are known to be the large one's
        self.drafted = 0, 0.0  # tokens and seconds of the last draft

    def propose(self, text: Text, most: int) -> list[int]:
        """See Drafter."""
        count = self.pace.length(most)
        if not count or len(text.tokens) + count > self.session.engine.context:
            return []
        start = time.perf_counter()
        draft: list[int] = []
        try:
            if self._follow(text.tokens) > BEHIND:
                start = time.perf_counter()
            self.session.sampling, self.session.start = text.sampling, text.start
            while len(draft) < count and (token := self.session.step()) < self.vocabulary:
                draft.append(token)
        except ContextError:  # its cache is full, or the text has an id that it does not know
            pass
        except KernelError as error:
            raise KernelError(f"the draft model: {error}") from None
        self.drafted = len(draft), time.perf_counter() - start
        return draft

    def _follow(self, tokens: list[int]) -> int:
        """Read what the text has become; how many tokens that were new."""
        own, same = self.session.tokens, self.same
        while same < min(len(own), len(tokens)) and own[same] == tokens[same]:
            same += 1
        if same < len(own):
            self.session.rewind(same)
        self.same = same
        self.session.prefill(tokens[same:])
        self.same = len(tokens)
        return len(tokens) - same

    def learn(self, kept: int) -> None:
        """See Drafter."""
        drafted, seconds = self.drafted
        self.pace.learn(drafted, kept, seconds)

    def truncate(self, length: int) -> None:
        """See Drafter."""
        self.same = min(self.same, length)

    def close(self) -> None:
        """See Drafter."""
        self.session.close()
        self.same = 0
