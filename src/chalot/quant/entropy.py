"""Entropies of weights, and the bits that entropy-weighted quantisation gives blocks by them.

    softmax    H = -sum p log(p + eps), p = softmax of all weights of a tensor, in nats
               (EWQ, arXiv 2503.04704, section 3; eps = 0.01 there, 0 by default here)
    histogram  entropy of 128 equal bins between least and largest weight, in bits
    codes      entropy of the codes that a scheme makes of the tensor, in bits

    block entropy = mean over its tensors weighted by size
    mu, sigma over blocks, T = mu - X sigma:   H <= T low,   T < H <= mu middle,   H > mu raw

For small weights H = log N - variance / 2 + ..., so the softmax entropy ranks blocks by size and
variance, and with eps inside the log values differ in their ninth digit: all is float64, and a
plan says `log N - H` too. Sums are in numpy's order: the last digits may differ between machines.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Runs = Callable[[], Iterable[NDArray[np.float32]]]  # a tensor's rows, from the start each time
BINS = 128
LEVELS = ("low", "middle", "raw")  # ascending in bytes
INDISTINCT = 1e-6  # a spread of block entropies below this part of their size decides nothing


@dataclass(frozen=True)
class Entropy:
    """Of one tensor. `deficit` is how far it stays below that of equal weights."""

    entropy: float
    deficit: float
    weights: int


def softmax_entropy(runs: Runs, epsilon: float = 0.0) -> Entropy:
    """In nats, float64, two passes (three with epsilon) over the tensor; memory of one run."""
    largest, count = -math.inf, 0
    for w in runs():
        largest, count = max(largest, float(w.max())), count + w.size
    total = weighted = 0.0
    for w in runs():
        x = w.astype(np.float64).ravel() - largest
        e = np.exp(x)
        total += float(e.sum())
        weighted += float((e * x).sum())
    if epsilon == 0:
        entropy = math.log(total) - weighted / total
        return Entropy(entropy, math.log(count) - entropy, count)
    entropy = 0.0
    for w in runs():
        p = np.exp(w.astype(np.float64).ravel() - largest) / total
        entropy -= float((p * np.log(p + epsilon)).sum())
    even = -math.log(1 / count + epsilon)
    return Entropy(entropy, even - entropy, count)


def of_counts(counts: NDArray[np.int64]) -> Entropy:
    """In bits, of how often each of some values was seen."""
    total = int(counts.sum())
    p = counts[counts > 0] / total
    entropy = float(-(p * np.log2(p)).sum())
    return Entropy(entropy, math.log2(len(counts)) - entropy, total)


def histogram_entropy(runs: Runs, bins: int = BINS) -> Entropy:
    """In bits; a constant tensor has none."""
    low, high = math.inf, -math.inf
    for w in runs():
        low, high = min(low, float(w.min())), max(high, float(w.max()))
    counts = np.zeros(bins, np.int64)
    for w in runs():
        if high > low:
            at = (w.astype(np.float64).ravel() - low) * (bins / (high - low))
            counts += np.bincount(np.minimum(at.astype(np.int64), bins - 1), minlength=bins)
        else:
            counts[0] += w.size
    return of_counts(counts)


def codes_entropy(codes: Iterable[NDArray[np.uint8]], values: int) -> Entropy:
    """In bits, of codes below `values`."""
    counts = np.zeros(values, np.int64)
    for part in codes:
        counts += np.bincount(part.ravel(), minlength=values)
    return of_counts(counts)


def block_entropy(tensors: Sequence[Entropy]) -> Entropy:
    """The mean of a block's tensors, weighted by their sizes."""
    weights = sum(t.weights for t in tensors)
    return Entropy(
        sum(t.entropy * t.weights for t in tensors) / weights,
        sum(t.deficit * t.weights for t in tensors) / weights,
        weights,
    )


@dataclass(frozen=True)
class Decision:
    """What EWQ makes of block entropies. `levels` is by block, of LEVELS."""

    mean: float
    sigma: float
    threshold: float
    levels: tuple[str, ...]

    @property
    def indistinct(self) -> bool:
        """Whether the entropies differ by so little that rounding or chance decides."""
        return self.sigma < INDISTINCT * abs(self.mean)


def decide(entropies: Sequence[float], x: float = 1.0) -> Decision:
    """EWQ's rule over blocks (section 3.2 of the paper); sigma is over all blocks, not a sample."""
    mean = math.fsum(entropies) / len(entropies)
    sigma = math.sqrt(math.fsum((h - mean) ** 2 for h in entropies) / len(entropies))
    threshold = mean - x * sigma
    levels = tuple("low" if h <= threshold else "middle" if h <= mean else "raw" for h in entropies)
    return Decision(mean, sigma, threshold, levels)


def fit(
    entropies: Sequence[float],
    levels: Sequence[str],
    sizes: Sequence[Mapping[str, int]],
    budget: int,
    order: Sequence[str] = LEVELS,
) -> tuple[str, ...] | None:
    """Blocks' levels within a budget: demoted by ascending entropy, promoted by descending.

    `sizes[block][level]` are bytes. One step at a time, each block in turn, as the paper's
    algorithm does; equal entropies go by position. None if all at the least level are too large.
    """
    chosen = [order.index(level) for level in levels]
    total = sum(size[order[c]] for size, c in zip(sizes, chosen, strict=True))
    by_entropy = sorted(range(len(entropies)), key=lambda i: (entropies[i], i))

    def change(i: int, step: int) -> int:
        return sizes[i][order[chosen[i] + step]] - sizes[i][order[chosen[i]]]

    while total > budget:
        able = [i for i in by_entropy if chosen[i] > 0]
        if not able:
            return None
        for i in able:
            if total > budget:
                total += change(i, -1)
                chosen[i] -= 1
    for i in reversed(by_entropy):
        while chosen[i] + 1 < len(order) and total + change(i, 1) <= budget:
            total += change(i, 1)
            chosen[i] += 1
    return tuple(order[c] for c in chosen)
