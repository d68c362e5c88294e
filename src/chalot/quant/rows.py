"""Weights to codes of a row's own range, as NPZ files with a manifest hold them, and back.

    8, 4, 2 bits:  scale = (max - min) / (2^bits - 1), zero = round(-min / scale),
                   code = clip(round(w / scale + zero), 0, 2^bits - 1),  w = (code - zero) * scale
    1 bit:         scale = mean |w|, code = (w >= 0),                    w = (2 code - 1) * scale

A row without a range (max = min, or so near that the scale would be no normal float) is its largest
value again, exactly: code 1 and zero 0, or code 0 and zero 1, times its size. Codes of a row fill
whole bytes: 1 bit from the highest bit down, as numpy.packbits, 2 and 4 bits from the lowest up.
Every operation is one correctly rounded operation in a written order.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
BITS = (8, 4, 2, 1)
SMALLEST = np.finfo(F32).tiny  # below it a quotient has no full precision


@dataclass(frozen=True)
class Rows:
    """A matrix of codes: w = (codes - zero) * scale, or with 1 bit (2 codes - 1) * scale."""

    bits: int
    codes: NDArray[np.uint8]  # (rows, columns), one a byte
    scale: NDArray[np.float32]  # (rows,)
    zero: NDArray[np.float32]  # (rows,), whole numbers; 0 with 1 bit


def quantize_rows(weights: NDArray[np.float32], bits: int) -> Rows:
    """Codes of a finite float32 matrix (rows, columns) at 8, 4, 2 or 1 bits."""
    if bits not in BITS:
        raise ValueError(f"{bits} bits a weight; expected one of {BITS}")
    if bits == 1:
        scale = mean_size(weights)
        return Rows(1, (weights >= 0).astype(np.uint8), scale, np.zeros_like(scale))
    most = F32(2**bits - 1)
    high, low = weights.max(axis=1), weights.min(axis=1)
    with np.errstate(over="ignore"):
        scale = (high - low) / most
    scale = np.where(np.isfinite(scale), scale, high / most - low / most)
    flat = scale < SMALLEST
    scale[flat] = 1
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(weights / scale[:, None] + zero[:, None]), 0, most).astype(np.uint8)
    if flat.any():
        value = np.where(np.abs(high) >= np.abs(low), high, low)[flat]
        codes[flat] = (value > 0)[:, None]
        scale[flat], zero[flat] = np.abs(value), value < 0
    return Rows(bits, codes, scale, zero)


def dequantize_rows(coded: Rows) -> NDArray[np.float32]:
    """The matrix (rows, columns) float32 that codes stand for."""
    numbers = coded.codes.astype(F32)
    if coded.bits == 1:
        numbers = numbers + numbers - F32(1)
    else:
        numbers -= coded.zero[:, None]
    with np.errstate(over="ignore"):  # what is no float32 becomes Inf, which is refused by name
        out: NDArray[np.float32] = numbers * coded.scale[:, None]
    return out


def mean_size(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """(rows,) mean |w|: sums in float64 of halves on halves, the columns padded to a power of 2."""
    rows, columns = weights.shape
    total = np.zeros((rows, 1 << (columns - 1).bit_length()))
    np.abs(weights, out=total[:, :columns])
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    mean: NDArray[np.float32] = (total[:, 0] / columns).astype(F32)
    return mean


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row's codes."""
    return -(-columns * bits // 8)


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(rows, columns) codes -> (rows, row_bytes), the last byte filled with zeros."""
    if bits == 8:
        return codes
    if bits == 1:
        return np.packbits(codes, axis=1)
    per = 8 // bits
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // per) * per), np.uint8)
    padded[:, :columns] = codes
    out = padded[:, ::per].copy()
    for i in range(1, per):
        out |= padded[:, i::per] << np.uint8(i * bits)
    return out


def unpack_bits(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """All codes of a run of bytes, in order."""
    if bits == 8:
        return packed
    if bits == 1:
        return np.unpackbits(packed)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[:, None] >> shifts) & np.uint8(2**bits - 1)).reshape(-1)
