"""What a model will take of this machine's memory: predicted from shapes, before it is loaded.

    total = weights - unread + cache + buffers + baseline (+ tokenizer)

`weights` are the mapped bytes of the file, resident once the first token has been computed. The
rows of an embedding are read by token; of one that is no head too, `unread` is what a text of that
length is not expected to touch. With --mlock or --no-mmap they are the whole file. `buffers` are
the slots of the forward pass, scratch of each thread, and logits. `baseline` is Python, numpy and
chalot: measured here, in a process of its own. benchmarks/memory.py holds all this against what a
process really takes.

Not known here: huge pages, which round the cache up to whole pages of 256 positions where the
system grants them to shared memory, and what a program that embeds chalot needs for itself.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from chalot.engine.generate import CHUNK
from chalot.errors import ContextError
from chalot.kernels.backend import thread_count
from chalot.kernels.program import CACHE, PAGE, Op, Program, Slot
from chalot.mixture import untouched
from chalot.model.config import ModelConfig
from chalot.model.layers import model_tensors
from chalot.model.transformer import Weights, build, cache_shape
from chalot.quant.packing import Matrix
from chalot.quant.scheme import BLOCK, PANEL, Scheme, round_up

SYSTEM_PAGE = 4096
NEIGHBOURS = 131_072  # bytes mapped around one that is read: measured 64 kB to 2 MB, by page cache
IMPORTED = 35_000_000  # bytes; where it cannot be measured. CPython 3.11, numpy 2.4, x86-64 Linux
FIRST_STEP = 3_500_000  # bytes of code and objects that the first token brings in
LOGIT_BYTES = 4  # of each token of the vocabulary
TOKENIZER = 7_000_000  # bytes of the library
TOKENIZER_ENTRY = 620  # bytes of a token with its merge: 94 MB for 151,936
QUERY_ROWS = 48  # that a thread attends with at once (native/attention.cpp)
TABLES_HELD = 2.4  # times the bytes of tokenizer.bpe: mapped, copied, and what is made of them
TENSOR_OBJECT = 2_000  # bytes: a tensor's place in manifest and program


@dataclass(frozen=True)
class Memory:
    """Bytes resident with `context` tokens in the cache. `total` is without `tokenizer`."""

    context: int
    weights: int
    unread: int
    cache: int
    buffers: int
    baseline: int
    tokenizer: int  # opened on first use of text
    total: int
    total_with_text: int


@dataclass(frozen=True)
class Stored:
    """How the file holds a matrix: what decides its products' buffers."""

    scheme: Scheme
    planes: int  # of its activations, 8 bits each


def estimate(
    config: ModelConfig,
    stored: Mapping[str, Stored],
    weights: int,
    embedding: int,
    context: int,
    kv: str = CACHE,
    text: bool = True,
    tables: int = 0,
    whole: int = 0,
    experts: int = 0,
) -> Memory:
    """What a process takes that has loaded the model and filled `context` positions.

    `stored` has every matrix by name; `weights` and `embedding` are bytes of all tensors and of the
    embedding; `text` is whether there is a tokenizer, `tables` the bytes of its tables, if it has
    them; `whole` the bytes of the file if all of it is resident; `experts` the bytes of routed
    experts, not all of which a short text touches. Raises ContextError for a context that the model
    does not have.
    """
    if not 0 <= context <= config.context:
        raise ContextError(f"--context {context}: this model was made for 0 to {config.context}")
    unread = 0
    if whole:
        weights = whole
    elif not config.tied:
        runs = max(1, embedding // NEIGHBOURS)
        unread = int(embedding * (1 - 1 / runs) ** max(context, 1))
    if not whole:
        unread += untouched(config.experts, experts, context)
    cached = cache_bytes(config, context, kv)
    tokens = min(max(context, 1), CHUNK)
    buffers = buffer_bytes(config, stored, tokens)
    opened = int(tables * TABLES_HELD) or config.vocabulary * TOKENIZER_ENTRY
    tokenizer = TOKENIZER + opened if text else 0
    total = weights - unread + cached + buffers + baseline()
    return Memory(
        context,
        weights,
        unread,
        cached,
        buffers,
        baseline(),
        tokenizer,
        total,
        total + tokenizer,
    )


def cache_bytes(config: ModelConfig, context: int, kv: str) -> int:
    """Keys and values of `context` positions, in whole pages of the system."""
    shape = cache_shape(config, kv)
    whole, rest = divmod(context, PAGE)
    runs = 2 * shape.layers * shape.kv_heads  # of positions, one after another
    part = round_up(rest * (shape.position_bytes // runs), SYSTEM_PAGE)
    return whole * shape.page_bytes + runs * part


def buffer_bytes(config: ModelConfig, stored: Mapping[str, Stored], tokens: int) -> int:
    """Slots for `tokens`, scratch of the threads, vectors, logits and small objects."""
    specs = model_tensors(config)
    empty = np.zeros(0, np.uint8)
    matrices, vectors = {}, {}
    for spec in specs:
        if spec.kind == "vector":
            vectors[spec.name] = np.zeros(spec.shape, np.float32)
        else:
            shape = (spec.shape[0], spec.shape[1])
            matrices[spec.name] = Matrix(stored[spec.name].scheme, shape, empty)
    planes = {name: s.planes for name, s in stored.items() if s.scheme.is_coded}
    frequencies = np.zeros(config.head_dim // 2, np.float32)
    program = build(config, Weights(matrices, vectors, planes), frequencies, CACHE)
    widest = max(m.shape[1] for m in matrices.values())
    rows = max(QUERY_ROWS, config.heads // config.kv_heads)
    attending = rows * (round_up(config.head_dim, PANEL) * 14 + 6 * PAGE + 76)
    pairs = max((pair_bytes(op, program) for op in program.ops), default=0)
    scratch = max(round_up(widest, BLOCK) * 2 * PANEL + 32768, attending) + tokens * 2 * BLOCK * 4
    return (
        tokens * (sum(map(slot_bytes, program.written())) + config.head_dim * 4 + pairs)
        + thread_count(None) * scratch
        + sum(v.nbytes for v in vectors.values())
        + config.vocabulary * LOGIT_BYTES
        + len(specs) * TENSOR_OBJECT
    )


def pair_bytes(op: Op, program: Program) -> int:
    """Bytes a token of what its experts multiply and make, copied side by side."""
    if op.kind != "experts":
        return 0
    inner = Slot(op.parts[0].matrix.shape[0], op.planes)
    return op.top * (slot_bytes(program.slots[op.source]) + slot_bytes(inner))


def slot_bytes(slot: Slot) -> int:
    """Bytes of a slot's row: numbers, or codes with a scale and sums a block."""
    stride = round_up(slot.width, BLOCK)
    if not slot.planes:
        return stride * 4
    return stride * slot.planes + stride // BLOCK * 4 * (1 + slot.planes)


@cache
def baseline() -> int:
    """Resident bytes of a process that runs a model, without the model; measured once."""
    code = (
        "import chalot.load\n"
        "from chalot.kernels.backend import native\n"
        "from chalot.machine import resident_bytes\n"
        "print(resident_bytes())"
    )
    found = 0
    if Path(sys.executable or "").name.startswith("python"):  # and not a program that embeds it
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                capture_output=True,
                timeout=20,
                check=True,
            )
            found = int(done.stdout)
        except (OSError, ValueError, subprocess.SubprocessError):
            pass
    return (found or IMPORTED) + FIRST_STEP
