"""What one rendering of a template may cost, and how it stops.

About one unit for a step and one for a character built. Whatever is built costs its own size, and
whatever would walk a nested value walks it at the budget's expense first, so that neither
doubling strings, nor `x * n`, nor a list that holds itself twice over (small in memory, endless
in print) gets anywhere. Time and memory are bounded by the same number.
"""

from typing import Any

ITEM_COST = 8  # a list's item costs about as much memory as eight characters
MAX_BITS = 4096  # of an integer; Python itself refuses to print much more


class Fault(Exception):
    """A template did what it may not do; the renderer makes it a TokenizerError with a line."""


class Budget:
    """Units left to one rendering. `line` is the line of the template that runs, for messages."""

    __slots__ = ("left", "line")

    def __init__(self, units: int) -> None:
        self.left = units
        self.line = 1

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise Fault("found no end within the work allowed for messages of this size")

    def made(self, value: Any) -> Any:
        """Pay for a value just built: its own size, as what it contains was paid for before."""
        if type(value) is str:
            self.spend(len(value))
        elif type(value) in (list, tuple, dict):
            self.spend(ITEM_COST * len(value))
        elif type(value) is int and value.bit_length() > MAX_BITS:
            raise Fault(
                f"found an integer of {value.bit_length()} bits, expected at most {MAX_BITS}"
            )
        return value

    def walk(self, value: Any, times: int = 1, item: int = 1, indent: int = 0) -> None:
        """Pay `times` for each part of a nested value, `item` more an item, `indent` a level."""
        stack = [(value, 1)]
        while stack:
            part, depth = stack.pop()
            kind = type(part)
            if kind is str:
                self.spend((1 + len(part)) * times)
            elif kind is dict or kind is list or kind is tuple:
                self.spend((1 + len(part) * (item + indent * depth)) * times)
                stack += [(child, depth + 1) for child in part]
                if kind is dict:
                    stack += [(child, depth + 1) for child in part.values()]
            else:
                self.spend(times)
