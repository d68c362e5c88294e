"""float32 weights as the blocks of GGUF's types: the other direction of gguf_blocks.py.

Every encoder takes (blocks, weights) finite float32 and gives (blocks, bytes) uint8. Operations are
single float32 ones in a written order, so that a file does not depend on the machine. Types that
need no search (Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, TQ1_0, TQ2_0) give the bytes of llama.cpp's reference.
The others search scales as llama.cpp does, by least squares over some twenty candidates, in units
of a group's largest weight; benchmarks/gguf_out.py compares their errors with llama.cpp's.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chalot.formats.floats import float32_to_bf16
from chalot.formats.gguf_blocks import BY_NAME, IQ4_GRID, BlockType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Encoder = Callable[[Floats], Bytes]
F32 = np.float32


# ---- parts


def _sum(x: Floats) -> Floats:
    """Sums over the last axis, a power of two long, as a tree of halves; that axis stays, as 1."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def _over(a: Floats | NDArray[np.float32], b: Floats) -> Floats:
    """a / b, and 0 where b is 0 or too small to divide by."""
    small = np.abs(b) < F32(2.0**-126)
    return np.where(small, F32(0), a / np.where(small, F32(1), b)).astype(F32)


def _peak(x: Floats) -> Floats:
    """(..., 1): the number of largest magnitude, its sign kept; of equal ones the first."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)


def _half(numbers: Floats) -> Bytes:
    """(blocks, 2 n) of (blocks, n) float32. Raises OverflowError past float16's 65,504."""
    with np.errstate(over="ignore"):
        narrow = numbers.astype("<f2")
    if not np.isfinite(narrow).all():
        raise OverflowError
    return np.ascontiguousarray(narrow).view(np.uint8)


def _rounded(numbers: Floats) -> Floats:
    """What `_half` keeps of numbers."""
    with np.errstate(over="ignore"):
        return numbers.astype("<f2").astype(F32)


def _away(x: Floats) -> Floats:
    """Rounded to whole numbers, halves away from zero, as C's roundf."""
    size = np.abs(x)
    whole = np.floor(size)
    return np.sign(x) * (whole + (size - whole >= F32(0.5)))


def _nibbles(codes: Bytes, run: int) -> Bytes:
    """Two codes a byte: of each 2 * run codes the first half low, the second half high."""
    pairs = codes.reshape(len(codes), -1, 2, run)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1)


def _pairs_of_bits(codes: Bytes) -> Bytes:
    """Four codes a byte: of each 128 codes the first 32 lowest."""
    runs = codes.reshape(len(codes), -1, 4, 32)
    packed = runs[:, :, 0] | runs[:, :, 1] << 2 | runs[:, :, 2] << 4 | runs[:, :, 3] << 6
    return packed.reshape(len(codes), -1)


def _fifth_bits(codes: Bytes) -> Bytes:
    """(blocks, 4): bit 4 of 32 codes."""
    return np.packbits(codes >> 4 & 1, axis=1, bitorder="little")


def _planes(bits: Bytes) -> Bytes:
    """(blocks, 32) of (blocks, 256) bits: the first 32 are bit 0 of all bytes, then bit 1, ..."""
    return np.packbits(bits.reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)


# ---- numbers, and blocks of one scale


def _f32(x: Floats) -> Bytes:
    return np.ascontiguousarray(x, "<f4").view(np.uint8)


def _bf16(x: Floats) -> Bytes:
    bits = float32_to_bf16(x)
    if ((bits & 0x7F80) == 0x7F80).any():
        raise OverflowError
    return np.ascontiguousarray(bits, "<u2").view(np.uint8)


def _q8_0(x: Floats) -> Bytes:
    scale = np.abs(x).max(axis=1, keepdims=True) / F32(127)
    codes = _away(x * _over(F32(1), scale)).astype(np.int8)
    return np.concatenate([_half(scale), codes.view(np.uint8)], axis=1)


def _symmetric(x: Floats, reach: int) -> tuple[Floats, Bytes]:
    """Scale and codes of 0 .. 2 * reach - 1; the largest weight gets the code 0."""
    scale = _peak(x) / F32(-reach)
    codes = (x * _over(F32(1), scale) + F32(reach + 0.5)).astype(np.uint8)
    return scale, np.minimum(codes, np.uint8(2 * reach - 1))


def _affine(x: Floats, most: int) -> tuple[Floats, Floats, Bytes]:
    """Scale, least weight, and codes of 0 .. most between it and the largest."""
    least = x.min(axis=1, keepdims=True) + F32(0)  # no -0, of which machines differ
    scale = (x.max(axis=1, keepdims=True) - least) / F32(most)
    codes = ((x - least) * _over(F32(1), scale) + F32(0.5)).astype(np.uint8)
    return scale, least, np.minimum(codes, np.uint8(most))


