"""Channel factors, powers of two, moved between a matrix's columns and what produces its input.

    W x = (W diag(s)) (diag(1 / s) x)

Columns of very different size share a group and a segment, and the small ones drown; channels of
very different size share an activation block. Factors s = activation^a / column^b, rounded to a
power of two, balance the two (SmoothQuant, arXiv 2211.10438; AWQ, arXiv 2306.00978). Being powers
of two they change no bit of the model that is not quantised.

Keys and queries meet in a product too, after rope, which mixes the dimensions i and i + half of a
head: one factor for each such pair keeps every score (`pair_factors`).
"""

import numpy as np
from numpy.typing import NDArray

# (a, b) in halves, tried in this order; the first folds nothing
CANDIDATES = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))
LARGEST = 20  # exponents stay within +-20
GAIN = 0.8  # a fold must bring the error below this part of it; 0.97 took noise for gain


def column_sums(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over the rows (columns,) of a matrix, one row after another: no machine's own order."""
    total = np.zeros(x.shape[1])
    for row in x:
        total += row
    return total


def channel_size(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """(columns,) root mean square of each column; 1 where a column is zero."""
    square = column_sums(x.astype(np.float64) ** 2) / max(len(x), 1)
    return np.sqrt(np.where(square > 0, square, 1.0))


def nearest_power(ratio: NDArray[np.float64]) -> NDArray[np.int64]:
    """round(log2(ratio)), by exponent and mantissa alone."""
    mantissa, exponent = np.frexp(ratio)
    return np.where(mantissa >= np.sqrt(0.5), exponent, exponent - 1).astype(np.int64)


def factors(
    activation: NDArray[np.float64], column: NDArray[np.float64], halves: tuple[int, int]
) -> NDArray[np.float32]:
    """(columns,) powers of two: (activation / its median)^a * (median / column)^b."""
    ratio = np.ones_like(activation)
    for size, power, sign in ((activation, halves[0], 1), (column, halves[1], -1)):
        relative = size / np.sort(size)[len(size) // 2]
        part = np.sqrt(relative) if power == 1 else relative
        if power:
            ratio = ratio * part if sign > 0 else ratio / part
    return np.ldexp(np.float32(1), np.clip(nearest_power(ratio), -LARGEST, LARGEST))


def pair_factors(keys: NDArray[np.float64], queries: NDArray[np.float64]) -> NDArray[np.float32]:
    """(kv_heads, pairs) powers of two that queries take, and keys give, for an int8 cache.

    Takes sums of squares (kv_heads, pairs) over tokens, those of all query heads that share a key
    head together. Keys are stored with one error for all channels, in proportion to their size, so
    the squared error of scores goes as sum(keys / f^2) * sum(queries * f^2), which is least where
    f^2 = sqrt(keys / queries). A head whose product that leaves above GAIN of what it was keeps 1.
    """
    some = (keys > 0) & (queries > 0)
    ratio = np.sqrt(np.sqrt(np.where(some, keys, 1.0) / np.where(some, queries, 1.0)))
    exponent = np.clip(nearest_power(ratio), -LARGEST, LARGEST)
    square = np.ldexp(1.0, 2 * exponent)

    def error(k: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
        product: NDArray[np.float64] = column_sums(k.T) * column_sums(q.T)
        return product

    gains = error(keys / square, queries * square) < GAIN * error(keys, queries)
    return np.ldexp(np.float32(1), np.where(gains[:, None], exponent, 0))
