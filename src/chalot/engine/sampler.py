"""From logits to a token, the same on every machine.

Order of the rules: repetition penalty, temperature, top-k, top-p, min-p, then one draw. Candidates
stand in descending order of logit, then ascending id; probabilities come from the project's own
exponential and are summed one after another in float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from chalot.engine.randomness import uniform
from chalot.errors import ChalotError, KernelError

Exp = Callable[[NDArray[np.float32]], NDArray[np.float32]]


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

    RANGES = {
        "temperature": (0.0, 100.0),
        "top_k": (0, 1 << 24),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (0.01, 100.0),
        "repetition_window": (0, 1 << 24),
        "seed": (-(1 << 63), (1 << 64) - 1),
        "choice": (0, 1 << 32),
    }

    def __post_init__(self) -> None:
        for field in fields(self):
            low, high = self.RANGES[field.name]
            value = getattr(self, field.name)
            if not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise SamplingError(f"{field.name} is {value!r}; expected a number")
            if not low <= value <= high:
                raise SamplingError(f"{field.name} is {value}; expected {low} to {high}")


def penalized(
    ids: NDArray[np.int32],
    logits: NDArray[np.float32],
    before: Sequence[int],
    sampling: Sampling,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Candidates, with tokens of the recent text made less likely, each once (arXiv 1909.05858)."""
    if not repeats(before, sampling):
        return ids, logits
    seen = np.isin(ids, list(repeats(before, sampling)))
    factor = np.float32(sampling.repetition_penalty)
    less = np.where(logits > 0, logits / factor, logits * factor)
    return in_order(ids, np.where(seen, less, logits))


def repeats(before: Sequence[int], sampling: Sampling) -> set[int]:
    """The tokens that the repetition penalty meets."""
    if sampling.repetition_penalty == 1 or not sampling.repetition_window:
        return set()
    return set(before[-sampling.repetition_window :])


def in_order(
    ids: NDArray[np.int32], logits: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """By descending logit, then ascending id."""
    order = np.lexsort((ids, -logits))
    return ids[order], logits[order]


def wanted(before: Sequence[int], sampling: Sampling, vocabulary: int) -> int:
    """How many of the best candidates `choose` needs to see.

    A penalty above 1 only lowers: one of the best few stays among the best few and as many as the
    penalty meets. One below 1 lifts, and needs all, as does sampling without top-k.
    """
    few = 1 if sampling.temperature == 0 else sampling.top_k
    met = len(repeats(before, sampling))
    if not few or (met and sampling.repetition_penalty < 1):
        return vocabulary
    return min(few + met, vocabulary)


def choose(
    ids: NDArray[np.int32],
    logits: NDArray[np.float32],
    before: Sequence[int],
    sampling: Sampling,
    position: int,
    exp: Exp,
) -> int:
    """The token that follows `before` at `position`, of the `wanted` best candidates in order.

    Raises KernelError if the first id is -1: logits were not finite.
    """
    if ids[0] < 0:
        raise KernelError(
            "the model computed NaN or Inf; its file may be damaged (chalot verify FILE), "
            "or its weights overflow"
        )
    if sampling.repetition_penalty != 1:
        ids, logits = penalized(ids, logits, before, sampling)
    if sampling.temperature == 0:
        return int(ids[0])
    if sampling.top_k:
        ids, logits = ids[: sampling.top_k], logits[: sampling.top_k]
    scaled = logits / np.float32(sampling.temperature)
    weight = exp(scaled - scaled[0]).astype(np.float64)  # relative to the most likely
    sums = np.add.accumulate(weight)
    keep = len(ids)
    if sampling.top_p < 1:
        keep = int(np.searchsorted(sums, sampling.top_p * sums[-1], side="left")) + 1
    if sampling.min_p > 0:
        keep = min(keep, int(np.count_nonzero(weight >= sampling.min_p)))
    keep = max(1, min(keep, len(ids)))
    drawn = uniform(sampling.seed, sampling.choice, position) * sums[keep - 1]
    return int(ids[min(int(np.searchsorted(sums[:keep], drawn, side="right")), keep - 1)])
