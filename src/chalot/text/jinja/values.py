"""What a template may do with a value: attributes, items, methods and operators.

A template sees plain data only (none, bool, int, float, str, list, tuple, dict) and the few
objects named here. No Python attribute is reachable: methods are the ones in `METHODS`, by the
exact type of the value; those that change a value in place are not among them.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from jinja2 import Undefined
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter

from chalot.text.jinja.budget import ITEM_COST, MAX_BITS, Budget, Fault

MAX_WIDTH = 1000  # of padding, indentation, and precision; no chat format comes near it


class Function:
    """A function that a template may call."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return "<function>"


class Namespace:
    """`namespace(...)`: the one thing that a template can change from inside a loop."""

    __slots__ = ("names",)

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def __repr__(self) -> str:
        return "<namespace>"


class Loop:
    """`loop` inside a for: where it stands among the items."""

    __slots__ = ("index0", "items")

    def __init__(self, items: list[Any]) -> None:
        self.items, self.index0 = items, 0

    def __repr__(self) -> str:
        return "<loop>"

    def neighbour(self, step: int) -> Any:
        where = self.index0 + step
        return self.items[where] if 0 <= where < len(self.items) else Undefined("no such item")


LOOP: dict[str, Callable[[Loop], Any]] = {
    "index": lambda loop: loop.index0 + 1,
    "index0": lambda loop: loop.index0,
    "revindex": lambda loop: len(loop.items) - loop.index0,
    "revindex0": lambda loop: len(loop.items) - loop.index0 - 1,
    "first": lambda loop: loop.index0 == 0,
    "last": lambda loop: loop.index0 == len(loop.items) - 1,
    "length": lambda loop: len(loop.items),
    "previtem": lambda loop: loop.neighbour(-1),
    "nextitem": lambda loop: loop.neighbour(1),
    "cycle": lambda loop: Function(lambda *choices: choices[loop.index0 % len(choices)]),
}

_STRING_METHODS = """
    capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii
    isdecimal isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip partition
    removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines
    startswith strip swapcase title upper zfill
"""
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STRING_METHODS.split()),
    list: frozenset(("count", "index", "copy")),
    tuple: frozenset(("count", "index")),
    dict: frozenset(("get", "items", "keys", "values", "copy")),
}


def to_text(budget: Budget, value: Any) -> str:
    """The text that `{{ value }}` writes."""
    if type(value) is str:
        return value
    budget.walk(value, times=2)
    return str(value)


