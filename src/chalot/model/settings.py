"""Values of a config.json, one by one: an error says the key, what it is, and what is expected.

Null is as good as nothing, and takes the default where there is one.
"""

from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]  # a config.json, or an object in it
LARGEST = 1 << 24  # of any dimension; products of three stay far below 2^63 in Python
LEAST, MOST = 1e-30, 1e30  # of positive numbers: they, squares of caps and quotients fit a float32


def shown(value: object) -> str:
    """A value as a message has it, of bounded length."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more than 4,300 digits
        text = "a number too long to print"
    return text if len(text) <= 80 else text[:77] + "..."


def wrong(key: str, value: object, expected: str) -> ValueError:
    """What is raised for a value that makes no sense."""
    return ValueError(f"{key} is {shown(value)}; expected {expected}")


def whole(config: Settings, key: str, default: int | None = None, most: int = LARGEST) -> int:
    """A whole number from 1 to `most`. Raises KeyError if it is missing, ValueError."""
    found = config[key] if default is None else config.get(key)
    if found is None and default is not None:
        return default
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= most:
        raise wrong(key, found, f"a whole number from 1 to {most:,}")
    return found


def number(config: Settings, key: str, default: float | None = None, least: float = LEAST) -> float:
    """A number from `least` to 1e30. Raises KeyError if it is missing, ValueError."""
    found = config[key] if default is None else config.get(key)
    if found is None and default is not None:
        return default
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    if not is_number or found is None or not least <= found <= MOST:
        least_said = "a positive number, no less than" if least == LEAST else "a number from"
        raise wrong(key, found, f"{least_said} {least:g}, up to {MOST:g}")
    return float(found)


def positive(config: Settings, key: str) -> float:
    """A positive number; 0 where there is none. Raises ValueError."""
    return 0.0 if config.get(key) is None else number(config, key)


def flag(config: Settings, key: str, default: bool = False) -> bool:
    """True or false. Raises ValueError."""
    found = config.get(key)
    if found is None:
        return default
    if not isinstance(found, bool):
        raise wrong(key, found, "true or false")
    return found
