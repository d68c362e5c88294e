"""FastEWQ: the levels that EWQ would give blocks, guessed from the configuration alone.

The paper's (arXiv 2503.04704, section 4) has three features: weights of a block, its place, and how
many blocks there are. Here a small decision tree, fitted by benchmarks/fast_ewq.py on EWQ's own
decisions over models made for it, lies beside this file with how often it was right on models that
were held out, and how often saying the commonest level would have been.
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import log2

import msgspec

from chalot.model.config import ModelConfig
from chalot.model.layers import layer_tensors

FEATURES = ("place", "weights", "blocks")


class Leaf(msgspec.Struct, frozen=True, tag="leaf"):
    """How many blocks of each level, low, middle and raw, ended here."""

    counts: tuple[int, int, int]


class Branch(msgspec.Struct, frozen=True, tag="branch"):
    """`below` is taken where the feature is at most `at`."""

    feature: str
    at: float
    below: "Leaf | Branch"
    above: "Leaf | Branch"


Tree = Leaf | Branch


class Fitted(msgspec.Struct, frozen=True):
    """The tree, and its record. Shares are of blocks of models that were held out of the fit."""

    tree: Tree
    models: int
    blocks: int
    agreement: float
    majority: float  # of the level that is commonest in the other models
    error: float  # standard error, over models, of the difference of these two


@dataclass(frozen=True)
class Guess:
    """By block: a level, and a number that orders blocks as their entropies would."""

    levels: tuple[str, ...]
    order: tuple[float, ...]


def features(config: ModelConfig, block: int) -> dict[str, float]:
    """What the tree asks of a block. `place` goes from 0 to 1, `weights` is a logarithm."""
    matrices = [t for t in layer_tensors(config, block) if t.kind != "vector"]
    return {
        "place": block / max(config.layers - 1, 1),
        "weights": log2(sum(t.shape[0] * t.shape[1] for t in matrices)),
        "blocks": float(config.layers),
    }


def leaf(tree: Tree, of: dict[str, float]) -> tuple[int, int, int]:
    """The counts that a block comes to."""
    while isinstance(tree, Branch):
        tree = tree.below if of[tree.feature] <= tree.at else tree.above
    return tree.counts


def commonest(counts: tuple[int, int, int]) -> int:
    """The level, by number, that most have; the higher of equals."""
    return max(range(3), key=lambda i: (counts[i], i))


@cache
def fitted() -> Fitted:
    """The tree that this chalot has."""
    raw = resources.files("chalot").joinpath("plan", "fast_ewq.json").read_bytes()
    return msgspec.json.decode(raw, type=Fitted)


def guess(config: ModelConfig, names: tuple[str, ...] = ("low", "middle", "raw")) -> Guess:
    """EWQ's levels of all blocks, without their weights."""
    counts = [leaf(fitted().tree, features(config, i)) for i in range(config.layers)]
    means = tuple(sum(i * n for i, n in enumerate(c)) / max(sum(c), 1) for c in counts)
    return Guess(tuple(names[commonest(c)] for c in counts), means)
