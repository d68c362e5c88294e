"""Whole files made hostile: bytes, numbers and JSON changed as a bad disk or hand would."""

import json
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

EDGES = (0, 1, 2, 3, 4, 7, 8, 16, 24, 31, 32, 48, 53, 60, 62, 63, 64)
NUMBERS = tuple(sorted({(1 << edge) + off for edge in EDGES for off in (-1, 0, 1)}))
TEXTS = (
    "",
    "\0",
    "x" * 5000,
    "\n",
    "\x1b[2J",
    "../x",
    "/etc/passwd",
    "\ud800",
    "é\u202e",
    "{{ 1 }}",
)
TEXTS += ("0", "-1", "NaN", "f32", "nl4", "bf16", "q", "a" * 70_000)
PIECES = (
    *(b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b"\0", b"\xff", b"\n", b'"":1,', b"[" * 5000),
    *(b'{"a":' * 3000, b"9" * 5000, b"-0", b"true", b"null", b"[]", b"{}", b"\xef\xbb\xbf", b","),
    *(b'"shape":[1],', b'"dtype":"F32",', b'"offset":0,', b"\x93NUMPY", b"PK\1\2", b"GGUF"),
)

MANY = 500_000
BOMBS = {  # JSON of a few megabytes that would take ten or forty times as much
    "lists": b"[" + b"[]," * MANY + b"0]",
    "lists in lists": b"[" + b"[[[[]]]]," * (MANY // 2) + b"0]",
    "objects": b"[" + b'{"":0},' * MANY + b"0]",
    "keys": b"{" + b",".join(b'"%d":0' % i for i in range(MANY // 2)) + b"}",
}


def number(rng: Random) -> int:
    """A number at an edge, above or below zero."""
    return rng.choice(NUMBERS) * rng.choice((1, 1, 1, -1))


def changed_bytes(raw: bytes, rng: Random, last: int | None = None) -> bytes:
    """One to four changes in the first `last` bytes."""
    out = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        end = min(len(out), len(raw) if last is None else last)
        rng.choice(BYTES)(out, rng.randrange(end + 1), rng)
    return bytes(out)


def _flip(out: bytearray, at: int, rng: Random) -> None:
    if at < len(out):
        out[at] ^= 1 << rng.randrange(8)


def _byte(out: bytearray, at: int, rng: Random) -> None:
    out[at : at + 1] = bytes([rng.randrange(256)])


def _number(out: bytearray, at: int, rng: Random) -> None:
    size, aligned = rng.choice((2, 4, 8)), rng.choice((1, 4, 8))
    at = at // aligned * aligned
    out[at : at + size] = (number(rng) % (1 << 8 * size)).to_bytes(size, "little")


def _digits(out: bytearray, at: int, rng: Random) -> None:
    places = [i for i in range(at, min(len(out), at + 300)) if 48 <= out[i] < 58]
    if places:
        out[places[0] : places[0] + 1] = str(number(rng)).encode()


def _piece(out: bytearray, at: int, rng: Random) -> None:
    out[at:at] = rng.choice(PIECES)


def _again(out: bytearray, at: int, rng: Random) -> None:
    out[at:at] = out[at : at + rng.choice((1, 8, 40, 300))]


def _gone(out: bytearray, at: int, rng: Random) -> None:
    del out[at : at + rng.choice((1, 2, 8, 100))]


def _cut(out: bytearray, at: int, rng: Random) -> None:
    del out[at:]


def _zeros(out: bytearray, at: int, rng: Random) -> None:
    size = rng.choice((4, 16, 64))
    out[at : at + size] = bytes([rng.choice((0, 255))]) * size


BYTES: tuple[Callable[[bytearray, int, Random], None], ...] = (
    *(_flip, _byte, _number, _number, _digits, _digits, _piece, _again, _gone, _cut, _zeros),
)


def value(rng: Random, beside: Any = None) -> Any:
    """What somebody might put where `beside` stands."""
    like = {int: number, float: _real, str: _text}.get(type(beside))
    if like is not None and rng.random() < 0.7:
        return like(rng)
    if isinstance(beside, int) and rng.random() < 0.5:
        return beside + rng.choice((-1, 1, 64, -64))
    return rng.choice(
        (
            *(None, True, False, [], {}, [beside], {"a": beside}),
            *(number(rng), 10**400, _real(rng), _text(rng)),
        )
    )


def _real(rng: Random) -> float:
    chosen = (0.0, -0.0, 1e-300, 1e300, -1.0, 0.5, 5e-324, float("nan"), float("inf"))
    return rng.choice((*chosen, rng.random(), rng.uniform(0, 1e4)))


def _text(rng: Random) -> str:
    return rng.choice(TEXTS)


def changed_json(whole: Any, rng: Random, changes: int = 3) -> Any:
    """A copy with one to `changes` values changed, taken out, copied or renamed anywhere."""
    out = [deepcopy(whole)]
    for _ in range(rng.choice((1, 1, *range(1, changes + 1)))):
        places = list(_places(out))
        holder, key = rng.choice(places)
        rng.choice(VALUES)(holder, key, rng)
        if not out:
            return value(rng)
    return out[0]


def _places(holder: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) inside; of long lists and objects some."""
    found: list[tuple[Any, Any]] = []
    waiting = [holder]
    while waiting:
        at = waiting.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at))
        for key in list(keys)[:40]:
            found.append((at, key))
            if isinstance(at[key], (dict, list)):
                waiting.append(at[key])
    return found


def _set(holder: Any, key: Any, rng: Random) -> None:
    holder[key] = value(rng, holder[key])


def _out(holder: Any, key: Any, rng: Random) -> None:
    del holder[key]


def _copied(holder: Any, key: Any, rng: Random) -> None:
    other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[other] = deepcopy(holder[key])


def _renamed(holder: Any, key: Any, rng: Random) -> None:
    if isinstance(holder, dict):
        holder[_text(rng)] = holder.pop(key)
    else:
        holder += deepcopy(holder[key : key + 1]) * rng.choice((1, 3, 200))


VALUES: tuple[Callable[[Any, Any, Random], None], ...] = (
    _set,
    _set,
    _set,
    _set,
    _out,
    _copied,
    _renamed,
)


def as_json(found: Any) -> bytes:
    """The value as a text, with NaN and lone surrogates as they are written by others."""
    return json.dumps(found).encode()


def changed_text(whole: Any, rng: Random) -> bytes:
    """A JSON document changed in its values, mostly, or in its bytes."""
    if rng.random() < 0.3:
        return changed_bytes(as_json(whole), rng)
    return as_json(changed_json(whole, rng))
