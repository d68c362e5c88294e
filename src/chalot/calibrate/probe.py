"""The supervisor: does the state behind a prompt say whether leaving early will agree?

A prompt is the beginning of a window; it is "simple" where, over the tokens that follow it, the
shallow layers' best token is the model's more often than in the median prompt. A ridge regression
on the state of its last token, behind the shallow layers, is made on half of the windows and judged
on the other half, by its AUROC: beside 0.5, which the commoner answer gets, and that of the
prompt's length alone. It is used only where it beats both by more than two standard errors.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chalot.calibrated import Supervisor

STEP, FOLLOWING = 24, 16  # tokens between the ends of prompts; tokens that are predicted
FEWEST = 40  # prompts of each half
RIDGE = (1.0, 10.0, 100.0, 1000.0)

Floats = NDArray[np.float64]


def auroc(scores: Sequence[float] | Floats, truth: NDArray[np.bool_]) -> float:
    """The chance that one of the true has the higher score than one of the others; ties half."""
    values = np.asarray(scores, np.float64)
    yes, no = values[truth], values[~truth]
    if not len(yes) or not len(no):
        return 0.5
    more = (yes[:, None] > no).sum() + 0.5 * (yes[:, None] == no).sum()
    return float(more / (len(yes) * len(no)))


def standard_error(area: float, yes: int, no: int) -> float:
    """Of an AUROC (Hanley and McNeil 1982)."""
    if not yes or not no:
        return math.inf
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    var = area * (1 - area) + (yes - 1) * (q1 - area**2) + (no - 1) * (q2 - area**2)
    return math.sqrt(max(var, 0.0) / (yes * no))


def ridge(x: Floats, y: Floats, strength: float) -> tuple[Floats, float]:
    """Weights and bias of the regression of y on x, (samples, features)."""
    mean, middle = x.mean(axis=0), y.mean()
    centred = x - mean
    square = centred.T @ centred + strength * len(x) * np.eye(x.shape[1]) * centred.var()
    weights = np.linalg.solve(square + 1e-9 * np.eye(len(square)), centred.T @ (y - middle))
    return weights, float(middle - mean @ weights)


def supervise(
    states: NDArray[np.float32], same: NDArray[np.bool_], windows: Sequence[int]
) -> Supervisor | None:
    """A probe of `states` (tokens, hidden) for `same` (tokens,); None for too short a text."""
    last, length, share, half = [], [], [], []
    start = 0
    for number, size in enumerate(windows):
        for end in range(STEP, size - FOLLOWING + 1, STEP):
            last.append(start + end - 1)
            length.append(end)
            share.append(float(same[start + end - 1 : start + end - 1 + FOLLOWING].mean()))
            half.append(number % 2)
        start += size
    first = np.array(half, int) == 0
    if first.sum() < FEWEST or (~first).sum() < FEWEST:
        return None
    simple = np.array(share) > np.median(np.array(share)[first])
    x = states[last].astype(np.float64)
    y = np.where(simple, 1.0, -1.0)
    train = np.flatnonzero(first)
    fold = np.arange(len(train)) < len(train) // 2

    def foretells(strength: float) -> float:
        out = 0.0
        for of in (train[fold], train[~fold]):
            rest = np.setdiff1d(train, of)
            out += auroc(predicted(x[rest], *ridge(x[of], y[of], strength)), simple[rest])
        return out

    strength = max(RIDGE, key=foretells)
    weights, bias = ridge(x[train], y[train], strength)
    held = ~first
    area = auroc(predicted(x[held], weights, bias), simple[held])
    by_length = auroc(np.array(length, float)[held], simple[held])
    by_length = max(by_length, 1 - by_length)
    yes = int(simple[held].sum())
    error = standard_error(area, yes, int(held.sum()) - yes)
    common = max(yes, int(held.sum()) - yes) / int(held.sum())
    return Supervisor(
        auroc=area,
        length_auroc=by_length,
        majority=common,
        error=error,
        prompts=int(held.sum()),
        on=bool(area - max(by_length, 0.5) > 2 * error),
        weights=tuple(weights.tolist()),
        bias=bias,
    )


def predicted(x: Floats, weights: Floats, bias: float) -> Floats:
    """Above 0: simple."""
    return np.asarray(x @ weights + bias)
