"""A scheme says how a matrix is stored: `Scheme.parse("nl4")` <-> `str(scheme)`.

Coded schemes follow one arithmetic (docs/format.md):

    w[r, k] = row_scale[r] * segment[r, k // S] * value,   value an int8 number
    int8:  value = code[r, k]
    nl4:   value = table[level[r, k // 32]][code[r, k]]

Dense schemes store the numbers themselves.
"""

from dataclasses import dataclass

from chalot.errors import SchemeError

PANEL = 16  # rows that are stored together
GROUP = 32  # columns that share a level; columns are padded to it
BLOCK = 128  # columns that share an activation scale


@dataclass(frozen=True)
class Scheme:
    """How one matrix is stored: the width of a code, and the columns that share a factor."""

    name: str
    bits: int
    segment: int = 0  # 0: dense, no factors
    has_levels: bool = False

    @property
    def is_coded(self) -> bool:
        """Whether weights are int8 numbers with scales, and activations are quantised."""
        return self.segment > 0

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def parse(text: str) -> "Scheme":
        """The scheme of that name. Raises SchemeError, which lists the names there are."""
        scheme = SCHEMES.get(text.strip().lower())
        if scheme is None:
            raise SchemeError(f"scheme {text!r} is not known; choose one of: {', '.join(SCHEMES)}")
        return scheme


SCHEMES = {
    s.name: s
    for s in (
        Scheme("f32", 32),
        Scheme("bf16", 16),
        Scheme("f16", 16),
        Scheme("int8", 8, segment=128),
        Scheme("nl4", 4, segment=512, has_levels=True),
    )
}


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple
