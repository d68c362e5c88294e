"""Quality, measured: perplexity, and the divergence of a model from the one it was made from.

Error bars are standard errors over windows. Logits are looked at some rows at a time: with a
vocabulary of 150,000 a window's would fill a gigabyte.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol as Interface

import numpy as np
from numpy.typing import NDArray

from chalot.errors import ContextError, KernelError
from chalot.evaluate.protocols import PROTOCOL, Protocol, windows

ROWS = 64  # logits of so many tokens at once


class Scored(Interface):
    """What `compare` asks of a model: a context, and logits of a text."""

    @property
    def context(self) -> int:
        """Most tokens of a window."""

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """(tokens, vocabulary)"""


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
    excess: float | None = None  # loss above the base's, window by window
    excess_error: float | None = None

    @property
    def perplexity(self) -> float:
        """e^loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def perplexity_error(self) -> float:
        """The standard error of the perplexity, to first order."""
        return self.perplexity * self.loss_error


@dataclass
class Window:
    """What one window says of one model: a number for each scored token."""

    losses: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same: int = 0


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(tokens, vocabulary) log-probabilities in float64. Raises KernelError for NaN or Inf."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    if not np.isfinite(x).all():
        raise KernelError("logits are NaN or Inf; is the file whole? `chalot verify` says so")
    return x


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; not a number for one alone."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def parts(model: Scored, ids: list[int]) -> Iterator[NDArray[np.float32]]:
    """A text's logits, ROWS tokens at a time."""
    in_parts = getattr(model, "logits_in_parts", None)
    if in_parts is not None:
        yield from in_parts(ids, ROWS)
        return
    logits = model.logits(ids)  # another engine's
    for at in range(0, len(ids), ROWS):
        yield logits[at : at + ROWS]


def measure(models: Sequence[Scored], ids: list[int], first: int) -> list[Window]:
    """One window, for each model; the first is the base. Tokens behind `first` are scored."""
    out = [Window() for _ in models]
    follows = np.array(ids[1:])
    for n, of_models in enumerate(zip(*(parts(m, ids) for m in models), strict=True)):
        start = max(first - n * ROWS, 0)
        truth = follows[n * ROWS + start : (n + 1) * ROWS]
        stop = start + len(truth)
        if not len(truth):
            continue
        base = log_softmax(of_models[0][start:stop])
        each, top = np.arange(len(truth)), base.argmax(axis=1)
        out[0].losses += (-base[each, truth]).tolist()
        p = np.exp(base) if len(models) > 1 else base
        for window, logits in zip(out[1:], of_models[1:], strict=True):
            q = log_softmax(logits[start:stop])
            window.losses += (-q[each, truth]).tolist()
            window.kl += (p * (base - q)).sum(axis=1).tolist()
            window.same += int((q.argmax(axis=1) == top).sum())
    return out


def summed_up(found: Sequence[Window], base: Sequence[Window]) -> Quality:
    """The windows of one model, beside the base's, which may be the same."""
    means = [float(np.mean(w.losses)) for w in found]
    tokens = sum(len(w.losses) for w in found)
    if found is base:
        return Quality(tokens, float(np.mean(means)), standard_error(means))
    more = [m - float(np.mean(w.losses)) for m, w in zip(means, base, strict=True)]
    every = np.concatenate([w.kl for w in found])
    return Quality(
        tokens,
        float(np.mean(means)),
        standard_error(means),
        float(every.mean()),
        standard_error([float(np.mean(w.kl)) for w in found]),
        float(np.median(every)),
        float(np.quantile(every, 0.99)),
        sum(w.same for w in found) / tokens,
        float(np.mean(more)),
        standard_error(more),
    )


def compare(
    base: Scored,
    others: Sequence[Scored],
    ids: Sequence[int],
    progress: Callable[[int, int], None] = lambda *_: None,
    window: int | None = None,
    protocol: Protocol = PROTOCOL,
    begin: int | None = None,
    done: Iterable[list[Window]] = (),
    keep: Callable[[list[Window]], None] = lambda _: None,
) -> list[Quality]:
    """The base's quality, then that of each other model against it, on the same tokens.

    With another `window` it is another protocol. `begin` is the token that begins a text, for
    protocols that put it there. `done` are windows measured before, `keep` is told each new one:
    so a run can be resumed. Raises ContextError for a text of fewer than two tokens.
    """
    models = [base, *others]
    size = min(window or protocol.window, *(m.context for m in models))
    whole = list(windows(ids, size))
    if protocol.first(len(whole[0])) > len(whole[0]) - 2:
        raise ContextError(
            f"a text of {len(ids)} tokens has none that protocol {protocol.name} scores; "
            "take a longer one"
        )
    found = list(done)[: len(whole)]
    for n in range(len(found), len(whole)):
        part = whole[n]
        if protocol.begins and begin is not None:
            part = [begin, *part[1:]]
        found.append(measure(models, part, protocol.first(len(part))))
        keep(found[-1])
        progress(n + 1, len(whole))
    by_model = [[w[i] for w in found] for i in range(len(models))]
    return [summed_up(of_one, by_model[0]) for of_one in by_model]
