"""bfloat16 <-> float32 in numpy, which has no bfloat16: its bits travel as uint16.

bfloat16 is the upper half of a float32, so widening is exact: bits << 16. Narrowing rounds to
nearest, ties to even: (bits + 0x7FFF + lowest kept bit) >> 16; a NaN is kept quiet, so that the
addition cannot carry it into infinity. Integer operations only: the same bits on every machine.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

STORED: dict[str, np.dtype[Any]] = {  # types of numbers, as numpy holds them
    "bf16": np.dtype("<u2"),
    "f16": np.dtype("<f2"),
    "f32": np.dtype("<f4"),
}


def bf16_to_float32(
    bits: NDArray[np.uint16], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Values of bfloat16 bits, any shape; in `out` or a new array. Exact, NaN payloads included."""
    if out is None:
        out = np.empty(bits.shape, np.float32)
    np.left_shift(bits, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    return out


def float32_to_bf16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even; any shape. Past 3.39e38: infinite."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(values.shape)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFF_FFFF)) > np.uint32(0x7F80_0000)
    return np.where(is_nan, quiet_nan, rounded).astype(np.uint16)


def narrowed(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Floats as `dtype` of STORED, rounded to nearest. Raises OverflowError for what gets infinite.

    What is stored so already stays.
    """
    if values.dtype == STORED[dtype]:
        return values
    with np.errstate(over="ignore"):
        narrow = float32_to_bf16(values) if dtype == "bf16" else values.astype(STORED[dtype])
    if not np.array_equal(np.isinf(values), np.isinf(widened(narrow))):
        raise OverflowError
    return narrow


def widened(stored: NDArray[Any]) -> NDArray[Any]:
    """Numbers of one of STORED's types: uint16 are bfloat16's bits, floats stay."""
    return bf16_to_float32(stored) if stored.dtype == STORED["bf16"] else stored
