"""Which kernels run here, and one interface to them: compile programs, encode weights, multiply.

`open_backend` takes the best instruction set, or the one that `CHALOT_ISA` or its argument forces;
a set that cannot run is an error. "reference" forces the numpy oracle, which also serves, after one
visible warning, where the compiled extension is missing.
"""

import os
import warnings
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from chalot import machine
from chalot.errors import KernelError
from chalot.kernels import reference
from chalot.kernels.interpreter import ReferenceProgram
from chalot.kernels.program import Batch, Program
from chalot.quant import codes, packing, refine
from chalot.quant.packing import Matrix
from chalot.quant.refine import Steps
from chalot.quant.scheme import Scheme

try:
    from chalot.kernels import native
except ImportError as error:  # not built, or built for another Python
    native = None  # type: ignore[assignment]
    MISSING: str | None = str(error)
else:
    MISSING = None

byte_pairs = None if native is None else native.BytePairs  # merges the words of texts


class Runnable(Protocol):
    """A program made ready by a backend."""

    def run(self, batch: Batch, arena: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits (wanted, vocabulary). The arena's pages receive the batch's keys and values."""

    def best(
        self, batch: Batch, arena: NDArray[np.uint8], count: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and logits (wanted, count) of the best, by descending logit, then ascending id.

        An id of -1 comes first where logits were infinite or not a number.
        """

    def slot(self, index: int, tokens: int) -> NDArray[np.float32]:
        """(tokens, width): what the last batch left in a float slot that is written."""


class Compiled(Runnable, Protocol):
    """A program of one backend alone, which counts."""

    @property
    def taken(self) -> list[NDArray[np.int64]]:
        """Tokens that each expert had so far, for each operation that runs experts, in order."""


class Backend(Protocol):
    """Kernels of one instruction set on a number of threads."""

    @property
    def name(self) -> str:
        """The instruction set."""

    @property
    def threads(self) -> int:
        """Threads that compute."""

    def compile(self, program: Program) -> Compiled:
        """Check a program and make it ready. Raises KernelError where it does not fit together."""

    def encode(self, weights: NDArray[np.float32], scheme: Scheme) -> NDArray[np.uint8]:
        """The packed extent of a float32 matrix (rows, columns), as `packing.pack` gives it."""

    def product(self, matrix: Matrix, x: NDArray[np.float32], planes: int) -> NDArray[np.float32]:
        """(tokens, rows) = x @ matrix.T; x is quantised to `planes` for a coded matrix."""

    def round_columns(
        self,
        steps: Steps,
        w: NDArray[np.float32],
        upper: NDArray[np.float32],
        unit: NDArray[np.float32],
        offset: NDArray[np.float32],
        levels: NDArray[np.uint8],
    ) -> NDArray[np.uint8]:
        """What `quant.refine.round_columns` says."""

    def exp(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """e^x by the project's polynomial."""

    def read(self, numbers: NDArray[np.uint64]) -> int:
        """The sum, modulo 2^64, of an array: how fast the threads read memory."""


class ReferenceBackend:
    """The numpy oracle as a backend."""

    name = "reference"
    threads = 1

    def compile(self, program: Program) -> Compiled:
        """See Backend."""
        return ReferenceProgram(program)

    def encode(self, weights: NDArray[np.float32], scheme: Scheme) -> NDArray[np.uint8]:
        """See Backend."""
        return packing.pack(codes.quantize(weights, scheme))

    def product(self, matrix: Matrix, x: NDArray[np.float32], planes: int) -> NDArray[np.float32]:
        """See Backend."""
        return reference.times(matrix, x, planes if matrix.scheme.is_coded else 0)

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
        return refine.round_columns(steps, w, upper, unit, offset, levels)

    def exp(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Backend."""
        return reference.exp(x)

    def read(self, numbers: NDArray[np.uint64]) -> int:
        """See Backend."""
        return int(numbers.sum())


def instruction_sets() -> list[tuple[str, bool]]:
    """(name, runs here), best first, the oracle last."""
    built = list(native.instruction_sets()) if native is not None else []
    return [*built, ("reference", True)]


def open_backend(isa: str | None = None, threads: int | None = None) -> Backend:
    """Kernels for `isa` (CHALOT_ISA, else the best) on `threads` (CHALOT_THREADS, else the cores).

    Raises KernelError if the instruction set is unknown or cannot run here, or threads is no count.
    """
    name = isa or os.environ.get("CHALOT_ISA") or ""
    count = thread_count(threads)
    if name == "reference":
        return ReferenceBackend()
    sets = dict(instruction_sets())
    if name and name not in sets:
        raise KernelError(
            f"instruction set {name!r} is not known; choose one of: {', '.join(sets)}"
        )
    if name and not sets[name]:
        able = ", ".join(n for n, runs in sets.items() if runs)
        raise KernelError(
            f"instruction set {name} cannot run on this processor; it can run: {able}"
        )
    if native is None:
        warnings.warn(
            f"compiled kernels are missing ({MISSING}); numpy runs instead, far slower. "
            "Reinstall chalot with a C++20 compiler at hand.",
            RuntimeWarning,
            stacklevel=2,
        )
        return ReferenceBackend()
    return native.NativeBackend(name, count)


def thread_count(threads: int | None) -> int:
    """The argument, else CHALOT_THREADS, else what the machine grants."""
    if threads is None:
        text = os.environ.get("CHALOT_THREADS", "")
        if not text:
            return machine.default_threads()
        if not text.isdigit():
            raise KernelError(f"CHALOT_THREADS is {text!r}; expected a number of threads")
        threads = int(text)
    if not 1 <= threads <= 1024:
        raise KernelError(f"{threads} threads asked for; expected 1 to 1024")
    return threads
