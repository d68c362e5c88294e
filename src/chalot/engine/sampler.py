"""From logits to a token, the same on every machine.

Order of the rules: repetition penalty, frequency and presence penalties, temperature, top-k, top-p,
min-p, then one draw. The repetition penalty looks at all of the text, the other two at what was
generated alone (OpenAI's: logit - frequency * count - presence). Candidates stand in descending
order of logit, then ascending id; probabilities come from the project's own exponential and are
summed one after another in float64.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from chalot.engine.randomness import uniform
from chalot.errors import ChalotError, KernelError

Exp = Callable[[NDArray[np.float32]], NDArray[np.float32]]
NOT_FINITE = (
    "the model computed NaN or Inf; its file may be damaged (chalot verify FILE), "
    "or its weights overflow"
)


class SamplingError(ChalotError, ValueError):
    """A sampling option outside its range."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the most likely one."""

    temperature: float = 0.7
    top_k: int = 40  # 0: all
    top_p: float = 0.9
    min_p: float = 0.05  # of the most likely token's probability
    repetition_penalty: float = 1.0  # once a token among the last `repetition_window`
    repetition_window: int = 64
    seed: int = 0
    choice: int = 0  # which of several answers to one prompt
    presence_penalty: float = 0.0  # once a token that was generated before
    frequency_penalty: float = 0.0  # each time that it was

    RANGES = {
        "temperature": (0.0, 100.0),
        "top_k": (0, 1 << 24),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (0.01, 100.0),
        "repetition_window": (0, 1 << 24),
        "seed": (-(1 << 63), (1 << 63) - 1),  # what JSON of every kind of file here holds
        "choice": (0, 1 << 32),
        "presence_penalty": (-2.0, 2.0),
        "frequency_penalty": (-2.0, 2.0),
    }

    def __post_init__(self) -> None:
        for field in fields(self):
            low, high = self.RANGES[field.name]
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or value != value:
                raise SamplingError(f"{field.name} is {value!r:.60}; expected a number")
            if not low <= value <= high:
                raise SamplingError(f"{field.name} is {value!r:.60}; expected {low} to {high}")
            if isinstance(field.default, int) and not isinstance(value, int):
                raise SamplingError(f"{field.name} is {value}; expected a whole number")


def penalized(
    ids: NDArray[np.int32],
    logits: NDArray[np.float32],
    before: Sequence[int],
    sampling: Sampling,
    start: int = 0,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Candidates, with tokens of the recent text made less likely, each once (arXiv 1909.05858).

    Those of `before[start:]` become less likely by the presence and frequency penalties too.
    """
    recent, counts = repeats(before, sampling), counted(before, sampling, start)
    if not (recent or counts):
        return ids, logits
    if recent:
        factor = np.float32(sampling.repetition_penalty)
        less = np.where(logits > 0, logits / factor, logits * factor)
        logits = np.where(np.isin(ids, list(recent)), less, logits)
    if counts:
        of, once = sampling.frequency_penalty, sampling.presence_penalty
        less = np.array([of * counts[i] + once if i in counts else 0.0 for i in ids.tolist()])
        logits = logits - less.astype(np.float32)
    return in_order(ids, logits)


def repeats(before: Sequence[int], sampling: Sampling) -> set[int]:
    """The tokens that the repetition penalty meets."""
    if sampling.repetition_penalty == 1 or not sampling.repetition_window:
        return set()
    return set(before[-sampling.repetition_window :])


def counted(before: Sequence[int], sampling: Sampling, start: int) -> Counter[int]:
    """The tokens that presence and frequency penalties meet, and how often they were generated."""
    if not (sampling.presence_penalty or sampling.frequency_penalty):
        return Counter()
    return Counter(before[start:])


def in_order(
    ids: NDArray[np.int32], logits: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """By descending logit, then ascending id."""
    order = np.lexsort((ids, -logits))
    return ids[order], logits[order]


def wanted(before: Sequence[int], sampling: Sampling, vocabulary: int, start: int = 0) -> int:
    """How many of the best candidates `choose` needs to see.

    A penalty that lowers leaves the best few among the best few and as many as it meets. One that
    lifts (a repetition penalty below 1, others below 0) needs all, as does sampling without top-k.
    """
    few = 1 if sampling.temperature == 0 else sampling.top_k
    recent, counts = repeats(before, sampling), counted(before, sampling, start)
    least = min(sampling.presence_penalty, sampling.frequency_penalty)
    if not few or (recent and sampling.repetition_penalty < 1) or (counts and least < 0):
        return vocabulary
    return min(few + len(recent) + len(counts), vocabulary)


def choose(
    ids: NDArray[np.int32],
    logits: NDArray[np.float32],
    before: Sequence[int],
    sampling: Sampling,
    position: int,
    exp: Exp,
    start: int = 0,
) -> int:
    """The token that follows `before` at `position`, of the `wanted` best candidates in order.

    `before[start:]` was generated, what comes before it was given. Raises KernelError if the first
    id is -1: logits were not finite.
    """
    if ids[0] < 0:
        raise KernelError(NOT_FINITE)
    ids, logits = penalized(ids, logits, before, sampling, start)
    if sampling.temperature == 0:
        return int(ids[0])
    if sampling.top_k:
        ids, logits = ids[: sampling.top_k], logits[: sampling.top_k]
    scaled = logits / np.float32(sampling.temperature)
    weight = exp(scaled - scaled[0]).astype(np.float64)  # relative to the most likely
    sums = np.add.accumulate(weight)
    keep = len(ids)
    if sampling.top_p < 1:
        keep = int(sums.searchsorted(sampling.top_p * sums[-1])) + 1
    if sampling.min_p > 0:
        keep = min(keep, int(np.count_nonzero(weight >= sampling.min_p)))
    keep = max(1, min(keep, len(ids)))
    drawn = uniform(sampling.seed, sampling.choice, position) * sums[keep - 1]
    return int(ids[min(int(sums[:keep].searchsorted(drawn, "right")), keep - 1)])
