"""Guesses at the tokens to come, which one forward pass then checks.

A draft is kept as far as it equals what plain decoding would have drawn, so it may be anything: a
good one saves passes, a bad one costs a little time, and none changes the text. A drafter says what
it expects, is told how much of that was kept, and when the text was cut.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from chalot.engine.pacing import MOST, Costs, Pace
from chalot.engine.sampler import Exp, Sampling, choose, wanted
from chalot.errors import KernelError
from chalot.model import cache

LOOK = 3e-6  # seconds that looking for a draft takes
PART = 0.0025  # of a pass: what looking in vain may take
IN_VAIN = 4  # looks in a row before there are fewer
LOOKED_AT = 8  # earlier places with the same two tokens, latest first
LONGEST = 32  # tokens of a match that are counted
BELIEFS = (0.2, 0.3, 0.5, 0.7, 0.85, 0.9)  # share kept, for matches of 1, 2, 4 .. 32 tokens or more


class Text(Protocol):
    """What a drafter sees of a text: all its tokens, of which the last are not in the cache yet."""

    tokens: list[int]
    start: int  # where the answer begins
    sequence: cache.Sequence

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen."""


class Drafter(Protocol):
    """Guesses what follows a text. Belongs to one text."""

    def propose(self, text: Text, most: int) -> list[int]:
        """The tokens expected next, at most `most` (1 or more) of them, or none."""

    def learn(self, kept: int) -> None:
        """So many of the last proposal's tokens were right. Not called for an empty one."""

    def truncate(self, length: int) -> None:
        """All but the first `length` tokens of the text are gone."""

    def close(self) -> None:
        """The text has ended."""


def most_wanted(text: Text, draft: Sequence[int], vocabulary: int) -> int:
    """How many candidates `verified` needs to see after each token."""
    s = text.sampling
    if s.repetition_penalty == 1 and not (s.presence_penalty or s.frequency_penalty):
        return wanted((), s, vocabulary)
    before, start = recent(text)
    sets = (before + list(draft[:n]) for n in range(len(draft) + 1))
    return max(wanted(tokens, text.sampling, vocabulary, start) for tokens in sets)


def recent(text: Text) -> tuple[list[int], int]:
    """The last tokens of a text, as far as a choice depends on them; where its answer begins."""
    sampling, length = text.sampling, len(text.tokens)
    need = sampling.repetition_window if sampling.repetition_penalty != 1 else 0
    if sampling.presence_penalty or sampling.frequency_penalty:
        need = max(need, length - text.start)
    first = max(length - need, 0)
    return text.tokens[first:], max(text.start - first, 0)


def verified(
    text: Text,
    draft: Sequence[int],
    candidates: Callable[[int], tuple[NDArray[np.int32], NDArray[np.float32]]],
    exp: Exp,
) -> list[int]:
    """What follows the text: the draft as far as it is right, and one token more.

    `candidates(n)` are ids and logits of the best after the text and n drafted tokens. Each token
    is drawn as plain decoding draws it, with the same random number of its position.
    """
    (before, start), found = recent(text), list[int]()
    while True:
        at, best = len(text.tokens) + len(found), candidates(len(found))
        try:
            found.append(choose(*best, before + found, text.sampling, at, exp, start))
        except KernelError:  # not finite: the error is due when that token is asked for
            if not found:
                raise
            return found
        if len(found) > len(draft) or found[-1] != draft[len(found) - 1]:
            return found


