"""Types of arguments, checked where Python code calls this package: one error, before any work."""

import os
from collections.abc import Iterable
from numbers import Integral
from typing import Any

from chalot.errors import WrongTypeError

Kind = tuple[str, tuple[type, ...]]  # what a user calls it, and what it is
NONE = type(None)
PATH: Kind = "a str or a path", (str, os.PathLike)
TEXT: Kind = "a str", (str,)
COUNT: Kind = "a whole number", (Integral,)
DRAFT: Kind = "a bool, a str, a path or None", (bool, str, os.PathLike, NONE)
MAY_PATH: Kind = "a str, a path or None", (str, os.PathLike, NONE)
MAY_TEXT: Kind = "a str or None", (str, NONE)
MAY_COUNT: Kind = "a whole number or None", (Integral, NONE)


def check_types(**given: tuple[Any, Kind]) -> None:
    """Raise WrongTypeError, a TypeError too, for the first argument that is not of its kind."""
    for name, (value, (called, types)) in given.items():
        if not isinstance(value, types):
            raise WrongTypeError(f"{name}: found {type(value).__name__}, expected {called}")


def listed(value: Any, name: str, of: str) -> list[Any]:
    """What is in a list or another iterable; WrongTypeError for a str, which is one text."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise WrongTypeError(f"{name}: found {type(value).__name__}, expected a list of {of}")
    return list(value)


def token_ids(value: Any, name: str = "ids") -> list[int]:
    """Ids as a list of int. Raises WrongTypeError for what are no whole numbers."""
    ids = listed(value, name, "token ids" if name == "ids" else "token ids, or a str")
    for i in ids:
        if not isinstance(i, Integral):
            raise WrongTypeError(f"{name}: found {type(i).__name__} in it, expected token ids")
    return [int(i) for i in ids]
