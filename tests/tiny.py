"""Tiny models for tests: weights from whole random numbers, so that every platform has the same."""

import numpy as np
from numpy.typing import NDArray

from chalot.kernels.program import CACHE, Program
from chalot.model.config import ModelConfig, inverse_frequencies
from chalot.model.layers import model_tensors
from chalot.model.transformer import Weights, build
from chalot.quant.packing import Matrix, as_matrix
from chalot.quant.scheme import Scheme

# A scheme for each matrix, in the model's order: all that are coded, gate and up with offsets too.
EVERY = (
    *("row8", "int6", "row4", "int4", "ternary", "row2", "row1", "nl2"),
    *("sign", "nl4", "nl3", "row4", "row8", "nl2", "int6", "row2"),
)


def config(**changes: object) -> ModelConfig:
    """A Qwen2-like model with odd sizes."""
    fields: dict[str, object] = {
        "family": "qwen2",
        "hidden": 160,
        "layers": 2,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 24,
        "feed_forward": 200,
        "vocabulary": 301,
        "context": 1024,
        "norm_epsilon": 1e-6,
        "rope_theta": 10000.0,
        "tied": False,
        "query_key_value_bias": True,
    }
    return ModelConfig(**{**fields, **changes})  # type: ignore[arg-type]


def bell(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> NDArray[np.float32]:
    """About normal, exact in float32: sums of four whole numbers times a power of two."""
    whole = rng.integers(-(2**10), 2**10, (4, *shape)).sum(axis=0)
    return (whole / 1024 * scale).astype(np.float32)


def matrix(weights: NDArray[np.float32], scheme: str) -> Matrix:
    """A packed matrix."""
    return as_matrix(weights, Scheme.parse(scheme))


def weights(c: ModelConfig, schemes: dict[str, str], planes: int = 1, seed: int = 0) -> Weights:
    """Random weights; `schemes` gives each tensor or kind ("attention", ...) its scheme."""
    rng = np.random.Generator(np.random.Philox(seed))
    matrices, vectors, all_planes = {}, {}, {}
    for t in model_tensors(c):
        if t.kind == "vector":
            norm = t.name.endswith("norm")
            vectors[t.name] = bell(rng, t.shape, 0.125) + np.float32(1 if norm else 0)
        else:
            w = bell(rng, t.shape, 0.125)
            matrices[t.name] = matrix(w, schemes.get(t.name) or schemes.get(t.kind, schemes["*"]))
            if matrices[t.name].scheme.is_coded:
                all_planes[t.name] = planes
    return Weights(matrices, vectors, all_planes)


def program(c: ModelConfig, scheme: str = "nl4", planes: int = 1, cache: str = "") -> Program:
    """A whole tiny model in one scheme, "every", or "mixed", with a float16 cache by default."""
    matrices = [t.name for t in model_tensors(c) if t.kind != "vector"]
    some = {
        "mixed": {"*": "nl4", "attention": "int8", "head": "bf16", "embedding": "f16"},
        "every": {"*": "nl4", **dict(zip(matrices, EVERY, strict=False))},
    }
    w = weights(c, some.get(scheme, {"*": scheme}), planes)
    cache = cache or ("f16" if scheme == "mixed" else CACHE)
    return build(c, w, inverse_frequencies(c), cache)
