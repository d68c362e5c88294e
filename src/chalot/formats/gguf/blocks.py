"""GGUF's tensor types: a row each, with its block's size and how a block becomes float32.

A quantised row is a run of blocks of 32 or 256 weights. Every decoder takes (blocks, bytes) uint8
and gives (blocks, weights) float32, each operation rounded once, in the order of the reference
implementation, so that its values are met exactly. Layouts:
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chalot.formats.floats import bf16_to_float32
from chalot.formats.gguf.grids import grid, signs

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Decoder = Callable[[Bytes], Floats]

IQ4_GRID = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_GRID = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1, doubled


class BlockType(NamedTuple):
    """A type of GGUF: `weights` in a block of `nbytes` bytes.

    `scheme` is chalot's scheme that loses least of it at about its size, "" for plain numbers;
    `decode` is None for types that are known by size only.
    """

    number: int
    name: str
    weights: int
    nbytes: int
    scheme: str = ""
    decode: Decoder | None = None


# ---- parts of blocks


def _half(blocks: Bytes, at: int) -> Floats:
    """(blocks, 1): the float16 at byte `at`."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(codes: Bytes, run: int) -> Bytes:
    """Codes of 4 bits: of each run of bytes first all the low halves, then all the high ones."""
    runs = codes.reshape(len(codes), -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(codes), -1)


