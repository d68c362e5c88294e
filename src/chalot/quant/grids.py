"""The tables of schemes with levels: 256 levels of sixteen int8 values.

    level = 128 * sign + 64 * grid + magnitude
    table[level] = round(+-GRIDS[scheme][grid] * 2^((magnitude - 63) / 8)), zeros behind it

nl4: the first grid has the code points of IQ4_NL (llama.cpp); int4: even steps; nl3: the eight
points that leave least of groups of N(0, 1) and Student t5 (Lloyd's iteration); nl2: four points.
The second grid is shifted, so that a group whose mean leans to one side finds a grid that leans
with it. Every file that uses a table has it.
"""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from chalot.quant.scheme import Scheme

GRIDS: dict[str, tuple[tuple[float, ...], ...]] = {
    "nl4": (
        (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
        (-123, -100, -79, -61, -45, -31, -18, -6, 5, 17, 29, 42, 57, 73, 93, 117),
    ),
    "int4": (
        tuple(127 / 8 * i for i in range(-8, 8)),
        tuple(127 / 7.5 * (i + 0.5) for i in range(-8, 8)),
    ),
    "nl3": (
        (-127, -77, -44, -19, 3, 25, 51, 88),
        (-122, -64, -32, -8, 14, 40, 70, 109),
    ),
    "nl2": (
        tuple(127 / 31 * i for i in (-31, -13, 1, 17)),
        tuple(127 / 31 * i for i in (-31, -9, 7, 27)),
    ),
}
MAGNITUDES = 64


def magnitude(m: int) -> float:
    """2^((m - 63) / 8) by correctly rounded square roots: the same bits on every platform."""
    return math.sqrt(math.sqrt(math.sqrt(math.ldexp(1.0, m - MAGNITUDES + 1))))


@cache
def named_tables(name: str) -> NDArray[np.int8]:
    """(256, 16) int8: the values of the codes at each level of a scheme in GRIDS."""
    scale = np.array([magnitude(m) for m in range(MAGNITUDES)])  # (64,)
    grids = np.array(GRIDS[name], dtype=np.float64)  # (2, points)
    half = np.rint(scale[None, :, None] * grids[:, None, :]).astype(np.int8).reshape(128, -1)
    tables = np.zeros((256, 16), np.int8)
    tables[:, : half.shape[1]] = np.concatenate([half, -half])
    tables.setflags(write=False)
    return tables


def tables_of(scheme: Scheme) -> NDArray[np.int8] | None:
    """(256, 16) int8 tables that this version writes for a scheme; None if it has no levels."""
    return named_tables(scheme.name) if scheme.has_levels else None