def _q4_0(x: Floats) -> Bytes:
    scale, codes = _symmetric(x, 8)
    return np.concatenate([_half(scale), _nibbles(codes, 16)], axis=1)


def _q5_0(x: Floats) -> Bytes:
    scale, codes = _symmetric(x, 16)
    return np.concatenate([_half(scale), _fifth_bits(codes), _nibbles(codes & 15, 16)], axis=1)


def _q4_1(x: Floats) -> Bytes:
    scale, least, codes = _affine(x, 15)
    return np.concatenate([_half(scale), _half(least), _nibbles(codes, 16)], axis=1)


def _q5_1(x: Floats) -> Bytes:
    scale, least, codes = _affine(x, 31)
    parts = [_half(scale), _half(least), _fifth_bits(codes), _nibbles(codes & 15, 16)]
    return np.concatenate(parts, axis=1)


def _ternary(x: Floats) -> tuple[Floats, Bytes]:
    """The largest magnitude of 256 weights, and codes 0, 1, 2 for minus, nothing, plus."""
    scale = np.abs(x).max(axis=1, keepdims=True)
    return scale, (_away(x * _over(F32(1), scale)) + F32(1)).astype(np.uint8)


def _tq1_0(x: Floats) -> Bytes:
    scale, codes = _ternary(x)
    parts = []
    for begin, end, digits, run in ((0, 160, 5, 32), (160, 240, 5, 16), (240, 256, 4, 4)):
        value = np.zeros((len(x), run), np.uint16)
        for place in range(digits):
            at = begin + place * run
            value += codes[:, at : at + run] * np.uint16(3 ** (4 - place))
        assert at + run == end
        parts.append(((value * np.uint32(256) + 242) // 243).astype(np.uint8))
    return np.concatenate([*parts, _half(scale)], axis=1)


def _tq2_0(x: Floats) -> Bytes:
    scale, codes = _ternary(x)
    return np.concatenate([_pairs_of_bits(codes), _half(scale)], axis=1)


# ---- searched scales


class _Search:
    """The scale s that makes sum(w (x - s g)^2) least, for candidates of grid values g."""

    def __init__(self, x: Floats, weights: Floats) -> None:
        """`x` (groups, size), and how much each number's error counts."""
        self.weights = weights
        self.weighted = weights * x
        self.gain = np.zeros((len(x), 1), F32)  # how far the error sinks below that of s = 0
        self.scale = np.zeros((len(x), 1), F32)

    def offer(self, grid: Floats) -> None:
        """Keep the scale that fits these values, where it is better than all before."""
        product = _sum(self.weighted * grid)
        scale = _over(product, _sum(self.weights * grid * grid))
        gain = scale * product
        better = gain > self.gain
        self.gain = np.where(better, gain, self.gain)
        self.scale = np.where(better, scale, self.scale)


def _signed_scales(x: Floats, reach: int, size: int) -> Floats:
    """(blocks, groups) scales of codes -reach .. reach - 1, of groups of `size` weights."""
    groups = x.reshape(-1, size)
    peak = _peak(groups)
    unit = _over(groups, peak)  # the largest weight is 1
    search = _Search(unit, unit * unit)
    for step in range(-9, 10):
        grid = np.rint(unit * F32(-(reach + 0.1 * step)))
        search.offer(np.clip(grid, -reach, reach - 1, out=grid))
    return (search.scale * peak).reshape(len(x), -1)


def _common(scales: Floats, most: int) -> tuple[Floats, Floats]:
    """One float16 factor (blocks, 1) for all scales of a block, and whole numbers for each."""
    factor = _peak(scales) / F32(-most)
    whole = np.clip(np.rint(scales * _over(F32(1), factor)), -most, most - 1)
    return factor, whole


def _q6_k(x: Floats) -> Bytes:
    factor, whole = _common(_signed_scales(x, 32, 16), 128)
    scale = (_rounded(factor) * whole)[:, :, None]
    codes = np.clip(np.rint(_over(x.reshape(-1, 16, 16), scale)), -32, 31) + F32(32)
    codes = codes.astype(np.uint8).reshape(x.shape)
    parts = [_nibbles(codes & 15, 64), _pairs_of_bits(codes >> 4)]
    return np.concatenate([*parts, whole.astype(np.int8).view(np.uint8), _half(factor)], axis=1)


def _q3_k(x: Floats) -> Bytes:
    factor, whole = _common(_signed_scales(x, 4, 16), 32)
    scale = (_rounded(factor) * whole)[:, :, None]
    codes = np.clip(np.rint(_over(x.reshape(-1, 16, 16), scale)), -4, 3) + F32(4)
    codes = codes.astype(np.uint8).reshape(x.shape)
    six = (whole + F32(32)).astype(np.uint8)
    high = (six >> 4).reshape(-1, 4, 4)
    packed = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    parts = [_planes(codes >> 2), _pairs_of_bits(codes & 3), _nibbles(six & 15, 8), packed]
    return np.concatenate([*parts, _half(factor)], axis=1)


def _scales_and_minimums(
    x: Floats, most: int, size: int, first: float, steps: int
) -> tuple[Floats, Floats]:
    """(blocks, groups) scales and minimums m >= 0 of codes 0 .. most: w = scale * code - m."""
    groups = x.reshape(-1, size)
    largest = np.abs(groups).max(axis=1, keepdims=True)
    unit = _over(groups, largest)
    high = unit.max(axis=1, keepdims=True)
    low = np.minimum(unit.min(axis=1, keepdims=True), F32(0))
    mean = np.sqrt(_sum(unit * unit) / F32(size))
    weights = mean + np.abs(unit)
    sum_w, sum_x = _sum(weights), _sum(weights * unit)
    scale = (high - low) / F32(most)
    best = np.full(largest.shape, np.inf, F32)
    # the first candidate is plain rounding; a better one's minimum is where the next starts from
    for step in range(-1, steps + 1):
        reach = most if step < 0 else most + first + 0.1 * step
        codes = np.rint((unit - low) * _over(F32(reach), high - low))
        np.clip(codes, 0, most, out=codes)
        slope, offset = scale, low
        if step >= 0:
            wl = weights * codes
            slope, offset = _fit(sum_w, sum_x, _sum(wl), _sum(wl * codes), _sum(wl * unit))
        miss = slope * codes + offset - unit
        error = _sum(weights * miss * miss)
        better = (error < best) & (slope > 0)
        best = np.where(better, error, best)
        scale = np.where(better, slope, scale)
        low = np.where(better, offset, low)
    shape = (len(x), -1)
    return (scale * largest).reshape(shape), (-low * largest).reshape(shape)


def _fit(w: Floats, x: Floats, c: Floats, cc: Floats, xc: Floats) -> tuple[Floats, Floats]:
    """Slope and offset <= 0 of the weighted line through codes c and numbers x, from their sums."""
    spread = w * cc - c * c
    slope, offset = _over(w * xc - x * c, spread), _over(cc * x - c * xc, spread)
    positive = offset > 0  # only what is subtracted can be stored
    return np.where(positive, _over(xc, cc), slope), np.where(positive, F32(0), offset)


def _whole(numbers: Floats, most: int) -> tuple[Floats, Floats]:
    """One float16 factor (blocks, 1) for all numbers >= 0 of a block, and 0 .. most for each."""
    factor = numbers.max(axis=1, keepdims=True) / F32(most)
    return factor, np.minimum(np.rint(numbers * _over(F32(1), factor)), F32(most))


def _codes(x: Floats, most: int, scale: Floats, minimum: Floats) -> Bytes:
    """The nearest codes, (blocks, 256), of groups with these scales and minimums."""
    groups = x.reshape(*scale.shape, -1)
    codes = np.rint(_over(groups + minimum[:, :, None], scale[:, :, None]))
    return np.clip(codes, 0, most).astype(np.uint8).reshape(x.shape)


def _q2_k(x: Floats) -> Bytes:
    scales, minimums = _scales_and_minimums(x, 3, 16, -0.5, 15)
    (d, s), (dm, m) = _whole(scales, 15), _whole(minimums, 15)
    codes = _codes(x, 3, _rounded(d) * s, _rounded(dm) * m)
    both = s.astype(np.uint8) | m.astype(np.uint8) << 4
    return np.concatenate([both, _pairs_of_bits(codes), _half(d), _half(dm)], axis=1)


def _k_scales(scales: Floats, minimums: Floats) -> Bytes:
    """Eight scales and eight minimums of 6 bits each in 12 bytes."""
    s, m = scales.astype(np.uint8), minimums.astype(np.uint8)
    low, middle = s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6
    return np.concatenate([low, middle, (s[:, 4:] & 15) | m[:, 4:] << 4], axis=1)


def _q4_k(x: Floats) -> Bytes:
    scales, minimums = _scales_and_minimums(x, 15, 32, -1.0, 20)
    (d, s), (dm, m) = _whole(scales, 63), _whole(minimums, 63)
    codes = _codes(x, 15, _rounded(d) * s, _rounded(dm) * m)
    return np.concatenate([_half(d), _half(dm), _k_scales(s, m), _nibbles(codes, 32)], axis=1)


def _q5_k(x: Floats) -> Bytes:
    scales, minimums = _scales_and_minimums(x, 31, 32, -0.5, 15)
    (d, s), (dm, m) = _whole(scales, 63), _whole(minimums, 63)
    codes = _codes(x, 31, _rounded(d) * s, _rounded(dm) * m)
    parts = [_half(d), _half(dm), _k_scales(s, m), _planes(codes >> 4), _nibbles(codes & 15, 32)]
    return np.concatenate(parts, axis=1)


# ---- the non-uniform grid

GRID = np.array(IQ4_GRID, F32)
# middles between grid points are halves: floor(2 v) tells on which side of each a number lies
NEAREST = np.searchsorted((GRID[1:] + GRID[:-1]).astype(int), np.arange(-256, 257), "right")
NEAREST = NEAREST.astype(np.uint8)


def _nearest(v: Floats) -> Bytes:
    """Codes of the nearest grid points; of two the higher."""
    return NEAREST[np.floor(np.clip(v, -128, 128) * F32(2)).astype(np.int16) + 256]


def _grid_scales(x: Floats) -> Floats:
    """(blocks, groups) scales of the grid, of groups of 32 weights."""
    groups = x.reshape(-1, 32)
    peak = _peak(groups)
    unit = _over(groups, peak)
    search = _Search(unit, unit * unit)
    # the grid leans to one side: the largest weight may meet its lower end, or pass its upper one
    for end in (-IQ4_GRID[0], *range(IQ4_GRID[0] - 7, IQ4_GRID[0] + 8)):
        search.offer(GRID[_nearest(unit * F32(end))])
    return (search.scale * peak).reshape(len(x), -1)


def _iq4_nl(x: Floats) -> Bytes:
    scale = _grid_scales(x)
    codes = _nearest(_over(x, _rounded(scale)))
    return np.concatenate([_half(scale), _nibbles(codes, 16)], axis=1)


def _iq4_xs(x: Floats) -> Bytes:
    factor, whole = _common(_grid_scales(x), 32)
    scale = (_rounded(factor) * whole)[:, :, None]
    codes = _nearest(_over(x.reshape(-1, 8, 32), scale)).reshape(x.shape)
    six = (whole + F32(32)).astype(np.uint8)
    shifts = np.arange(0, 16, 2, dtype=np.uint16)
    high = np.zeros((len(x), 1), "<u2")
    for group in range(8):
        high[:, 0] |= (six[:, group] >> 4).astype(np.uint16) << shifts[group]
    parts = [_half(factor), high.view(np.uint8), _nibbles(six & 15, 1), _nibbles(codes, 16)]
    return np.concatenate(parts, axis=1)


# ---- the table


class Writable(NamedTuple):
    """A type that chalot writes. `file_type` is GGUF's number for files made mostly of it.

    `instead` holds matrices whose rows are no multiple of the block, as llama.cpp has it.
    """

    block: BlockType
    file_type: int
    encode: Encoder
    instead: str = "F16"


WRITABLE = {
    name: Writable(BY_NAME[name], *rest)
    for name, rest in {
        "F32": (0, _f32),
        "F16": (1, _half),
        "BF16": (32, _bf16),
        "Q8_0": (7, _q8_0),
        "Q6_K": (18, _q6_k, "Q8_0"),
        "Q5_K": (16, _q5_k, "Q5_1"),
        "Q5_1": (9, _q5_1),
        "Q5_0": (8, _q5_0),
        "Q4_K": (14, _q4_k, "Q5_0"),
        "Q4_1": (3, _q4_1),
        "Q4_0": (2, _q4_0),
        "IQ4_NL": (25, _iq4_nl),
        "IQ4_XS": (30, _iq4_xs, "IQ4_NL"),
        "Q3_K": (11, _q3_k, "IQ4_NL"),
        "Q2_K": (10, _q2_k, "IQ4_NL"),
        "TQ2_0": (37, _tq2_0, "Q4_0"),
        "TQ1_0": (36, _tq1_0, "Q4_0"),
    }.items()
}


def encode(kind: Writable, rows: Floats) -> Bytes:
    """Rows (n, columns) as (n, bytes of a row); columns are a multiple of the block.

    Raises OverflowError if a number or a scale is too large for the type.
    """
    blocks = np.ascontiguousarray(rows, F32).reshape(-1, kind.block.weights)
    with np.errstate(over="ignore", invalid="ignore"):  # a scale past the end is found by _half
        return kind.encode(blocks).reshape(len(rows), -1)
