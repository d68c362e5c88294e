"""How many tokens to draft: decided by what passes have cost so far and what was kept of drafts.

With a share `a` of drafted tokens kept, a pass over k of them is expected to give

    1 + a + a^2 + ... + a^k = (1 - a^(k+1)) / (1 - a)

tokens for the cost of a pass over k + 1.

Timing decides how fast a text comes, never what it says.
"""

from dataclasses import dataclass, field
from typing import Protocol

SLOPE = 0.04  # of a pass, for each more token in it: assumed where nothing was measured
NEWEST = 1 / 8  # least weight of the newest measurement in a running average
MOST = 16  # drafted tokens in a pass, unless something else is asked for
FIRST = 8  # at first no draft is longer
LEAST = 4  # so much may always be drafted, where it pays
BELIEF = 6.0  # drafted tokens that what is believed at first weighs as much as
MEMORY = 0.97  # what a draft's outcome still weighs after the next one
YIELD = 1.05  # tokens for the time of one, below which drafting pauses
PAUSE = 8, 256  # drafts passed over: at first, and after many trials that failed


class Costs(Protocol):
    """What passes cost, as a text sees it that drafts."""

    @property
    def one(self) -> float | None:
        """Seconds of a pass without drafts; None: not known yet."""

    def of(self, tokens: int) -> float:
        """What a pass over the last token and a draft costs, in passes without."""


@dataclass
class StepCosts:
    """Running averages of the time of forward passes: of one token in seconds, of more in that."""

    one: float | None = None
    relative: dict[int, float] = field(default_factory=dict)  # tokens -> passes of one token
    passes: dict[int, int] = field(default_factory=dict)  # tokens -> passes seen by this process

    def note(self, tokens: int, seconds: float) -> None:
        """A pass over that many tokens, logits of all wanted, has taken so long."""
        seen = self.passes[tokens] = self.passes.get(tokens, 0) + 1
        weight = max(NEWEST, 1 / seen)
        if tokens == 1:
            old = self.one or seconds
            self.one = old + weight * (min(seconds, 2 * old) - old)  # others' work is no trend
        elif self.one:
            old = self.relative.get(tokens, self.of(tokens))
            ratio = max(1.0, min(seconds / self.one, 2 * old))
            self.relative[tokens] = old + weight * (ratio - old)

    def of(self, tokens: int) -> float:
        """What a pass of so many tokens costs, in passes of one."""
        if tokens in self.relative:
            return self.relative[tokens]
        below = max((n for n in self.relative if n < tokens), default=1)
        above = min((n for n in self.relative if n > tokens), default=None)
        low = self.relative.get(below, 1.0)
        if above is None:
            slope = max(SLOPE, (low - 1) / (below - 1)) if below > 1 else SLOPE
            return low + slope * (tokens - below)
        return low + (self.relative[above] - low) * (tokens - below) / (above - below)


class Pace:
    """The length of one kind of drafts: that of the greatest expected gain, within a limit.

    The limit doubles after a draft that was kept whole and halves after one that was not. Drafting
    pauses where no length gains enough, and is tried again after a while.
    """

    def __init__(self, costs: Costs, belief: float, most: int = MOST) -> None:
        """`belief` is the share of drafted tokens expected to be kept, before there were any."""
        self.costs = costs
        self.most = most
        self.limit = min(FIRST, most)
        self.tried = BELIEF
        self.kept = BELIEF * belief
        self.drafts = 0
        self.draft_seconds = 0.0  # of each drafted token
        self.pause = PAUSE[0]
        self.waited = 0

    @property
    def share(self) -> float:
        """Part of the drafted tokens that was kept; those behind a wrong one do not count."""
        return self.kept / self.tried

    def gain(self, count: int) -> float:
        """Expected tokens for the time of one, with so many drafted."""
        one = self.costs.one or 1.0
        tokens = sum(self.share**n for n in range(count + 1))
        return tokens / (self.costs.of(count + 1) + count * self.draft_seconds / one)

    def length(self, most: int) -> int:
        """Tokens to draft now, of at most so many; 0 while drafting does not pay."""
        if self.costs.one is None:  # a plain pass first, to compare with
            return 0
        allowed = min(self.limit, most)
        best = max(range(1, allowed + 1), key=self.gain, default=0)
        if not best or self.gain(best) >= YIELD:
            return best
        self.waited += 1
        if self.waited < self.pause:
            return 0
        self.waited = 0
        self.pause = min(2 * self.pause, PAUSE[1])
        return best

    def learn(self, drafted: int, kept: int, seconds: float = 0.0) -> None:
        """`kept` of `drafted` tokens were right; drafting took so many seconds."""
        if not drafted:
            return
        self.tried = MEMORY * self.tried + min(kept + 1, drafted)
        self.kept = MEMORY * self.kept + kept
        self.drafts += 1
        weight = max(NEWEST, 1 / self.drafts)
        self.draft_seconds += weight * (seconds / drafted - self.draft_seconds)
        if kept == drafted:
            self.limit = min(max(self.limit, 2 * drafted), self.most)
            self.pause = PAUSE[0]
        else:
            self.limit = max(self.limit // 2, kept, min(LEAST, self.most))
