"""Codes of a block of 128 columns as bytes and back: the codings (docs/format.md, "Matrices").

A block's bytes are lines of 64: line j, or the j-th of a part, holds rows j, 4 + j, 8 + j, 12 + j
of a panel in four lanes of 16 bytes, and a byte's place in its lane is the column modulo 16. A
*set* is 16 columns, eight to a block. What a byte holds:

    bytes    one code; lines (group, half of the group, j)
    nibbles  two, sets 2 g and 2 g + 1; lines (group, j)
    sixes    the low four bits as nibbles, then the high two as crumbs
    threes   the low two bits as crumbs, then the high one as bits
    crumbs   four, sets 4 h to 4 h + 3; lines (h, j)
    bits     eight; lines (j)
    trits    five in base 3, below
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from chalot.quant.scheme import BITS, BYTES, CRUMBS, NIBBLES, SIXES, THREES, TRITS, Coding

Bytes = NDArray[np.uint8]
# Codes of one block of all panels are (panels, row % 4 = line, row / 4 = lane, set, 16) here: see
# `packing.by_line`. A pack gives (panels, bytes), an unpack takes them.


def pack_bytes(x: Bytes) -> Bytes:
    """One code a byte."""
    halves = x.reshape(*x.shape[:3], -1, 2, 16)  # panel, line, lane, group, half, column
    return flat(halves.transpose(0, 3, 4, 1, 2, 5))


def unpack_bytes(packed: Bytes) -> Bytes:
    """The inverse of `pack_bytes`."""
    x = packed.reshape(len(packed), -1, 2, 4, 4, 16)
    return lines(x.transpose(0, 3, 4, 1, 2, 5))


def pack_few(x: Bytes, bits: int) -> Bytes:
    """8 / bits codes a byte, of that many sets: nibbles, crumbs, bits."""
    each = 8 // bits
    sets = x.reshape(*x.shape[:3], -1, each, 16)  # panel, line, lane, run, set, column
    byte = np.bitwise_or.reduce(sets << place(bits), axis=4)
    return flat(byte.transpose(0, 3, 1, 2, 4))


def unpack_few(packed: Bytes, bits: int) -> Bytes:
    """The inverse of `pack_few`."""
    byte = packed.reshape(len(packed), -1, 4, 4, 1, 16)  # panel, run, line, lane, set, column
    sets = (byte >> place(bits)) & np.uint8((1 << bits) - 1)
    return lines(sets.transpose(0, 2, 3, 1, 4, 5))


def place(bits: int) -> Bytes:
    """How far each of the sets of a byte is shifted, as (sets, 1)."""
    return np.arange(0, 8, bits, dtype=np.uint8)[:, None]


def pack_sixes(x: Bytes) -> Bytes:
    """Low four bits as nibbles, high two as crumbs."""
    return np.concatenate([pack_few(x & np.uint8(15), 4), pack_few(x >> np.uint8(4), 2)], axis=1)


def unpack_sixes(packed: Bytes) -> Bytes:
    """The inverse of `pack_sixes`."""
    low, high = packed[:, :1024], packed[:, 1024:]
    return unpack_few(low, 4) | unpack_few(high, 2) << np.uint8(4)


def pack_threes(x: Bytes) -> Bytes:
    """Low two bits as crumbs, high one as bits."""
    return np.concatenate([pack_few(x & np.uint8(3), 2), pack_few(x >> np.uint8(2), 1)], axis=1)


def unpack_threes(packed: Bytes) -> Bytes:
    """The inverse of `pack_threes`."""
    low, high = packed[:, :512], packed[:, 512:]
    return unpack_few(low, 2) | unpack_few(high, 1) << np.uint8(2)


def pack_trits(x: Bytes) -> Bytes:
    """Five digits a byte: ceil(256 v / 243), v in base 3, the first digit the most significant.

    Digit n is then the n-th that carries out of repeated b -> 3 b modulo 256. Of line j:
    lines 0 to 3   sets 0 to 4 of rows j, 4 + j, 8 + j, 12 + j
    lines 4, 5     sets 5, 6, 7 of j - 4, then sets 5, 6 of j - 2
    last 32 bytes  set 7 of 2, lanes 0 and 1; lanes 2 and 3; of 3, lanes 0 and 1; lanes 2 and 3
    """
    whole = x[:, :, :, :5]
    rest = np.concatenate([x[:, :2, :, 5:], x[:, 2:, :, 5:7]], axis=3)
    last = x[:, 2:, :, 7].reshape(len(x), 2, 2, 1, 32)  # panel, line, lanes, -, byte
    last = np.concatenate([last.reshape(len(x), 1, 4, 32), np.zeros((len(x), 1, 1, 32), "u1")], 2)
    power = np.array([81, 27, 9, 3, 1], np.uint16)[:, None]
    out = []
    for digits in (whole, rest, last):
        v = (digits * power).sum(axis=-2, dtype=np.uint16)
        out.append(flat(((v * 256 + 242) // 243).astype(np.uint8)))
    return np.concatenate(out, axis=1)


def unpack_trits(packed: Bytes) -> Bytes:
    """The inverse of `pack_trits`; every byte is five digits."""
    b, digits = packed, []
    for _ in range(5):
        tripled = b.astype(np.uint16) * 3
        digits.append((tripled >> 8).astype(np.uint8))
        b = (tripled & 255).astype(np.uint8)
    each = np.stack(digits, axis=1)  # panel, digit, byte
    main = each[:, :, :384].reshape(len(packed), 5, 6, 4, 16).transpose(0, 2, 3, 1, 4)
    last = each[:, :4, 384:].reshape(len(packed), 2, 4, 1, 16)  # panel, line, lane
    near = np.concatenate([main[:, :2], main[:, 4:, :, :3]], axis=3)
    far = np.concatenate([main[:, 2:4], main[:, 4:, :, 3:], last], axis=3)
    return np.concatenate([near, far], axis=1)


PACKERS: dict[Coding, tuple[Callable[[Bytes], Bytes], Callable[[Bytes], Bytes]]] = {
    BYTES: (pack_bytes, unpack_bytes),
    SIXES: (pack_sixes, unpack_sixes),
    THREES: (pack_threes, unpack_threes),
    NIBBLES: (partial(pack_few, bits=4), partial(unpack_few, bits=4)),
    CRUMBS: (partial(pack_few, bits=2), partial(unpack_few, bits=2)),
    TRITS: (pack_trits, unpack_trits),
    BITS: (partial(pack_few, bits=1), partial(unpack_few, bits=1)),
}


def flat(x: Bytes) -> Bytes:
    """(panels, bytes)."""
    return np.ascontiguousarray(x).reshape(len(x), -1)


def lines(x: Bytes) -> Bytes:
    """(panels, line, lane, sets, 16) of what has the sets in two axes."""
    return np.ascontiguousarray(x).reshape(len(x), 4, 4, -1, 16)