def width_of(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= MAX_WIDTH:
        found = kind_of(value) if not isinstance(value, int) else f"{value:.3g}"
        raise Fault(f"found {found} for a width, expected 0 to {MAX_WIDTH}")
    return value


def kind_of(value: Any) -> str:
    return "none" if value is None else f"a {type(value).__name__.lower()}"


def fail(value: Undefined) -> NoReturn:
    """Raise jinja2's own error for a use of something that is not there ("'x' is undefined")."""
    value._fail_with_undefined_error()


def as_list(budget: Budget, value: Any) -> list[Any]:
    """What a loop or a filter iterates over."""
    if not isinstance(value, (str, list, tuple, dict, Undefined)):
        raise Fault(f"found {kind_of(value)}, expected something to iterate over")
    budget.spend(ITEM_COST * len(value))
    return list(value)


def attribute(budget: Budget, value: Any, name: str) -> Any:
    """`value.name`: a method if the type has one of that name, else the item."""
    kind = type(value)
    if isinstance(value, Undefined):
        fail(value)
    if kind is Namespace:
        return value.names.get(name, Undefined(obj=value, name=name))
    if kind is Loop and name in LOOP:
        return LOOP[name](value)
    if name in METHODS.get(kind, ()):
        return Function(partial(method, budget, value, name))
    if name.startswith("__") or hasattr(kind, name):
        return Undefined(f"'{kind.__name__}.{name}' is not open to templates", exc=SecurityError)
    if kind is dict and name in value:
        return value[name]
    return Undefined(obj=value, name=name)


def item(budget: Budget, value: Any, key: Any) -> Any:
    """`value[key]`: the item, else the attribute of that name, else undefined."""
    kind = type(value)
    if isinstance(value, Undefined):
        fail(value)
    try:
        if kind is dict:
            budget.walk(key)
            return value[key]
        if kind in (str, list, tuple) and isinstance(key, int):
            return value[key]
        if kind in (str, list, tuple) and isinstance(key, slice):
            return budget.made(value[key])
    except (LookupError, TypeError):
        pass
    if type(key) is str:
        return attribute(budget, value, key)
    return Undefined(obj=value, name=str(key) if isinstance(key, int) else kind_of(key))


class Access:
    """What jinja2's own filters ask of an environment."""

    undefined = Undefined
    is_async = False

    def __init__(self, budget: Budget) -> None:
        self.getitem = partial(item, budget)


def getter(budget: Budget, path: Any, default: Any = None) -> Callable[[Any], Any]:
    """The function behind `attribute="a.b"` of many filters; without a path, the value itself."""
    if path is None:
        return lambda value: value
    access: Any = Access(budget)
    return make_attrgetter(access, path, default=default)


def method(budget: Budget, value: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call one of `METHODS`, after paying for what it reads and may build."""
    if name in FORMATTING:
        return FORMATTING[name](budget, value, *args, **kwargs)
    given = [*args, *kwargs.values()]
    if name in ("center", "ljust", "rjust", "zfill"):
        budget.spend(width_of(given[0] if given else None))
    elif name == "expandtabs":
        budget.spend((value.count("\t") + 1) * width_of(given[0] if given else 8))
    elif type(value) is not str and name in ("count", "index"):
        budget.walk(value)
    budget.walk(given)
    budget.spend(1 + len(value) // 16)
    result = getattr(value, name)(*args, **kwargs)
    return budget.made(list(result) if name in ("items", "keys", "values") else result)


# --------------------------------------------------------------------------- building longer text

_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d+)?(?:\.(\*|\d*))?[hlL]?(.?)", re.DOTALL)
_BRACE = re.compile(r"\{\{|\}\}|\{\w*(?:![rs])?(?::([^{}]*))?\}|[{}]")


def _vet_width(width: str | None) -> None:
    if width and (not width.isdigit() or int(width[:4]) > MAX_WIDTH):
        raise Fault(f"found the width {width[:20]!r} in a format, expected 0 to {MAX_WIDTH}")


def format_percent(budget: Budget, text: str, values: Any) -> str:
    """`text % values`."""
    fields = [field for field in _PERCENT.finditer(text) if field[3] != "%"]
    for field in fields:
        _vet_width(field[1])
        _vet_width(field[2])
    budget.spend(len(text) + 2 * MAX_WIDTH * len(fields))
    budget.walk(values, times=1 + 2 * len(fields))
    return str(budget.made(text % values))


def format_braces(budget: Budget, text: str, *args: Any, **kwargs: Any) -> str:
    """`text.format(...)`, with names and numbers in the braces but no attributes or items."""
    fields = list(_BRACE.finditer(text))
    for field in fields:
        if field[0] in ("{", "}"):
            raise Fault(f"found the format {text[:40]!r}, expected only names or numbers in braces")
        for width in re.findall(r"\d+", field[1] or ""):
            _vet_width(width)
    budget.spend(len(text) + 2 * MAX_WIDTH * len(fields))
    budget.walk([*args, *kwargs.values()], times=1 + 2 * len(fields))
    return str(budget.made(text.format(*args, **kwargs)))


def replace(budget: Budget, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = (to_text(budget, one) for one in (value, old, new))
    budget.spend(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def join(budget: Budget, separator: Any, texts: list[str]) -> str:
    between = to_text(budget, separator)
    budget.spend(sum(map(len, texts)) + len(between) * len(texts))
    return between.join(texts)


FORMATTING: dict[str, Callable[..., str]] = {
    "format": format_braces,
    "join": lambda budget, value, texts: join(budget, value, as_list(budget, texts)),
    "replace": replace,
}


# -------------------------------------------------------------------------------------- operators


def pay_to_compare(budget: Budget, left: Any, right: Any) -> None:
    """Pay for comparing two values, which visits only what both have in the same place."""
    stack = [(left, right)]
    while stack:
        one, other = stack.pop()
        budget.spend(1)
        if type(one) is not type(other):
            continue
        if type(one) is str:
            budget.spend(min(len(one), len(other)) // 16)
        elif type(one) in (list, tuple):
            budget.spend(min(len(one), len(other)))
            stack += zip(one, other, strict=False)
        elif type(one) is dict and len(one) == len(other):
            budget.walk(list(one))
            stack += [(value, other[key]) for key, value in one.items() if key in other]


def contains(budget: Budget, needle: Any, haystack: Any) -> bool:
    if type(haystack) is str:
        budget.spend(1 + len(haystack) // 16)
    elif type(haystack) is dict:
        budget.walk(needle)
    else:
        for one in as_list(budget, haystack):
            pay_to_compare(budget, needle, one)
    return needle in haystack


def add(budget: Budget, left: Any, right: Any) -> Any:
    kind = type(left)
    if kind in (str, list, tuple) and type(right) is kind:
        budget.spend((len(left) + len(right)) * (1 if kind is str else ITEM_COST))
    return left + right


def multiply(budget: Budget, left: Any, right: Any) -> Any:
    for value, times in ((left, right), (right, left)):
        if type(value) in (str, list, tuple) and isinstance(times, int):
            budget.spend(max(0, times) * (1 + len(value)) * ITEM_COST)
    return budget.made(left * right)


def modulo(budget: Budget, left: Any, right: Any) -> Any:
    return format_percent(budget, left, right) if type(left) is str else left % right


def power(budget: Budget, left: Any, right: Any) -> Any:
    if (
        isinstance(left, int)
        and isinstance(right, int)
        and left.bit_length() * abs(right) > 2 * MAX_BITS
    ):
        raise Fault(f"found a power of more than {2 * MAX_BITS} bits, expected at most {MAX_BITS}")
    return budget.made(left**right)
