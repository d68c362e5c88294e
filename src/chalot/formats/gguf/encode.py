"""float32 weights as the blocks of GGUF's types: the other direction of blocks.py.

Every encoder takes (blocks, weights) finite float32 and gives (blocks, bytes) uint8. Operations are
single float32 ones in a written order, so that a file does not depend on the machine. Types that
need no search (Q8_0, Q4_0, Q4_1, Q5_0, Q5_1) give the bytes of llama.cpp's reference. The others
search scales as llama.cpp does, by least squares over some twenty candidates, in units of a group's
largest weight; benchmarks/gguf_out.py compares their errors with llama.cpp's. So do TQ1_0 and
TQ2_0, where llama.cpp takes the largest weight: the same for weights that are ternary already.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chalot.formats.floats import float32_to_bf16
from chalot.formats.gguf.blocks import BY_NAME, BlockType
from chalot.formats.gguf.search import (
    grid_scales,
    nearest,
    over,
    peak,
    scales_and_minimums,
    signed_scales,
    ternary_scales,
)

Bytes = NDArray[Any]  # uint8
Floats = NDArray[np.float32]
Encoder = Callable[[Floats], Bytes]
F32 = np.float32


# ---- parts


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
    rounded: Floats = np.sign(x) * (whole + (size - whole >= F32(0.5)))
    return rounded


def _nibbles(codes: Bytes, run: int) -> Bytes:
    """Two codes a byte: of each 2 * run codes the first half low, the second half high."""
    pairs = codes.reshape(len(codes), -1, 2, run)
    packed: Bytes = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return packed.reshape(len(codes), -1)


def _pairs_of_bits(codes: Bytes) -> Bytes:
    """Four codes a byte: of each 128 codes the first 32 lowest."""
    runs = codes.reshape(len(codes), -1, 4, 32)
    packed: Bytes = runs[:, :, 0] | runs[:, :, 1] << 2 | runs[:, :, 2] << 4 | runs[:, :, 3] << 6
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
    codes = _away(x * over(F32(1), scale)).astype(np.int8)
    return np.concatenate([_half(scale), codes.view(np.uint8)], axis=1)


def _symmetric(x: Floats, reach: int) -> tuple[Floats, Bytes]:
    """Scale and codes of 0 .. 2 * reach - 1; the largest weight gets the code 0."""
    scale = peak(x) / F32(-reach)
    codes = (x * over(F32(1), scale) + F32(reach + 0.5)).astype(np.uint8)
    return scale, np.minimum(codes, np.uint8(2 * reach - 1))


def _affine(x: Floats, most: int) -> tuple[Floats, Floats, Bytes]:
    """Scale, least weight, and codes of 0 .. most between it and the largest."""
    least = x.min(axis=1, keepdims=True) + F32(0)  # no -0, of which machines differ
    scale = (x.max(axis=1, keepdims=True) - least) / F32(most)
    codes = ((x - least) * over(F32(1), scale) + F32(0.5)).astype(np.uint8)
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
    """Scales of 256 weights, and codes 0, 1, 2 for minus, nothing, plus."""
    scale = ternary_scales(x)
    return scale, (np.sign(x) * (np.abs(x) > _rounded(scale) / F32(2)) + F32(1)).astype(np.uint8)


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


# ---- searched scales (search.py)


def _common(scales: Floats, most: int) -> tuple[Floats, Floats]:
    """One float16 factor (blocks, 1) for all scales of a block, and whole numbers for each."""
    factor = peak(scales) / F32(-most)
    whole = np.clip(np.rint(scales * over(F32(1), factor)), -most, most - 1)
    return factor, whole


def _signed_codes(x: Floats, reach: int, factor: Floats, whole: Floats) -> Bytes:
    """The nearest codes, 0 .. 2 * reach - 1 for -reach .. reach - 1, of groups of 16 weights."""
    scale = (_rounded(factor) * whole)[:, :, None]
    codes = np.clip(np.rint(over(x.reshape(*whole.shape, -1), scale)), -reach, reach - 1)
    return (codes + F32(reach)).astype(np.uint8).reshape(x.shape)


def _q6_k(x: Floats) -> Bytes:
    factor, whole = _common(signed_scales(x, 32, 16), 128)
    codes = _signed_codes(x, 32, factor, whole)
    parts = [_nibbles(codes & 15, 64), _pairs_of_bits(codes >> 4)]
    return np.concatenate([*parts, whole.astype(np.int8).view(np.uint8), _half(factor)], axis=1)


def _q3_k(x: Floats) -> Bytes:
    factor, whole = _common(signed_scales(x, 4, 16), 32)
    codes = _signed_codes(x, 4, factor, whole)
    six = (whole + F32(32)).astype(np.uint8)
    high = (six >> 4).reshape(-1, 4, 4)
    packed = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    parts = [_planes(codes >> 2), _pairs_of_bits(codes & 3), _nibbles(six & 15, 8), packed]
    return np.concatenate([*parts, _half(factor)], axis=1)


def _whole(numbers: Floats, most: int) -> tuple[Floats, Floats]:
    """One float16 factor (blocks, 1) for all numbers >= 0 of a block, and 0 .. most for each."""
    factor = numbers.max(axis=1, keepdims=True) / F32(most)
    return factor, np.minimum(np.rint(numbers * over(F32(1), factor)), F32(most))


def _codes(x: Floats, most: int, scale: Floats, minimum: Floats) -> Bytes:
    """The nearest codes, (blocks, 256), of groups with these scales and minimums."""
    groups = x.reshape(*scale.shape, -1)
    codes = np.rint(over(groups + minimum[:, :, None], scale[:, :, None]))
    return np.clip(codes, 0, most).astype(np.uint8).reshape(x.shape)


def _q2_k(x: Floats) -> Bytes:
    scales, minimums = scales_and_minimums(x, 3, 16, -0.5, 15)
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
    scales, minimums = scales_and_minimums(x, 15, 32, -1.0, 20)
    (d, s), (dm, m) = _whole(scales, 63), _whole(minimums, 63)
    codes = _codes(x, 15, _rounded(d) * s, _rounded(dm) * m)
    return np.concatenate([_half(d), _half(dm), _k_scales(s, m), _nibbles(codes, 32)], axis=1)


def _q5_k(x: Floats) -> Bytes:
    scales, minimums = scales_and_minimums(x, 31, 32, -0.5, 15)
    (d, s), (dm, m) = _whole(scales, 63), _whole(minimums, 63)
    codes = _codes(x, 31, _rounded(d) * s, _rounded(dm) * m)
    parts = [_half(d), _half(dm), _k_scales(s, m), _planes(codes >> 4), _nibbles(codes & 15, 32)]
    return np.concatenate(parts, axis=1)


def _iq4_nl(x: Floats) -> Bytes:
    scale = grid_scales(x)
    codes = nearest(over(x, _rounded(scale)))
    return np.concatenate([_half(scale), _nibbles(codes, 16)], axis=1)


def _iq4_xs(x: Floats) -> Bytes:
    factor, whole = _common(grid_scales(x), 32)
    scale = (_rounded(factor) * whole)[:, :, None]
    codes = nearest(over(x.reshape(-1, 8, 32), scale)).reshape(x.shape)
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
    instead: str = "f16"


WRITABLE = {
    w.block.name.lower(): w
    for w in (
        Writable(BY_NAME["F32"], 0, _f32),
        Writable(BY_NAME["F16"], 1, _half),
        Writable(BY_NAME["BF16"], 32, _bf16),
        Writable(BY_NAME["Q8_0"], 7, _q8_0),
        Writable(BY_NAME["Q6_K"], 18, _q6_k, "q8_0"),
        Writable(BY_NAME["Q5_K"], 16, _q5_k, "q5_1"),
        Writable(BY_NAME["Q5_1"], 9, _q5_1),
        Writable(BY_NAME["Q5_0"], 8, _q5_0),
        Writable(BY_NAME["Q4_K"], 14, _q4_k, "q5_0"),
        Writable(BY_NAME["Q4_1"], 3, _q4_1),
        Writable(BY_NAME["Q4_0"], 2, _q4_0),
        Writable(BY_NAME["IQ4_NL"], 25, _iq4_nl),
        Writable(BY_NAME["IQ4_XS"], 30, _iq4_xs, "iq4_nl"),
        Writable(BY_NAME["Q3_K"], 11, _q3_k, "iq4_nl"),
        Writable(BY_NAME["Q2_K"], 10, _q2_k, "iq4_nl"),
        Writable(BY_NAME["TQ2_0"], 37, _tq2_0, "q4_0"),
        Writable(BY_NAME["TQ1_0"], 36, _tq1_0, "q4_0"),
    )
}


def encode(kind: Writable, rows: Floats) -> Bytes:
    """Rows (n, columns) as (n, bytes of a row); columns are a multiple of the block.

    Raises OverflowError if a number or a scale is too large for the type.
    """
    blocks = np.ascontiguousarray(rows, F32).reshape(-1, kind.block.weights)
    with np.errstate(over="ignore", invalid="ignore"):  # a scale past the end is found by _half
        return kind.encode(blocks).reshape(len(rows), -1)
