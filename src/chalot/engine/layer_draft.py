"""Drafting by the model's own first layers: they guess, all layers verify in one pass.

The draft's program works on the model's cache and finds its layers' keys and values there, as the
last verification left them. What it adds lies behind the text; the next verification writes the
same there again, bit by bit, and the other layers' besides.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chalot.engine.drafting import Text
from chalot.engine.generate import Engine, Work
from chalot.engine.pacing import Costs, Pace
from chalot.engine.sampler import choose, wanted
from chalot.errors import ContextError, KernelError


@dataclass(frozen=True)
class Shallow:
    """First layers with a head: an engine on the model's own cache.

    `ids` are the tokens that the head's rows stand for, ascending; None: all.
    """

    engine: Engine
    ids: NDArray[np.int32] | None
    tokens: int  # of a draft, at most
    kept: float  # share that calibration expects


class LayerDrafter:
    """Guesses of the first layers."""

    def __init__(self, shallow: Shallow, costs: Costs, most: int) -> None:
        """`costs` are the whole model's."""
        self.shallow = shallow
        self.pace = Pace(costs, shallow.kept, min(most, shallow.tokens))
        self.drafted = 0, 0.0  # tokens and seconds of the last draft

    def propose(self, text: Text, most: int) -> list[int]:
        """See Drafter."""
        count = self.pace.length(most)
        sequence, length = text.sequence, text.sequence.length
        if not count or length != len(text.tokens) - 1:
            return []
        start = time.perf_counter()
        draft: list[int] = []
        try:
            while len(draft) < count:
                draft.append(self._next(text, draft))
        except ContextError:  # the cache is full: what is drafted is drafted
            pass
        except KernelError:  # not finite behind these layers: no guess
            draft.clear()
        finally:
            sequence.truncate(length)
        self.drafted = len(draft), time.perf_counter() - start
        return draft

    def _next(self, text: Text, draft: list[int]) -> int:
        """The token behind text and draft, drawn as the whole model would draw it."""
        engine, ids = self.shallow.engine, self.shallow.ids
        tokens = [*text.tokens, *draft]
        count = min(wanted(tokens, text.sampling, engine.vocabulary), engine.vocabulary)
        rows, logits = engine.best([Work(text.sequence, tokens[-1:])], count)
        best = rows[0]
        if best[0] < 0:
            raise KernelError("not finite")
        found = best if ids is None else ids[best]
        return choose(found, logits[0], tokens, text.sampling, len(tokens), engine.exp)

    def learn(self, kept: int) -> None:
        """See Drafter."""
        drafted, seconds = self.drafted
        self.pace.learn(drafted, kept, seconds)

    def truncate(self, length: int) -> None:
        """See Drafter: it remembers nothing of a text."""

    def close(self) -> None:
        """See Drafter: the text's pages are not its own."""
