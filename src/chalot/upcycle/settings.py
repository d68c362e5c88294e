"""What a mixture is to be, as it was asked for; and what is wrong with that."""

import math
from dataclasses import dataclass

from chalot.errors import ChalotError

MOST = 1024  # experts of a layer, as model/experts.py has it
SEEDS = 1 << 64


class UpcycleError(ChalotError, ValueError):
    """A mixture that cannot be made of this model, or of any."""


@dataclass(frozen=True)
class Settings:
    """A mixture to be made.

    Copies: `experts` of the whole feed-forward's width. Slices: `experts` of 1 / `experts` of its
    columns each, of which `shared` are always on. A token takes `top` of those that are routed.
    """

    experts: int = 8
    top: int = 2
    noise: float = 0.0  # of a copied tensor's standard deviation
    seed: int = 0
    shared: int = 0
    slices: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.experts <= MOST:
            raise UpcycleError(f"--experts {self.experts}: expected 2 to {MOST}")
        if not 0 <= self.seed < SEEDS:
            raise UpcycleError(f"--seed {self.seed}: expected 0 to 2^64 - 1")
        if not (math.isfinite(self.noise) and 0 <= self.noise <= 1):
            raise UpcycleError(
                f"--noise {self.noise}: expected 0 to 1, a part of each tensor's standard deviation"
            )
        if self.shared and not self.slices:
            raise UpcycleError(
                f"--shared {self.shared}: is of slices; add --slice, or leave it out"
            )
        if self.noise and self.slices:
            raise UpcycleError(
                f"--noise {self.noise}: is of copies, which are all alike without it; slices "
                "are not: leave it out"
            )
        if not 0 <= self.shared < self.experts:
            raise UpcycleError(
                f"--shared {self.shared}: of {self.experts} experts some must be routed; expected "
                f"0 to {self.experts - 1}"
            )
        if not 1 <= self.top <= self.routed:
            raise UpcycleError(
                f"--top-k {self.top}: a token can take 1 to {self.routed} of the {self.routed} "
                f"experts that are routed"
            )

    @property
    def routed(self) -> int:
        """Experts that a router chooses from."""
        return self.experts - self.shared

    def width(self, feed_forward: int) -> int:
        """Columns of one slice. Raises UpcycleError where they cannot be shared out evenly."""
        if feed_forward % self.experts:
            near = [n for n in range(2, min(feed_forward, 257)) if feed_forward % n == 0]
            some = ", ".join(map(str, near[:12]))
            raise UpcycleError(
                f"--experts {self.experts}: the feed-forward's {feed_forward} columns cannot be "
                f"shared out evenly; numbers that divide them: {some or 'none up to 256'}"
            )
        return feed_forward // self.experts
