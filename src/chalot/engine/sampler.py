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
    logits: NDArray[np.float32], before: Sequence[int], sampling: Sampling
) -> NDArray[np.float32]:
    """Logits with tokens of the recent text made less likely, each once (arXiv 1909.05858, 4.1)."""
    window = sampling.repetition_window
    if sampling.repetition_penalty == 1 or not window:
        return logits
    seen = np.array(sorted(set(before[-window:])), np.int64)
    if not len(seen):
        return logits
    out = logits.copy()
    factor = np.float32(sampling.repetition_penalty)
    out[seen] = np.where(out[seen] > 0, out[seen] / factor, out[seen] * factor)
    return out


def candidates(logits: NDArray[np.float32], top_k: int) -> NDArray[np.int64]:
    """Ids in descending order of logit, then ascending id; the first `top_k` of them if not 0."""
    if 0 < top_k < len(logits):
        least = np.partition(logits, len(logits) - top_k)[len(logits) - top_k]
        ids = np.flatnonzero(logits >= least)  # ties of the last one included, in ascending order
        return ids[np.argsort(-logits[ids], kind="stable")][:top_k]
    return np.argsort(-logits, kind="stable")


def sample(
    logits: NDArray[np.float32],
    before: Sequence[int],
    sampling: Sampling,
    position: int,
    exp: Exp,
) -> int:
    """The token that follows `before` at `position`, from logits (vocabulary,).

    Raises KernelError for logits that are not finite.
    """
    top = int(np.argmax(logits))  # the first of equals; NaN, if there is any
    if not np.isfinite(logits[top]):
        raise KernelError(
            "the model computed NaN or Inf; its file may be damaged (chalot verify FILE), "
            "or its weights overflow"
        )
    changed = penalized(logits, before, sampling)
    if sampling.temperature == 0:
        return top if changed is logits else int(np.argmax(changed))
    logits = changed
    ids = candidates(logits, sampling.top_k)
    scaled = logits[ids] / np.float32(sampling.temperature)
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
