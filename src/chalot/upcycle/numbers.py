"""Random numbers that every machine has: a function of (seed, tensor's name, place), and no state.

A number is the sum of the four 16-bit parts of a word, centred and scaled: near a normal one of
variance 1, and at most 3.47. The words are splitmix64's (engine/randomness.py) of one key for each
tensor.
"""

import numpy as np
from numpy.typing import NDArray

from chalot.engine.randomness import GOLDEN, MASK, mix

Floats = NDArray[np.float32]
MIDDLE = 2 * 65535  # the mean of four parts
UNIT = np.float32((12 / (4 * (65536**2 - 1))) ** 0.5)  # one over their standard deviation
AT_ONCE = 1 << 20  # numbers; the arrays on the way take some forty bytes for each


def key(seed: int, name: str) -> int:
    """64 bits of a seed and a name."""
    word = mix(seed & MASK)
    raw = name.encode()
    for at in range(0, len(raw), 8):
        word = mix(word ^ int.from_bytes(raw[at : at + 8], "little"))
    return word


def words(start: int, first: int, count: int) -> NDArray[np.uint64]:
    """Numbers `first`... of the splitmix64 sequence that begins at `start`."""
    x = np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    x += np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x


def bell(start: int, first: int, count: int) -> Floats:
    """Numbers `first`... (count,) of mean 0 and variance 1."""
    out = np.empty(count, np.float32)
    for at in range(0, count, AT_ONCE):
        parts = words(start, first + at, min(AT_ONCE, count - at)).view(np.uint16).reshape(-1, 4)
        total = parts.sum(axis=1, dtype=np.int32)  # whole: exact in any order
        out[at : at + AT_ONCE] = (total - MIDDLE).astype(np.float32) * UNIT
    return out
