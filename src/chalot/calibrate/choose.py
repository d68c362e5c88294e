"""From agreement and costs to choices: how to draft with the first layers, where to leave early.

A draft of g tokens by k layers costs g times such a step, and a pass over g + 1 tokens. It is
expected to give 1 + mean(min(run, g)) tokens, where a token's run is how many from there on the k
layers guess right in a row along the text. The gain is that over one token for each pass of one.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from chalot.calibrate.clock import Costs
from chalot.calibrate.depths import Head, Looked
from chalot.calibrated import LONGEST_DRAFT, MOST_MARGIN, Drafting, Exit

LEAST_GAIN = 1.05  # below it drafting stays off
AGREE = 0.99  # of the tokens that leave early, so many must agree
MARGINS = (*np.arange(0.25, 10, 0.25).tolist(), *np.arange(10, MOST_MARGIN + 1, 2.0).tolist())


def drafts(looked: Looked, costs: Costs) -> Iterator[tuple[int, Drafting]]:
    """(size of the head, draft) for every depth, head and length; `on` is for the best to say."""
    full = max(looked.tops)
    for size, tops in looked.tops.items():
        for k, top in enumerate(tops, 1):
            same = top == looked.final
            runs = looked.runs(same)
            for g in range(1, LONGEST_DRAFT + 1):
                tokens = 1 + float(np.minimum(runs, g).mean())
                seconds = g * costs.draft(k, size) + costs.of_pass(g + 1)
                gain = tokens * costs.of_pass(1) / seconds
                kept = float(same.mean())
                yield size, Drafting(k, g, size != full, kept, gain, gain >= LEAST_GAIN)


def best_draft(looked: Looked, costs: Costs) -> tuple[Drafting, int]:
    """The draft of the greatest gain, and the best size of a short head."""
    every = list(drafts(looked, costs))
    best = max((d for _, d in every), key=lambda d: d.gain)
    size = max((pair for pair in every if pair[1].short), key=lambda pair: pair[1].gain)[0]
    return best, size


def leads_at(
    looked: Looked, borders: tuple[int, ...], head: Head
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(layers, leads) at each border, as engine/early_exit.py adds them up."""
    before = np.zeros(len(looked.final), np.float32)
    top_before = np.full(len(looked.final), -1, np.int32)
    for b in borders:
        lead, top = looked.leads[head.size][b - 1], looked.tops[head.size][b - 1]
        before = np.where(top == top_before, lead + before, lead).astype(np.float32)
        top_before = top
        yield b, before


def left(
    looked: Looked, borders: tuple[int, ...], head: Head, margin: float
) -> dict[int, NDArray[np.bool_]]:
    """Which tokens leave at each border."""
    inside = np.ones(len(looked.final), bool)
    out = {}
    for b, lead in leads_at(looked, borders, head):
        out[b] = inside & (lead >= np.float32(margin))
        inside &= ~out[b]
    return out


def exits_at(
    looked: Looked, costs: Costs, borders: tuple[int, ...], head: Head, margin: float, layers: int
) -> tuple[Exit, ...]:
    """What leaving there with that margin comes to. `saves` is of all borders together."""
    gone, full = left(looked, borders, head, margin), max(looked.tops)
    saved = tested = 0.0
    inside = 1.0
    for b, which in gone.items():
        tested += inside * costs.head[head.size]
        saved += float(which.mean()) * (layers - b) * costs.layer
        inside -= float(which.mean())
    saves = (saved - tested) / costs.of_pass(1)

    def agree(b: int) -> float:
        which = gone[b]
        found = looked.tops[full][b - 1][which] == looked.final[which]
        return float(found.mean()) if which.any() else 1.0

    return tuple(Exit(b, margin, float(gone[b].mean()), agree(b), saves) for b in borders)


def best_exits(
    looked: Looked, costs: Costs, borders: tuple[int, ...], head: Head, layers: int
) -> tuple[Exit, ...]:
    """The borders that save most, each set by its least margin at which leaving tokens agree."""
    best: tuple[Exit, ...] = ()
    for count in range(1, len(borders) + 1):
        for some in combinations(borders, count):
            found = calibrated_exits(looked, costs, some, head, layers)
            if not best or found[0].saves > best[0].saves:
                best = found
    return best


def calibrated_exits(
    looked: Looked, costs: Costs, borders: tuple[int, ...], head: Head, layers: int
) -> tuple[Exit, ...]:
    """These borders, by the least margin at which AGREE of the tokens that leave agree."""
    for margin in MARGINS:
        found = exits_at(looked, costs, borders, head, float(margin), layers)
        gone = sum(e.leave for e in found)
        if not gone or sum(e.leave * e.agree for e in found) >= AGREE * gone:
            return found
    return found
