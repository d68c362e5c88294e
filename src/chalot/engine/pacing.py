"""How many tokens to draft: decided by what passes have cost so far and what was kept of drafts.

With a share `a` of drafted tokens kept, a pass over k of them is expected to give

    1 + a + a^2 + ... + a^k = (1 - a^(k+1)) / (1 - a)

tokens for the cost of a pass over k + 1.

Timing decides how fast a text comes, never what it says.
"""

from bisect import bisect
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

SLOPE = 0.04  # of a pass, for each more token in it: assumed where nothing was measured
RECENT = 9  # passes of one size that count
NEWEST = 1 / 8  # least weight of the newest measurement in a running average
MOST = 16  # drafted tokens in a pass, unless something else is asked for
FIRST = 8  # at first no draft is longer
LEAST = 4  # so much may always be drafted, where it pays
BELIEF = 6.0  # drafted tokens that what is believed at first weighs as much as
MEMORY = 0.97  # what a draft's outcome still weighs after the next one
YIELD = 1.05  # tokens for the time of one, below which drafting pauses
FAR = 0.7  # of the best gain: where a length gains less, longer ones are not looked at
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
    """The time of forward passes: of one token in seconds, of more tokens in that.

    Each is the lower quartile of the last ones: others' work makes some of them many times longer,
    and none of them shorter.
    """

    one: float | None = None
    relative: dict[int, float] = field(default_factory=dict)  # tokens -> passes of one token
    passes: dict[int, int] = field(default_factory=dict)  # tokens -> passes seen by this process
    recent: dict[int, deque[float]] = field(default_factory=dict)
    known: dict[int, float] = field(default_factory=dict, compare=False)  # what `of` has found
    sizes: list[int] = field(default_factory=list, compare=False)  # in `relative`, ascending

    def note(self, tokens: int, seconds: float) -> None:
        """A pass over that many tokens, logits of all wanted, has taken so long."""
        if tokens > 1 and not self.one:
            return
        known = [] if tokens == 1 else [self.of(tokens)]  # stands against a first one that is off
        recent = self.recent.setdefault(tokens, deque(known, RECENT))
        recent.append(seconds if tokens == 1 else max(seconds / (self.one or 1.0), 1.0))
        quartile = sorted(recent)[(len(recent) - 1) // 3]
        self.passes[tokens] = self.passes.get(tokens, 0) + 1
        if tokens == 1:
            self.one = quartile
        else:
            self.relative[tokens] = quartile
            self.known = {}

    def of(self, tokens: int) -> float:
        """What a pass of so many tokens costs, in passes of one."""
        found = self.known.get(tokens)
        if found is None:
            found = self.known[tokens] = self._between(tokens)
        return found

    def _between(self, tokens: int) -> float:
        """From the nearest that were measured; beyond the largest, on as to there."""
        if tokens in self.relative:
            return self.relative[tokens]
        if len(self.sizes) != len(self.relative):
            self.sizes = sorted(self.relative)
        at = bisect(self.sizes, tokens)
        below = self.sizes[at - 1] if at else 1
        low = self.relative.get(below, 1.0)
        if at == len(self.sizes):
            slope = max(SLOPE, (low - 1) / (below - 1)) if below > 1 else SLOPE
            return low + slope * (tokens - below)
        above = self.sizes[at]
        return low + (self.relative[above] - low) * (tokens - below) / (above - below)


class Pace:
    """The length of one kind of drafts: that of the greatest expected gain, within a limit.

    After a draft that was kept whole twice as many tokens may be in a pass, its first one counted;
    after one that was not, half as many are drafted. Drafting pauses where no length gains enough,
    and is tried again after a while.
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

    def best(self, most: int) -> tuple[int, float]:
        """The length that gains most, of at most `most`: tokens expected for the time of one."""
        cost, share, gains = self.costs.of, self.share, (0, 0.0)
        draft = self.draft_seconds / (self.costs.one or 1.0)
        tokens = next_one = 1.0
        for count in range(1, most + 1):
            next_one *= share
            tokens += next_one
            gain = tokens / (cost(count + 1) + count * draft)
            if gain > gains[1]:
                gains = count, gain
            elif gain < FAR * gains[1]:
                break
        return gains

    def length(self, most: int) -> int:
        """Tokens to draft now, of at most so many; 0 while drafting does not pay."""
        if self.costs.one is None:  # a plain pass first, to compare with
            return 0
        if 0 < self.waited < self.pause:
            self.waited += 1
            return 0
        best, gain = self.best(min(self.limit, most))
        if not best or gain >= YIELD:
            self.waited = 0
            return best
        if self.waited:  # long enough: a trial
            self.waited = 0
            self.pause = min(2 * self.pause, PAUSE[1])
            return best
        self.waited = 1
        return 0

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
            self.limit = min(max(self.limit, 2 * drafted + 1), self.most)
            self.pause = PAUSE[0]
        else:
            self.limit = max(self.limit // 2, kept, min(LEAST, self.most))
