"""The only importer of the compiled extension: programs and matrices in the form it takes.

A backend's threads start at first use and sleep when idle. Calls from several Python threads are
served one after another; a forked child starts threads of its own.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.errors import KernelError
from chalot.kernels import _native  # type: ignore[attr-defined]
from chalot.kernels.program import CACHE_TYPES, GATES, KINDS, ROUTINGS, Batch, Op, Program
from chalot.quant.codes import padded, quantize
from chalot.quant.grids import tables_of
from chalot.quant.packing import Layout, Matrix, aligned, pack
from chalot.quant.refine import Steps
from chalot.quant.scheme import SCHEMES, Scheme

INDEX = {name: i for i, name in enumerate(SCHEMES)}
ENCODED = ("int8", "nl4", "int4", "nl3", "nl2")  # natively; others by numpy
NO_TABLES = np.zeros((256, 16), np.int8)
NO_STEPS = np.zeros((0, 0), np.float32)
instruction_sets = _native.instruction_sets
BytePairs: Any = _native.BytePairs


def matrix_fields(m: Matrix) -> tuple[object, ...]:
    """(scheme, rows, columns, segment, data, tables) as the extension reads them."""
    return (INDEX[m.scheme.name], *m.shape, m.scheme.segment, m.data, m.tables)


def op_fields(op: Op) -> tuple[object, ...]:
    """The nineteen fields of an operation."""
    parts = [(matrix_fields(p.matrix), p.bias, p.column) for p in op.parts]
    return (
        KINDS.index(op.kind),
        op.source,
        op.target,
        parts,
        op.weight,
        op.number,
        op.layer,
        op.add,
        GATES.index(op.gate),
        op.window,
        op.cap,
        op.fused,
        op.sinks,
        ROUTINGS.index(op.routing),
        op.top,
        op.routes,
        op.planes,
        op.rope,
        op.bias,
    )


def program_fields(program: Program) -> tuple[Any, ...]:
    """(slots, operations, cache, heads, inverse frequencies, rope's factor), for the extension."""
    cache = program.cache
    return (
        [(s.width, s.planes) for s in program.slots],
        [op_fields(op) for op in program.ops],
        (CACHE_TYPES.index(cache.kind), cache.layers, cache.kv_heads, cache.head_dim),
        program.heads,
        [[float(f) for f in of_set] for of_set in program.inverse_frequency],
        float(program.rope_factor),
    )


class NativeProgram:
    """A program whose memory the extension has checked; keeps the arrays it reads alive."""

    def __init__(self, program: Program, machine: object) -> None:
        self.machine = machine
        self.vocabulary = program.vocabulary
        self.slots = program.slots
        try:
            self.native = _native.Program(*program_fields(program))
        except ValueError as error:
            raise KernelError(f"program does not fit together: {error}") from None

    def run(self, batch: Batch, arena: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See Runnable."""
        logits = np.empty((len(batch.wanted), self.vocabulary), np.float32)
        self._call(self.native.run, batch, arena, logits)
        return logits

    def best(
        self, batch: Batch, arena: NDArray[np.uint8], count: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """See Runnable."""
        ids = np.empty((len(batch.wanted), count), np.int32)
        logits = np.empty((len(batch.wanted), count), np.float32)
        self._call(self.native.best, batch, arena, ids, logits)
        return ids, logits

    def _call(
        self,
        entry: Callable[..., None],
        batch: Batch,
        arena: NDArray[np.uint8],
        *out: NDArray[np.generic],
    ) -> None:
        try:
            entry(
                self.machine,
                batch.tokens,
                batch.positions,
                batch.sequences,
                batch.pages,
                batch.wanted,
                arena,
                *out,
            )
        except (IndexError, ValueError) as error:
            raise KernelError(f"batch: {error}") from None

    @property
    def taken(self) -> list[NDArray[np.int64]]:
        """See Compiled."""
        return [np.array(counts, np.int64) for counts in self.native.taken]

    def slot(self, index: int, tokens: int) -> NDArray[np.float32]:
        """See Runnable."""
        out = np.empty((tokens, self.slots[index].width), np.float32)
        self.native.copy_slot(index, out)
        return out


class NativeBackend:
    """Compiled kernels of one instruction set."""

    def __init__(self, isa: str, threads: int) -> None:
        self.machine = _native.Machine(isa, threads)
        self.name: str = self.machine.isa
        self.threads: int = threads

    def compile(self, program: Program) -> NativeProgram:
        """See Backend."""
        return NativeProgram(program, self.machine)

    def encode(self, weights: NDArray[np.float32], scheme: Scheme) -> NDArray[np.uint8]:
        """See Backend."""
        if scheme.name not in ENCODED:
            return pack(quantize(weights, scheme))
        layout, tables = Layout(scheme, *weights.shape), tables_of(scheme)
        out = aligned(layout.nbytes)
        panels, segments, row_scale = layout.parts
        self.machine.encode(
            INDEX[scheme.name],
            scheme.segment,
            NO_TABLES if tables is None else tables,
            padded(weights),
            out[panels],
            out[segments].view(np.uint16),
            out[row_scale].view(np.float32),
        )
        return out

    def product(self, matrix: Matrix, x: NDArray[np.float32], planes: int) -> NDArray[np.float32]:
        """See Backend."""
        y = np.empty((len(x), matrix.shape[0]), np.float32)
        self.machine.product(matrix_fields(matrix), planes, np.ascontiguousarray(x), y)
        return y

    def round_columns(
        self,
        steps: Steps,
        w: NDArray[np.float32],
        upper: NDArray[np.float32],
        unit: NDArray[np.float32],
        offset: NDArray[np.float32],
        levels: NDArray[np.uint8],
    ) -> NDArray[np.uint8]:
        """See Backend."""
        codes = np.empty(w.shape, np.uint8)
        numbers = (steps.step, steps.middle, steps.low, steps.high)
        tables = NO_STEPS if steps.tables is None else steps.tables
        one, of_group = np.ascontiguousarray(unit), np.ascontiguousarray(levels)
        self.machine.refine(numbers, tables, w, upper, one, offset, of_group, codes)
        return codes

    def exp(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Backend."""
        y = np.empty_like(x)
        self.machine.exp(x, y)
        return y

    def read(self, numbers: NDArray[np.uint64]) -> int:
        """See Backend."""
        return int(self.machine.read(numbers))
