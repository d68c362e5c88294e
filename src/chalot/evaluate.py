"""Quality, measured: perplexity, and the divergence of a model from the one it was made from.

Protocol "chalot": disjoint windows of 512 tokens (or the context, if shorter), every token of a
window but the first is scored, a shorter last window is left out. Figures are never to be compared
with those of another protocol. Error bars are standard errors over windows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chalot.errors import ContextError
from chalot.load import Model

WINDOW = 512
PROTOCOL = f"chalot (disjoint windows of {WINDOW} tokens, all but the first scored)"


@dataclass(frozen=True)
class Quality:
    """What a text says of a model. Losses are in nats a token; KL is base || model."""

    tokens: int
    loss: float
    loss_error: float
    kl: float | None = None
    kl_error: float | None = None
    kl_median: float | None = None
    kl_99: float | None = None
    same_top: float | None = None  # share of tokens with the base's most likely token

    @property
    def perplexity(self) -> float:
        """e^loss."""
        return math.exp(min(self.loss, 700.0))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(tokens, vocabulary) log-probabilities in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def windows(ids: Sequence[int], size: int) -> Iterator[list[int]]:
    """Disjoint windows of a text, the short rest left out unless it is all there is."""
    if len(ids) < 2:
        raise ContextError(f"the text has {len(ids)} tokens; at least two are needed")
    if len(ids) < size:
        yield list(ids)
    for at in range(0, len(ids) - size + 1, size):
        yield list(ids[at : at + size])


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; not a number for one alone."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def compare(
    base: Model,
    others: Sequence[Model],
    ids: Sequence[int],
    progress: Callable[[int, int], None] = lambda *_: None,
    window: int = WINDOW,
) -> list[Quality]:
    """The base's quality, then that of each other model against it, on the same tokens.

    With another `window` it is another protocol.
    """
    size = min(window, *(m.context for m in (base, *others)))
    parts = list(windows(ids, size))
    losses: list[list[float]] = [[] for _ in range(len(others) + 1)]
    divergences: list[list[NDArray[np.float64]]] = [[] for _ in others]
    same = [0] * len(others)
    for done, part in enumerate(parts):
        truth = log_softmax(base.logits(part)[:-1])
        follows = np.array(part[1:])
        each = np.arange(len(follows))
        losses[0].append(float(-truth[each, follows].mean()))
        p, top = np.exp(truth), truth.argmax(axis=1)
        for i, model in enumerate(others):
            q = log_softmax(model.logits(part)[:-1])
            losses[i + 1].append(float(-q[each, follows].mean()))
            divergences[i].append((p * (truth - q)).sum(axis=1))
            same[i] += int((q.argmax(axis=1) == top).sum())
        progress(done + 1, len(parts))
    tokens = sum(len(p) - 1 for p in parts)
    out = [Quality(tokens, float(np.mean(losses[0])), standard_error(losses[0]))]
    for i, found in enumerate(divergences):
        every = np.concatenate(found)
        out.append(
            Quality(
                tokens,
                float(np.mean(losses[i + 1])),
                standard_error(losses[i + 1]),
                float(every.mean()),
                standard_error([float(d.mean()) for d in found]),
                float(np.median(every)),
                float(np.quantile(every, 0.99)),
                same[i] / tokens,
            )
        )
    return out
