"""Types of arguments, checked where Python code calls this package: one error, before any work."""

import os
from numbers import Integral
from typing import Any

from chalot.errors import WrongTypeError

Kind = tuple[str, tuple[type, ...]]  # what a user calls it, and what it is
NONE = type(None)
PATH: Kind = "a str or a path", (str, os.PathLike)
TEXT: Kind = "a str", (str,)
COUNT: Kind = "a whole number", (Integral,)
MAY_PATH: Kind = "a str, a path or None", (str, os.PathLike, NONE)
MAY_TEXT: Kind = "a str or None", (str, NONE)
MAY_COUNT: Kind = "a whole number or None", (Integral, NONE)


def check_types(**given: tuple[Any, Kind]) -> None:
    """Raise WrongTypeError, a TypeError too, for the first argument that is not of its kind."""
    for name, (value, (called, types)) in given.items():
        if not isinstance(value, types):
            raise WrongTypeError(f"{name}: found {type(value).__name__}, expected {called}")
