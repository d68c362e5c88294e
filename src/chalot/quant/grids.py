"""The tables of the non-uniform 4-bit scheme: 256 levels of sixteen int8 values.

    level = 128 * sign + 64 * grid + magnitude
    table[level] = round(+-GRID[grid] * 2^((magnitude - 63) / 8))

The first grid has the code points of IQ4_NL (llama.cpp); the second is shifted, so that a group
whose mean leans to one side finds a grid that leans with it. Every file that uses the table has it.
"""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

GRIDS = (
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    (-123, -100, -79, -61, -45, -31, -18, -6, 5, 17, 29, 42, 57, 73, 93, 117),
)
MAGNITUDES = 64


def magnitude(m: int) -> float:
    """2^((m - 63) / 8) by correctly rounded square roots: the same bits on every platform."""
    return math.sqrt(math.sqrt(math.sqrt(math.ldexp(1.0, m - MAGNITUDES + 1))))


@cache
def nl4_tables() -> NDArray[np.int8]:
    """(256, 16) int8: the values of the sixteen codes at each level."""
    scale = np.array([magnitude(m) for m in range(MAGNITUDES)])  # (64,)
    grids = np.array(GRIDS, dtype=np.float64)  # (2, 16)
    half = np.rint(scale[None, :, None] * grids[:, None, :]).astype(np.int8).reshape(128, 16)
    tables = np.concatenate([half, -half])
    tables.setflags(write=False)
    return tables
