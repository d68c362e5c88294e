"""Entropy-weighted quantisation of a checkpoint's blocks (arXiv 2503.04704; `quant.entropy`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.errors import LimitError, SchemeError
from chalot.model.layers import TensorSpec
from chalot.quant import codes
from chalot.quant.entropy import (
    LEVELS,
    Decision,
    Entropy,
    block_entropy,
    codes_entropy,
    decide,
    fit,
    histogram_entropy,
    softmax_entropy,
)
from chalot.quant.packing import stored_bytes
from chalot.quant.scheme import SCHEMES, Scheme

Floats = NDArray[np.float32]
Read = Callable[[str, int, int | None], Floats]
RUN = 1 << 22  # numbers in memory at once
VARIANTS = ("softmax", "softmax-eps", "histogram", "codes")
EPSILON = 0.01  # the paper's, inside the logarithm
SAMPLE = (1024, 4096)  # a shape whose bytes order schemes


@dataclass(frozen=True)
class Blocks:
    """Blocks with their entropies, and what was decided. `names` are "0", "1", ..."""

    names: tuple[str, ...]
    entropies: tuple[Entropy, ...]
    decision: Decision
    levels: tuple[str, ...]


def levels_of(schemes: Sequence[Scheme]) -> dict[str, str]:
    """Level -> scheme: the widest is raw, then middle, then low; a fourth is for tight budgets.

    The paper has 16, 8, 4 and, "when memory is very tight", 1.58 bits.
    """
    ordered = sorted(schemes, key=lambda s: stored_bytes(s, *SAMPLE))
    if len(ordered) not in (3, 4):
        raise SchemeError(
            f"found {len(ordered)} schemes; ewq wants three, for raw, middle and low blocks, or "
            "four, as bf16,int8,nl4,nl2: the last for budgets that nothing else meets"
        )
    names = ("least", *LEVELS)[-len(ordered) :]
    return {level: str(s) for level, s in zip(names, ordered, strict=True)}


def tensor_entropy(read: Read, spec: TensorSpec, variant: str) -> Entropy:
    """One matrix, a run of rows at a time."""
    rows, columns = spec.shape
    size = max(16, RUN // columns // 16 * 16)

    def runs() -> Iterator[Floats]:
        for first in range(0, rows, size):
            yield read(spec.name, first, min(first + size, rows))

    if variant == "histogram":
        return histogram_entropy(runs)
    if variant == "codes":
        scheme = SCHEMES["nl4"]
        coded = (codes.quantize(run, scheme).codes[: len(run), :columns] for run in runs())
        return codes_entropy(coded, 16)
    return softmax_entropy(runs, EPSILON if variant == "softmax-eps" else 0.0)


def by_block(specs: list[TensorSpec]) -> dict[str, list[TensorSpec]]:
    """The matrices of each layer; embedding and head are no blocks, and stay as they are told."""
    found: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        if spec.kind != "vector" and spec.name.startswith("layers."):
            found.setdefault(spec.name.split(".")[1], []).append(spec)
    return found


def sizes(
    blocks: Mapping[str, list[TensorSpec]], schemes: Mapping[str, str]
) -> list[dict[str, int]]:
    """Bytes of each block at each level."""
    return [
        {
            level: sum(stored_bytes(SCHEMES[name], *s.shape) for s in specs)
            for level, name in schemes.items()
        }
        for specs in blocks.values()
    ]


def analyse(
    read: Read,
    specs: list[TensorSpec],
    variant: str,
    x: float,
    budget: int | None,
    schemes: Mapping[str, str],
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Blocks:
    """Entropies of all blocks, and a level for each; within `budget` bytes of blocks if given.

    `schemes` are the levels', ascending in bytes. Raises LimitError where all at the first of
    them are larger than the budget.
    """
    blocks = by_block(specs)
    found = []
    for n, (name, tensors) in enumerate(blocks.items()):
        found.append(block_entropy([tensor_entropy(read, s, variant) for s in tensors]))
        progress(f"block {name}", n + 1, len(blocks))
    entropies = [e.entropy for e in found]
    decision = decide(entropies, x)
    levels: tuple[str, ...] | None = decision.levels
    if budget is not None:
        bytes_of = sizes(blocks, schemes)
        levels = fit(entropies, decision.levels, bytes_of, budget, tuple(schemes))
        if levels is None:
            first, name = next(iter(schemes.items()))
            least = sum(s[first] for s in bytes_of)
            raise LimitError(f"{budget:,} bytes for the blocks; all at {name} take {least:,}")
    assert levels is not None
    return Blocks(tuple(blocks), tuple(found), decision, levels)


def details(blocks: Blocks, variant: str, x: float) -> dict[str, Any]:
    """What a plan says of how it was decided."""
    d = blocks.decision
    return {
        "variant": variant,
        "x": x,
        "mean": d.mean,
        "sigma": d.sigma,
        "threshold": d.threshold,
        "indistinct": d.indistinct,
        "blocks": {
            name: {
                "entropy": e.entropy,
                "deficit": e.deficit,
                "decided": decided,
                "level": level,
            }
            for name, e, decided, level in zip(
                blocks.names, blocks.entropies, d.levels, blocks.levels, strict=True
            )
        },
    }


def tensors_of(
    specs: list[TensorSpec], blocks: Blocks, schemes: Mapping[str, str], rest: Scheme
) -> dict[str, str]:
    """A scheme for every matrix."""
    return by_level(specs, dict(zip(blocks.names, blocks.levels, strict=True)), schemes, rest)


def by_level(
    specs: list[TensorSpec], level: Mapping[str, str], schemes: Mapping[str, str], rest: Scheme
) -> dict[str, str]:
    """A scheme for every matrix, by the level of its block."""
    return {
        s.name: schemes[level[s.name.split(".")[1]]] if s.name.startswith("layers.") else str(rest)
        for s in specs
        if s.kind != "vector"
    }