class TextDrafter:
    """What followed the longest earlier match of the text's ending, in prompt and answer.

    Its last two tokens lead to the places where they stood before; the longest match among the
    latest of those wins. Where they are new, the last token alone leads to where it stood last.
    Reading takes about a microsecond a token, and can be undone.
    """

    def __init__(self, costs: Costs, most: int = MOST) -> None:
        self.costs = costs
        self.paces = [Pace(costs, belief, most) for belief in BELIEFS]
        self.resting = 0  # tokens to come for which no draft is looked for
        self.in_vain = 0  # looks since the last draft
        self.tokens: list[int] = []
        self.last: dict[tuple[int, int], int] = {}  # two tokens -> the place behind them
        self.earlier: list[int] = []  # for each place, the one before behind the same two; 0: none
        self.alone: dict[int, int] = {}  # a token -> the place behind it, the text's end excepted
        self.proposed = self.paces[0], 0

    def read(self, tokens: Sequence[int]) -> None:
        """Take in what the text has more than before."""
        last, earlier, alone, done = self.last, self.earlier, self.alone, len(self.tokens)
        self.tokens += tokens[done:]
        before = tokens[done - 1] if done else -1
        for end in range(done + 1, len(tokens) + 1):
            pair = before, before = before, tokens[end - 1]
            earlier.append(last.get(pair, 0))
            last[pair] = end
            alone[pair[0]] = end - 1

    def match(self) -> tuple[int, int]:
        """The place that ended as the text does now, and how many tokens agree; (0, 0) if none."""
        tokens, earlier, end = self.tokens, self.earlier, len(self.tokens)
        best = found = 0
        place = earlier[-1] if earlier else 0
        for _ in range(LOOKED_AT):
            if not place:
                break
            at, behind, least = place - 3, end - place, max(place - LONGEST, 0)  # two are known
            while at >= least and tokens[at] == tokens[at + behind]:
                at -= 1
            if place - 1 - at > best:
                best, found = place - 1 - at, place
                if best == LONGEST:
                    break
            place = earlier[place - 1]
        if not found and tokens:
            found = self.alone.get(tokens[-1], 0)
            best = min(found, 1)
        return found, best

    def propose(self, text: Text, most: int) -> list[int]:
        """See Drafter."""
        if self.resting:
            self.resting -= 1
            return []
        self.read(text.tokens)
        place, same = self.match()
        pace = self.paces[max(same.bit_length() - 1, 0)]
        count = pace.length(most) if place else 0
        self.in_vain = 0 if count else self.in_vain + 1
        if self.in_vain > IN_VAIN and self.costs.one:  # a model of microseconds must not pay much
            self.resting = min(self.in_vain - IN_VAIN, int(LOOK / (PART * self.costs.one)))
        draft = self.tokens[place : place + count]
        while draft and len(draft) < count:  # the match reaches into the draft: it goes round
            draft += draft[: count - len(draft)]
        self.proposed = pace, len(draft)
        return draft

    def learn(self, kept: int) -> None:
        """See Drafter."""
        pace, drafted = self.proposed
        pace.learn(drafted, kept)

    def truncate(self, length: int) -> None:
        """See Drafter."""
        tokens = self.tokens
        for end in range(len(tokens), length, -1):
            pair = tokens[end - 2] if end > 1 else -1, tokens[end - 1]
            before = self.earlier.pop()
            if before:
                self.last[pair] = before
            else:
                del self.last[pair]
            if self.alone.get(pair[0]) == end - 1:
                del self.alone[pair[0]]
        del self.tokens[length:]

    def close(self) -> None:
        """See Drafter."""
        self.truncate(0)


class Several:
    """Drafters in turn: the first that expects anything is followed."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self.drafters = drafters
        self.asked = drafters[0]

    def propose(self, text: Text, most: int) -> list[int]:
        """See Drafter."""
        for drafter in self.drafters:
            draft = drafter.propose(text, most)
            if draft:
                self.asked = drafter
                return draft
        return []

    def learn(self, kept: int) -> None:
        """See Drafter."""
        self.asked.learn(kept)

    def truncate(self, length: int) -> None:
        """See Drafter."""
        for drafter in self.drafters:
            drafter.truncate(length)

    def close(self) -> None:
        """See Drafter."""
        for drafter in self.drafters:
            drafter.close()
