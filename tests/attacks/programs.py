"""Programs as `native/fuzz.cpp` takes them: whole numbers of 16 bits, for a fuzzer to begin with.

python tests/attacks/programs.py FOLDER      writes them
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

import tiny
from chalot.kernels.native import program_fields
from chalot.kernels.program import Program
from chalot.model.config import from_hugging_face
from test_family_exactness import CONFIGS, HEADS, SMALL

NUMBERS = (0, 1e-6, 1, 0.125, -1, 30, 1e30, 1e-30, 0.5, 10)  # the first of kNumbers
ODD = {1 << 24: 0x7FF3}  # of kOdd: the segment of a scheme that has none
EXACT, FINITE, NOTHING = 0, 0, 2  # of an array: bytes more than it needs; its numbers; none at all
BATCHES = ((7, 0, 0, 3, 0, 0, 0, 0), (25, 1, 1, 0, 2, 250, 0, 1), (1, 0, 2, 1, 0, 600, 0, 0))
TEXT = (7, 300, 3, 97, 98, 0, 256, 256, 99, 1, 257, 98, 99, 2, 258, 1, 0, 1, 1, 0, 0, 3)


def numbers(program: Program, kernels: int) -> Iterator[int]:
    """What fuzz.cpp reads, in its order."""
    slots, ops, cache, heads, sets, factor = program_fields(program)
    yield from (0, kernels, kernels % 2, len(slots))
    for slot in slots:
        yield from slot
    yield len(ops)
    for kind, source, target, parts, weight, number, *rest, added in ops:
        yield from (kind, source, target, len(parts))
        for (scheme, rows, columns, segment, *_), bias, column in parts:
            yield from (scheme, rows, columns, segment, FINITE, EXACT, EXACT)
            yield from (NOTHING,) if bias is None else (FINITE, EXACT)
            yield column
        yield from (0, NOTHING) if weight is None else (len(weight), FINITE, EXACT)
        yield nearest(number)
        yield from (nearest(n) if isinstance(n, float) else int(n) for n in rest)
        yield from (0, NOTHING) if added is None else (len(added), FINITE, EXACT)
    yield from (*cache, heads, len(sets))
    for of_set in sets:
        yield program.cache.head_dim // 2 - len(of_set)
    yield from (EXACT, nearest(factor))
    for batch in BATCHES:
        yield from batch


def nearest(number: float) -> int:
    """Which of `NUMBERS` is the nearest."""
    return int(np.argmin([abs(number - n) for n in NUMBERS]))


def programs() -> Iterator[tuple[str, Program]]:
    """Small models of every family, in many schemes and caches."""
    schemes = ("nl4", "int8", "ternary", "row4", "nl3", "int6", "row8", "nl2", "sign", "row1")
    for n, (name, said) in enumerate(CONFIGS.items()):
        layers = len(said.get("layer_types") or "1")
        config = from_hugging_face(said | SMALL | HEADS | {"num_hidden_layers": layers})
        cache = ("int8", "f16", "f32")[n % 3]
        yield name, tiny.program(config, schemes[n % len(schemes)], planes=1 + n % 2, cache=cache)
    yield "every", tiny.program(tiny.config(layers=1, vocabulary=33), "every")
    yield "mixed", tiny.program(tiny.config(layers=1, vocabulary=33), "mixed")
    streaming = tiny.config(layers=1, vocabulary=33, windows=(300,), sinks=(4,))
    yield "sinks", tiny.program(streaming, "nl4")


def write(folder: Path) -> int:
    """Write all of them; how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: numbers(program, n) for n, (name, program) in enumerate(programs())}
    found["text"] = iter((*TEXT, *range(200)))
    for name, made in found.items():
        (folder / name).write_bytes(np.array([ODD.get(n, n) for n in made], np.int16).tobytes())
    return len(found)
