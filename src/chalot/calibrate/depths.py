"""What each depth of a model would say: its best token behind every layer, along a text.

A text is windows of one cache page. Behind each layer the final norm and the head are applied, as
they are behind the last: the whole head, and heads of fewer rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from chalot.kernels.program import PAGE, Batch
from chalot.model.cache import PageCache
from chalot.model.cache import Sequence as Place
from chalot.model.pieces import Handover, Maker, extended, handed
from chalot.model.transformer import head_name
from chalot.quant.packing import Matrix

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
SHORT = "short_head"


@dataclass(frozen=True)
class Head:
    """Rows of the head, of the tokens `ids`, ascending; None: all of them."""

    matrix: Matrix
    ids: Ints | None

    @property
    def size(self) -> int:
        """Tokens that it knows."""
        return self.matrix.shape[0]


@dataclass
class Looked:
    """Along a text of windows: (tokens,) arrays, or (layers - 1, tokens) from one layer on."""

    windows: list[int]  # tokens of each
    final: Ints  # best token behind all layers
    tops: dict[int, Ints]  # by the size of the head: best token behind 1, 2, ... layers
    leads: dict[int, Floats]  # of short heads: how far the best logit is ahead of the second
    ids: Ints  # the text
    states: dict[int, Floats]  # (tokens, hidden) behind so many layers, at borders

    def agreement(self, size: int) -> list[float]:
        """By depth, the share of tokens whose best is that of full depth."""
        return [float((top == self.final).mean()) for top in self.tops[size]]

    def runs(self, same: NDArray[np.bool_]) -> NDArray[np.int64]:
        """From each token on, how many in a row are `same`, within its window."""
        out = np.zeros(len(same) + 1, np.int64)
        ends = set(np.cumsum(self.windows).tolist())
        for i in range(len(same) - 1, -1, -1):
            behind = 0 if i + 1 in ends else out[i + 1]
            out[i] = behind + 1 if same[i] else 0
        return out[:-1]


def with_head(maker: Maker, head: Head) -> Maker:
    """A maker whose matrices have this head, as SHORT."""
    planes = maker.weights.planes.get(head_name(maker.config), 0)
    return replace(maker, weights=extended(maker.weights, SHORT, head.matrix, planes))


def look(
    maker: Maker,
    windows: Sequence[Sequence[int]],
    heads: Mapping[int, Head],
    borders: Sequence[int],
    progress: Callable[[int, int], None],
) -> Looked:
    """Run the windows, of PAGE tokens at most. States are kept at the borders."""
    config = maker.config
    given = Handover(config.hidden)
    layers = [maker.piece(range(i, i + 1), given if i else None) for i in range(config.layers)]
    whole = maker.piece(range(0), given, head_name(config)).runnable
    few = {
        size: with_head(maker, head).piece(range(0), given, SHORT, head.size).runnable
        for size, head in heads.items()
    }
    cache = PageCache(maker.cache, PAGE)
    full = config.vocabulary
    found: dict[int, list[list[Ints]]] = {size: [] for size in (full, *few)}
    leads: dict[int, list[list[Floats]]] = {size: [] for size in few}
    final: list[Ints] = []
    kept: dict[int, list[Floats]] = {b: [] for b in borders}
    for number, tokens in enumerate(windows):
        place, rows = Place(cache), np.arange(len(tokens), dtype=np.int32)
        place.reserve(len(tokens))
        ids = np.array(tokens, np.int32)
        batch = Batch(ids, rows, np.zeros_like(rows), cache.tables([place]), rows)
        tops: dict[int, list[Ints]] = {size: [] for size in found}
        ahead: dict[int, list[Floats]] = {size: [] for size in few}
        for i, piece in enumerate(layers):
            states = piece.states(handed(batch) if i else batch, cache.arena)
            given.rows[: len(states)] = states
            best = whole.best(handed(batch), cache.arena, 1)[0][:, 0]
            if i == config.layers - 1:
                final.append(best)
                continue
            tops[full].append(best)
            for size, runnable in few.items():
                two, logits = runnable.best(handed(batch), cache.arena, 2)
                known = heads[size].ids
                tops[size].append(two[:, 0] if known is None else known[two[:, 0]])
                ahead[size].append(logits[:, 0] - logits[:, 1])
            if i + 1 in kept:
                kept[i + 1].append(states.copy())
        for size in found:
            found[size].append(tops[size])
        for size in few:
            leads[size].append(ahead[size])
        place.close()
        progress(number + 1, len(windows))
    return Looked(
        [len(w) for w in windows],
        np.concatenate(final),
        {size: np.concatenate(some, axis=1) for size, some in found.items()},
        {size: np.concatenate(some, axis=1) for size, some in leads.items()},
        np.concatenate([np.array(w, np.int32) for w in windows]),
        {b: np.concatenate(some) for b, some in kept.items()},
    )
