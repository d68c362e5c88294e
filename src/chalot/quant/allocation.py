"""Which option for which item, at the least summed loss within a budget of bytes.

Losses of tensors add up, nearly (HIGGS, arXiv 2411.17525), so the best plans for all budgets lie
where  loss + multiplier * bytes  is least, item by item: on each item's lower convex hull. The
steps of all hulls, steepest first, are then taken as long as they fit; what is left of the budget
goes to the steps that still fit. Exact at the hull's corners, within one item's step between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One way to store an item."""

    name: str
    bytes: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """The options taken, by item."""

    chosen: tuple[Option, ...]

    @property
    def bytes(self) -> int:
        """Of all items."""
        return sum(o.bytes for o in self.chosen)

    @property
    def loss(self) -> float:
        """The losses' sum."""
        return sum(o.loss for o in self.chosen)


def hull(options: Sequence[Option]) -> list[Option]:
    """The options that some multiplier makes the best: ascending bytes, falling, convex loss."""
    out: list[Option] = []
    for o in sorted(options, key=lambda o: (o.bytes, o.loss)):
        if out and o.loss >= out[-1].loss:
            continue
        while len(out) > 1 and slope(out[-2], out[-1]) >= slope(out[-2], o):
            out.pop()
        out.append(o)
    return out


def slope(a: Option, b: Option) -> float:
    """Loss for each byte from a to b; below zero where b is the better."""
    return (b.loss - a.loss) / (b.bytes - a.bytes)


def allocate(items: Sequence[Sequence[Option]], budget: int) -> Allocation | None:
    """The best plan found within `budget` bytes; None if the least one is larger.

    Deterministic: equal steps go by the items' order.
    """
    hulls = [hull(options) for options in items]
    at = [0] * len(hulls)
    left = budget - sum(h[0].bytes for h in hulls)
    if left < 0:
        return None
    steps = sorted(
        (slope(h[n], h[n + 1]), i, n) for i, h in enumerate(hulls) for n in range(len(h) - 1)
    )
    for _, i, n in steps:  # a hull's own steps come in order: it is convex
        cost = hulls[i][n + 1].bytes - hulls[i][at[i]].bytes
        if cost <= left and at[i] <= n:
            left -= cost
            at[i] = n + 1
    chosen = [h[n] for h, n in zip(hulls, at, strict=True)]
    return Allocation(tuple(fill(items, chosen, left)))


def fill(items: Sequence[Sequence[Option]], chosen: list[Option], left: int) -> list[Option]:
    """Spend what is left: ever again the exchange that fits and gains most, off the hull too."""
    chosen = list(chosen)
    while True:
        gains = [
            (chosen[i].loss - o.loss, -i, o)
            for i, options in enumerate(items)
            for o in options
            if o.loss < chosen[i].loss and o.bytes - chosen[i].bytes <= left
        ]
        if not gains:
            return chosen
        _, i, best = max(gains, key=lambda g: (g[0], g[1]))
        left -= best.bytes - chosen[-i].bytes
        chosen[-i] = best


def least(items: Sequence[Sequence[Option]]) -> int:
    """Bytes of the smallest plan there is."""
    return sum(min(o.bytes for o in options) for options in items)