def _pairs_of_bits(codes: Bytes) -> Bytes:
    """Codes of 2 bits: of each run of 32 bytes the lowest two bits, then the next, four times."""
    runs = codes.reshape(len(codes), -1, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return (runs >> shifts & np.uint8(3)).reshape(len(codes), -1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """(blocks, 32): the 32 bits from byte `at`, each as 0 or 16."""
    bits = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return bits << np.uint8(4)


def _planes(masks: Bytes) -> Bytes:
    """(blocks, 256) of 32 bytes: bit 0 of all of them, then bit 1 of all, ..."""
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    return (masks[:, None, :] >> shifts & np.uint8(1)).reshape(len(masks), -1)


def _scales_and_minimums(s: Bytes) -> tuple[Floats, Floats]:
    """Eight scales and eight minimums of 6 bits each out of 12 bytes."""
    low, middle, high = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minimums = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    return scales.astype(np.float32), minimums.astype(np.float32)


def _spread(factors: Floats, codes: NDArray[np.generic]) -> Floats:
    """Each group's factor times its codes: (blocks, groups), (blocks, weights)."""
    groups = codes.reshape(*factors.shape, -1).astype(np.float32)
    return factors[:, :, None] * groups


def _flat(values: Floats) -> Floats:
    return values.reshape(len(values), -1)


# ---- blocks


def _f32(b: Bytes) -> Floats:
    return np.ascontiguousarray(b).view("<f4").astype(np.float32)


def _f16(b: Bytes) -> Floats:
    return np.ascontiguousarray(b).view("<f2").astype(np.float32)


def _bf16(b: Bytes) -> Floats:
    return bf16_to_float32(np.ascontiguousarray(b).view("<u2"))


def _q4_0(b: Bytes) -> Floats:
    return _half(b, 0) * (_nibbles(b[:, 2:], 16).astype(np.int8) - 8).astype(np.float32)


def _q4_1(b: Bytes) -> Floats:
    return _half(b, 0) * _nibbles(b[:, 4:], 16).astype(np.float32) + _half(b, 2)


def _q5_0(b: Bytes) -> Floats:
    codes = _nibbles(b[:, 6:], 16) | _fifth_bits(b, 2)
    return _half(b, 0) * (codes.astype(np.int8) - 16).astype(np.float32)


def _q5_1(b: Bytes) -> Floats:
    codes = _nibbles(b[:, 8:], 16) | _fifth_bits(b, 4)
    return _half(b, 0) * codes.astype(np.float32) + _half(b, 2)


def _q8_0(b: Bytes) -> Floats:
    return b[:, 2:].view(np.int8).astype(np.float32) * _half(b, 0)


def _q2_k(b: Bytes) -> Floats:
    scales = _half(b, 80) * (b[:, :16] & 15).astype(np.float32)
    minimums = _half(b, 82) * (b[:, :16] >> 4).astype(np.float32)
    return _flat(_spread(scales, _pairs_of_bits(b[:, 16:80])) - minimums[:, :, None])


def _q3_k(b: Bytes) -> Floats:
    low = np.concatenate([b[:, 96:104] & 15, b[:, 96:104] >> 4], axis=1)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
    high = (b[:, None, 104:108] >> shifts & 3).reshape(len(b), 16)
    scales = _half(b, 108) * ((low | high << 4).astype(np.int8) - 32).astype(np.float32)
    codes = (_pairs_of_bits(b[:, 32:96]) | _planes(b[:, :32]) << 2).astype(np.int8) - 4
    return _flat(_spread(scales, codes))


def _q4_k(b: Bytes) -> Floats:
    scales, minimums = _scales_and_minimums(b[:, 4:16])
    weights = _spread(_half(b, 0) * scales, _nibbles(b[:, 16:], 32))
    return _flat(weights - (_half(b, 2) * minimums)[:, :, None])


def _q5_k(b: Bytes) -> Floats:
    scales, minimums = _scales_and_minimums(b[:, 4:16])
    codes = _nibbles(b[:, 48:], 32) | _planes(b[:, 16:48]) << 4
    return _flat(_spread(_half(b, 0) * scales, codes) - (_half(b, 2) * minimums)[:, :, None])


def _q6_k(b: Bytes) -> Floats:
    codes = _nibbles(b[:, :128], 64) | _pairs_of_bits(b[:, 128:192]) << 4
    scales = _half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    return _flat(_spread(scales, codes.astype(np.int8) - 32))


def _iq4_nl(b: Bytes) -> Floats:
    return _half(b, 0) * np.array(IQ4_GRID, np.float32)[_nibbles(b[:, 2:], 16)]


def _iq4_xs(b: Bytes) -> Floats:
    shifts = np.arange(0, 16, 2, dtype=np.uint16)
    high = (np.ascontiguousarray(b[:, 2:4]).view("<u2") >> shifts & 3).astype(np.uint8)
    scales = (_nibbles(b[:, 4:8], 1) | high << 4).astype(np.int8) - 32
    factors = _half(b, 0) * scales.astype(np.float32)
    return _flat(_spread(factors, np.array(IQ4_GRID, np.int8)[_nibbles(b[:, 8:], 16)]))


def _factors(blocks: Bytes, scales: Floats, quarter: float) -> Floats:
    """(blocks, groups, 1, 1): (scale + 1/2) of the block's own scale, halved or quartered."""
    factors: Floats = _half(blocks, 0) * (np.float32(0.5) + scales) * np.float32(quarter)
    return factors[:, :, None, None]


def _signed_points(name: str, codes: NDArray[np.integer[Any]], minuses: Floats) -> Floats:
    """(blocks, groups, points, coordinates): points of a code book, with signs to multiply with."""
    points: Floats = grid(name)[codes]
    return points * minuses.reshape(points.shape)


def _sign_bits(masks: Bytes) -> Floats:
    """A sign for each bit, lowest first: 1 or -1."""
    return 1 - 2 * np.unpackbits(masks, axis=1, bitorder="little").astype(np.float32)


def _packed_signs(words: NDArray[np.uint32]) -> tuple[Floats, Floats]:
    """Words of four indices of signs and a scale, as (signs of 32 weights, scale)."""
    shifts = np.array([0, 7, 14, 21], np.uint32)
    return signs()[words[:, :, None] >> shifts & 127], (words >> 28).astype(np.float32)


def _words(b: Bytes, first: int, last: int) -> NDArray[np.uint32]:
    return np.ascontiguousarray(b[:, first:last]).view("<u4")


def _iq2_xxs(b: Bytes) -> Floats:
    words = _words(b, 2, 66).reshape(len(b), 8, 2)
    minuses, scales = _packed_signs(words[:, :, 1])
    codes = np.ascontiguousarray(words[:, :, 0]).view(np.uint8).reshape(len(b), 8, 4)
    return _flat(_factors(b, scales, 0.25) * _signed_points("IQ2_XXS", codes, minuses))


def _iq2_xs(b: Bytes) -> Floats:
    codes = np.ascontiguousarray(b[:, 2:66]).view("<u2").reshape(len(b), 16, 2)
    scales = _nibbles(b[:, 66:74], 1).astype(np.float32)
    points = _signed_points("IQ2_XS", codes & 511, signs()[codes >> 9])
    return _flat(_factors(b, scales, 0.25) * points)


def _iq2_s(b: Bytes) -> Floats:
    shifts = np.array([0, 2, 4, 6], np.uint8)
    high = (b[:, 66:74, None] >> shifts & 3).reshape(len(b), 32).astype(np.uint16)
    codes = (b[:, 2:34] | high << 8).reshape(len(b), 16, 2)
    scales = _nibbles(b[:, 74:82], 1).astype(np.float32)
    points = _signed_points("IQ2_S", codes, _sign_bits(b[:, 34:66]))
    return _flat(_factors(b, scales, 0.25) * points)


def _iq3_xxs(b: Bytes) -> Floats:
    minuses, scales = _packed_signs(_words(b, 66, 98))
    points = _signed_points("IQ3_XXS", b[:, 2:66].reshape(len(b), 8, 8), minuses)
    return _flat(_factors(b, scales, 0.5) * points)


def _iq3_s(b: Bytes) -> Floats:
    high = np.unpackbits(b[:, 66:74], axis=1, bitorder="little").astype(np.uint16)
    codes = (b[:, 2:66] | high << 8).reshape(len(b), 8, 8)
    scales = _half(b, 0) * (1 + 2 * _nibbles(b[:, 106:110], 1)).astype(np.float32)
    points = _signed_points("IQ3_S", codes, _sign_bits(b[:, 74:106]))
    return _flat(scales[:, :, None, None] * points)


def _digits(codes: Bytes, digits: int, run: int) -> NDArray[np.int8]:
    """Base 3, most significant digit first, a byte being ceil(256 v / 243): -1, 0 or 1."""
    powers = np.array([1, 3, 9, 27, 81][:digits], np.uint8).reshape(1, 1, digits, 1)
    shifted = codes.reshape(len(codes), -1, 1, run) * powers  # modulo 256 on purpose
    found = (shifted.astype(np.uint16) * 3 >> 8).astype(np.int8) - np.int8(1)
    return found.reshape(len(codes), -1)


def _tq1_0(b: Bytes) -> Floats:
    parts = (_digits(b[:, :32], 5, 32), _digits(b[:, 32:48], 5, 16), _digits(b[:, 48:52], 4, 4))
    return _half(b, 52) * np.concatenate(parts, axis=1).astype(np.float32)


def _tq2_0(b: Bytes) -> Floats:
    return _half(b, 64) * (_pairs_of_bits(b[:, :64]).astype(np.int8) - 1).astype(np.float32)


def _mxfp4(b: Bytes) -> Floats:
    exponent = b[:, :1].astype(np.uint32)  # 2^(e - 128), of which 0 and 1 are denormal
    small = np.uint32(1 << 21) << np.minimum(exponent, 1)
    bits = np.where(exponent < 2, small, (np.maximum(exponent, 1) - 1) << np.uint32(23))
    codes = np.array(MXFP4_GRID, np.float32)[_nibbles(b[:, 1:], 16)]
    return bits.astype(np.uint32).view(np.float32) * codes


# Which scheme keeps a type best is measured: docs/gguf.md has the errors.
TYPES: dict[int, BlockType] = {
    t.number: t
    for t in (
        BlockType(0, "F32", 1, 4, "", _f32),
        BlockType(1, "F16", 1, 2, "", _f16),
        BlockType(30, "BF16", 1, 2, "", _bf16),
        BlockType(2, "Q4_0", 32, 18, "int4", _q4_0),
        BlockType(3, "Q4_1", 32, 20, "int6", _q4_1),
        BlockType(6, "Q5_0", 32, 22, "int8", _q5_0),
        BlockType(7, "Q5_1", 32, 24, "int8", _q5_1),
        BlockType(8, "Q8_0", 32, 34, "int8", _q8_0),
        BlockType(10, "Q2_K", 256, 84, "nl4", _q2_k),
        BlockType(11, "Q3_K", 256, 110, "int4", _q3_k),
        BlockType(12, "Q4_K", 256, 144, "int6", _q4_k),
        BlockType(13, "Q5_K", 256, 176, "int8", _q5_k),
        BlockType(14, "Q6_K", 256, 210, "int8", _q6_k),
        BlockType(20, "IQ4_NL", 32, 18, "nl4", _iq4_nl),
        BlockType(23, "IQ4_XS", 256, 136, "nl4", _iq4_xs),
        BlockType(34, "TQ1_0", 256, 54, "ternary", _tq1_0),
        BlockType(35, "TQ2_0", 256, 66, "ternary", _tq2_0),
        BlockType(39, "MXFP4", 32, 17, "int6", _mxfp4),
        BlockType(16, "IQ2_XXS", 256, 66, "int4", _iq2_xxs),
        BlockType(17, "IQ2_XS", 256, 74, "int4", _iq2_xs),
        BlockType(18, "IQ3_XXS", 256, 98, "int4", _iq3_xxs),
        BlockType(21, "IQ3_S", 256, 110, "int4", _iq3_s),
        BlockType(22, "IQ2_S", 256, 82, "int4", _iq2_s),
        # by size only: their code books are larger, or nothing that chalot runs uses them
        BlockType(9, "Q8_1", 32, 40),
        BlockType(15, "Q8_K", 256, 292),
        BlockType(19, "IQ1_S", 256, 50),
        BlockType(24, "I8", 1, 1),
        BlockType(25, "I16", 1, 2),
        BlockType(26, "I32", 1, 4),
        BlockType(27, "I64", 1, 8),
        BlockType(28, "F64", 1, 8),
        BlockType(29, "IQ1_M", 256, 56),
        BlockType(40, "NVFP4", 64, 36),
        BlockType(41, "Q1_0", 128, 18),
    )
}
_REPACKED = "rows woven for one kind of processor, which llama.cpp gave up; take the {} file"
_BITNET = "of bitnet.cpp, which lays it out as the machine that made the file does its sums, and "
_BITNET += "the file does not say how; take the model's safetensors, or a TQ1_0 or TQ2_0 file"
REFUSED = {  # types of other sizes than blocks': number -> what it is, what helps
    31: f"Q4_0_4_4, {_REPACKED.format('Q4_0')}",
    32: f"Q4_0_4_8, {_REPACKED.format('Q4_0')}",
    33: f"Q4_0_8_8, {_REPACKED.format('Q4_0')}",
    36: f"I2_S {_BITNET}",
    37: f"I8_S {_BITNET}",
    38: f"TL1 {_BITNET}",
}
BY_NAME = {t.name: t for t in TYPES.values()}
READABLE = tuple(t.name for t in TYPES.values() if t.decode is not None)


def decode(kind: BlockType, content: Bytes) -> Floats:
    """Weights of whole blocks, flat float32. `kind` is readable, `content` a run of its blocks.

    Scales that are infinite or NaN give weights that are; nothing is warned of here.
    """
    assert kind.decode is not None
    with np.errstate(invalid="ignore", over="ignore"):
        return kind.decode(content.reshape(-1, kind.nbytes)).reshape(-1)
