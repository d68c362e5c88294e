"""A scheme says how a matrix is stored: `Scheme.parse("nl4")` <-> `str(scheme)`.

Coded schemes follow one arithmetic (docs/format.md):

    w[r, k] = row_scale[r] * segment[r, k // S] * value (+ row_offset[r]),   value an int8 number
    with levels:  value = table[level[r, k // 32]][code[r, k]]
    without:      value = step * code[r, k] - middle, or the code as an int8 number

Dense schemes store the numbers themselves.
"""

from dataclasses import dataclass
from typing import NamedTuple

from chalot.errors import SchemeError

PANEL = 16  # rows that are stored together
GROUP = 32  # columns that share a level; columns are padded to it
BLOCK = 128  # columns that share an activation scale
ROW = 1 << 24  # a segment that is the whole row; matrices have no more columns


class Coding(NamedTuple):
    """How the codes of a block, 16 rows x 128 columns, lie in bytes (quant/codings.py)."""

    codes: int  # different codes
    block_bytes: int
    whole: bool  # the last block is stored whole too, else as many groups as there are


BYTES = Coding(256, 2048, whole=False)
SIXES = Coding(64, 1536, whole=True)
NIBBLES = Coding(16, 1024, whole=False)
THREES = Coding(8, 768, whole=True)
CRUMBS = Coding(4, 512, whole=True)
TRITS = Coding(3, 416, whole=True)  # five a byte, 130 places for the 128 of a row
BITS = Coding(2, 256, whole=True)


@dataclass(frozen=True)
class Scheme:
    """How one matrix is stored: the coding of its codes, what they stand for, what is shared."""

    name: str
    coding: Coding | None = None  # None: dense
    segment: int = 0  # columns that share a factor; ROW: no factors but the row's
    fit: str = ""  # how codes are found, in quant/codes.py
    has_levels: bool = False
    has_offset: bool = False  # a number a row is added
    step: int = 0  # value = step * code - middle; 0: the code is the value, as int8
    middle: int = 0

    @property
    def is_coded(self) -> bool:
        """Whether weights are int8 numbers with scales, and activations are quantised."""
        return self.coding is not None

    @property
    def is_coarse(self) -> bool:
        """Whether so few values are left that a model must have been trained for them."""
        return self.coding is not None and self.coding.codes <= 4

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def parse(text: str) -> "Scheme":
        """The scheme of that name. Raises SchemeError, which lists the names there are."""
        scheme = SCHEMES.get(text.strip().lower()) if isinstance(text, str) else None
        if scheme is None:
            raise SchemeError(f"scheme {text!r} is not known; choose one of: {', '.join(SCHEMES)}")
        return scheme


# In the order of `enum class Scheme` in native/kernels.h.
SCHEMES = {
    s.name: s
    for s in (
        Scheme("f32"),
        Scheme("bf16"),
        Scheme("f16"),
        Scheme("int8", BYTES, 128, "absmax"),
        Scheme("nl4", NIBBLES, 512, "levels", has_levels=True),
        Scheme("int6", SIXES, 128, "absmax", step=1, middle=32),
        Scheme("int4", NIBBLES, 512, "levels", has_levels=True),
        Scheme("nl3", THREES, 512, "levels", has_levels=True),
        Scheme("nl2", CRUMBS, 512, "levels", has_levels=True),
        Scheme("ternary", TRITS, 512, "ternary", step=1, middle=1),
        Scheme("sign", BITS, 512, "sign", step=2, middle=1),
        Scheme("row8", BYTES, ROW, "affine", has_offset=True),
        Scheme("row4", NIBBLES, ROW, "affine", has_offset=True, step=1, middle=8),
        Scheme("row2", CRUMBS, ROW, "affine", has_offset=True, step=1, middle=2),
        Scheme("row1", BITS, ROW, "sign", step=2, middle=1),
    )
}


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple
