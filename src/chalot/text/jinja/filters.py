"""Filters and tests, with the semantics of jinja2 3.1 without autoescape.

`tojson` is as transformers documents it for chat templates: no HTML escapes, not ASCII only. Not
offered: random (the same messages give the same ids), and what pages need but chats do not
(urlize, xmlattr, truncate, batch and the like).
"""

import json
from collections.abc import Callable
from typing import Any

from jinja2 import Undefined, filters
from jinja2.tests import TESTS as JINJA_TESTS
from markupsafe import escape

from chalot.text.jinja import values
from chalot.text.jinja.budget import Budget, Fault
from chalot.text.jinja.values import as_list, getter, to_text, width_of

Filter = Callable[..., Any]


def on_text(function: Filter) -> Filter:
    """A filter of text that builds hardly more than it is given."""

    def run(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget.walk([*args, *kwargs.values()])
        text = to_text(budget, value)
        budget.spend(len(text))
        return budget.made(function(text, *args, **kwargs))

    return run


def on_number(function: Filter) -> Filter:
    def run(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget.spend(1 + (len(value) if type(value) is str else 0))
        return budget.made(function(value, *args, **kwargs))

    return run


def on_order(function: Filter) -> Filter:
    """A filter that compares items with one another."""

    def run(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> Any:
        items = as_list(budget, value)
        budget.walk(items, times=2 + len(items).bit_length())
        result = function(values.Access(budget), items, *args, **kwargs)
        return result if function in (filters.do_min, filters.do_max) else list(result)

    return run


def tojson(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    step = len(indent) if type(indent) is str else width_of(indent or 0)
    marks = sum(len(to_text(budget, mark)) for mark in separators or ())
    budget.walk(value, times=12 if ensure_ascii else 6, item=2 + marks, indent=step)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def indent(
    budget: Budget, value: Any, width: Any = 4, first: bool = False, blank: bool = False
) -> str:
    if type(value) is not str:
        raise Fault(f"found {values.kind_of(value)}, expected text for the filter indent")
    step = len(width) if type(width) is str else width_of(width)
    budget.spend(2 * len(value) + (len(value.splitlines()) + 2) * step)
    return filters.do_indent(value, width, first, blank)


def join(budget: Budget, value: Any, d: Any = "", attribute: Any = None) -> str:
    get = getter(budget, attribute)
    return values.join(budget, d, [to_text(budget, get(one)) for one in as_list(budget, value)])


def some(budget: Budget, value: Any) -> list[Any]:
    """Items, where none, false and 0 have none too, as for jinja2's map and select."""
    return as_list(budget, value) if value else []


def map_items(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> list[Any]:
    if not args:
        get = getter(budget, kwargs["attribute"], kwargs.get("default"))
        return [get(one) for one in some(budget, value)]
    name, *rest = args
    return [call_filter(budget, name, one, *rest, **kwargs) for one in some(budget, value)]


def selecting(keep: bool, by_attribute: bool) -> Filter:
    def run(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> list[Any]:
        get = getter(budget, args[0] if by_attribute else None)
        name, *rest = args[by_attribute:] or (None,)

        def holds(one: Any) -> bool:
            found = get(one)
            return bool(found) if name is None else call_test(budget, name, found, *rest, **kwargs)

        return [one for one in some(budget, value) if holds(one) == keep]

    return run


def total(budget: Budget, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    get = getter(budget, attribute)
    for one in as_list(budget, value):
        start = values.add(budget, start, get(one))
    return start


def default(budget: Budget, value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    return default_value if isinstance(value, Undefined) or (boolean and not value) else value


def edge(where: int) -> Filter:
    def run(budget: Budget, value: Any) -> Any:
        found = as_list(budget, value)
        return found[where] if found else Undefined("no such item in an empty sequence")

    return run


def reverse(budget: Budget, value: Any) -> Any:
    return budget.made(value[::-1]) if type(value) is str else as_list(budget, value)[::-1]


def items(budget: Budget, value: Any) -> list[Any]:
    if isinstance(value, Undefined):
        return []
    if type(value) is not dict:
        raise Fault(f"found {values.kind_of(value)}, expected a mapping for the filter items")
    return [tuple(pair) for pair in as_list(budget, list(value.items()))]


def dictsort(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> Any:
    budget.walk(value, times=2 + len(value).bit_length())
    return budget.made(filters.do_dictsort(value, *args, **kwargs))


FILTERS: dict[str, Filter] = {
    "abs": on_number(abs),
    "capitalize": on_text(str.capitalize),
    "count": lambda budget, value: len(value),
    "d": default,
    "default": default,
    "dictsort": dictsort,
    "e": on_text(lambda text: str(escape(text))),
    "escape": on_text(lambda text: str(escape(text))),
    "first": edge(0),
    "float": on_number(filters.do_float),
    "format": lambda budget, value, *args, **kwargs: values.format_percent(
        budget, to_text(budget, value), kwargs or args
    ),
    "indent": indent,
    "int": on_number(filters.do_int),
    "items": items,
    "join": join,
    "last": edge(-1),
    "length": lambda budget, value: len(value),
    "list": as_list,
    "lower": on_text(str.lower),
    "map": map_items,
    "max": on_order(filters.do_max),
    "min": on_order(filters.do_min),
    "reject": selecting(keep=False, by_attribute=False),
    "rejectattr": selecting(keep=False, by_attribute=True),
    "replace": values.replace,
    "reverse": reverse,
    "round": lambda budget, value, precision=0, method="common": filters.do_round(
        value, width_of(precision), method
    ),
    "safe": to_text,
    "select": selecting(keep=True, by_attribute=False),
    "selectattr": selecting(keep=True, by_attribute=True),
    "sort": on_order(filters.do_sort),
    "string": to_text,
    "sum": total,
    "title": on_text(filters.do_title),
    "tojson": tojson,
    "trim": on_text(filters.do_trim),
    "unique": on_order(filters.sync_do_unique),
    "upper": on_text(str.upper),
}

_NOT_OFFERED = ("filter", "test", "escaped", "in")
TESTS: dict[str, Any] = {name: t for name, t in JINJA_TESTS.items() if name not in _NOT_OFFERED}
COMPARING = {"==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ne", "lt", "lessthan", "le", "gt"}
COMPARING |= {"greaterthan", "ge"}


def call_filter(budget: Budget, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    if name not in FILTERS:
        raise Fault(f"found the filter {name!r}, expected one of {', '.join(FILTERS)}")
    return FILTERS[name](budget, value, *args, **kwargs)


def call_test(budget: Budget, name: str, value: Any, *args: Any, **kwargs: Any) -> bool:
    if name == "in":
        return values.contains(budget, value, *args)
    if name not in TESTS:
        raise Fault(f"found the test {name!r}, expected one of {', '.join(TESTS)}")
    if name in COMPARING:
        values.pay_to_compare(budget, value, *args)
    elif name in ("lower", "upper"):
        value = to_text(budget, value)
    return bool(TESTS[name](value, *args, **kwargs))
