"""The kernels on numpy arrays, for those who want a part and no model.

Each call is a program of one or two operations, so results are the same to the last bit on every
instruction set, and the same as inside a model (docs/exactness.md).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chalot.errors import KernelError
from chalot.kernels.backend import Backend, open_backend
from chalot.kernels.program import CACHE, CACHE_TYPES, PAGE, Batch, CacheShape, Op, Program, Slot
from chalot.kernels.program import Part as ProgramPart
from chalot.quant.packing import Matrix, as_matrix
from chalot.quant.scheme import SCHEMES

Floats = NDArray[np.float32]
LARGEST_HEAD = 1024


def finite(x: ArrayLike, name: str, dimensions: int) -> Floats:
    """As float32 with so many axes, none of them empty. Raises KernelError for anything else."""
    try:
        with np.errstate(over="ignore"):  # what is no float32 is said below
            out = np.ascontiguousarray(x, np.float32)
    except (TypeError, ValueError):
        raise KernelError(f"{name}: is no array of numbers; expected float32") from None
    if out.ndim != dimensions or not out.size:
        raise KernelError(f"{name}: found shape {out.shape}, expected {dimensions} axes, not empty")
    if not np.isfinite(out).all():
        raise KernelError(f"{name}: has NaN or Inf, expected finite float32 numbers")
    return out


def product(matrix: Matrix, x: ArrayLike, bits: int = 8, backend: Backend | None = None) -> Floats:
    """x @ matrix.T: (tokens, rows) float32 of x (tokens, columns).

    x is quantised to 8 or 16 `bits` in blocks of 128 columns where the matrix is coded, and used as
    it is where it is dense. `backend` is what `open_backend` gives (default: the best here). Raises
    KernelError where shapes do not fit, or a number is not finite.
    """
    numbers = finite(x, "x", 2)
    if numbers.shape[1] != matrix.shape[1]:
        raise KernelError(f"x: found {numbers.shape[1]} columns, expected {matrix.shape[1]}")
    if bits not in (8, 16):
        raise KernelError(f"bits: found {bits}, expected 8 or 16")
    try:
        return (backend or open_backend()).product(matrix, numbers, bits // 8)
    except ValueError as error:
        raise KernelError(f"{error}; was the matrix made by chalot.quant.as_matrix?") from None


def attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    cache: str = CACHE,
    scale: float | None = None,
    window: int = 0,
    cap: float = 0.0,
    backend: Backend | None = None,
) -> Floats:
    """softmax(scale q k) v, causal: (tokens, heads, head_dim) float32.

    `queries` (tokens, heads, head_dim) belong to the last of the positions; `keys` and `values` are
    (positions, kv_heads, head_dim), rotated already if they are to be. kv_heads divides heads,
    head_dim is even and at most 1024. `cache` is how keys and values are kept: int8, f16 or f32.
    `scale` defaults to 1 / sqrt(head_dim). With a `window` a query sees that many positions, its
    own included; with a `cap` scores become cap * tanh(score / cap). Raises KernelError.
    """
    q, k, v = finite(queries, "queries", 3), finite(keys, "keys", 3), finite(values, "values", 3)
    (tokens, heads, size), (positions, kv_heads, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape[2] != size or tokens > positions or heads % kv_heads:
        raise KernelError(
            f"found queries {q.shape}, keys {k.shape}, values {v.shape}; expected keys and values "
            "alike, one head size, no more queries than keys, kv_heads that divide heads"
        )
    if size % 2 or size > LARGEST_HEAD:
        raise KernelError(f"head size: found {size}, expected an even one up to {LARGEST_HEAD}")
    if cache not in CACHE_TYPES:
        raise KernelError(f"cache: found {cache!r}, expected one of: {', '.join(CACHE_TYPES)}")
    if not 0 <= window < 1 << 24 or not 0 <= cap < np.inf:
        raise KernelError(f"found window {window}, cap {cap}; expected 0 or more")
    factor = size**-0.5 if scale is None else scale
    if not np.isfinite(factor):
        raise KernelError(f"scale: found {scale}, expected a finite number")
    shape, kernels = CacheShape(cache, 1, kv_heads, size), backend or open_backend()
    arena = _arena(shape, positions)
    rows = np.zeros((positions, heads + 2 * kv_heads, size), np.float32)
    rows[positions - tokens :, :heads] = q
    rows[:, heads : heads + kv_heads], rows[:, heads + kv_heads :] = k, v
    held = as_matrix(rows.reshape(positions, -1), SCHEMES["f32"])
    attend = Op("attend", 0, 1, number=factor, window=window, cap=cap)
    store = Op("rope_store", 0, 0)
    for ops, first, last in (
        ((store,), 0, positions - tokens),
        ((store, attend), positions - tokens, positions),
    ):
        if first == last:
            continue
        embed = Op("embed", target=0, parts=(ProgramPart(held),), number=1.0)
        slots = (Slot(held.shape[1]), Slot(heads * size))[: 1 + len(ops) // 2]
        still = np.zeros((1, size // 2), np.float32)  # rope turns by nothing
        program = Program(slots, (embed, *ops), shape, heads, still, 1)
        runnable = kernels.compile(program)
        runnable.run(_batch(first, last), arena)
    return runnable.slot(1, tokens).reshape(tokens, heads, size)


def _arena(shape: CacheShape, positions: int) -> NDArray[np.uint8]:
    """Pages for so many positions, at a multiple of 64 bytes."""
    size = -(-positions // PAGE) * shape.page_bytes
    raw = np.zeros(size + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + size]


def _batch(first: int, last: int) -> Batch:
    """Positions first...last - 1 of one sequence, which are rows of the embedding too."""
    line = np.arange(first, last, dtype=np.int32)
    pages = np.arange(-(-last // PAGE), dtype=np.int32)[None]
    return Batch(line, line, np.zeros(last - first, np.int32), pages)
