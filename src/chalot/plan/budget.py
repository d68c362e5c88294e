"""How many bytes a plan may take, and the least that is possible."""

from collections.abc import Sequence

from chalot.convert.conversion import Conversion
from chalot.convert.storing import DOCUMENTS, parse_schemes, planned_bytes
from chalot.describe import describe
from chalot.errors import LimitError
from chalot.formats.checkpoint import Checkpoint
from chalot.plan import ewq
from chalot.plan.choose import item_bytes
from chalot.plan.swap import items_of
from chalot.quant.grids import tables_of
from chalot.quant.packing import stored_bytes
from chalot.quant.scheme import SCHEMES, Scheme


def matrices_of(work: Conversion) -> list[tuple[str, tuple[int, int]]]:
    """Names and shapes of what has a scheme."""
    return [(s.name, (s.shape[0], s.shape[1])) for s in work.specs if s.kind != "vector"]


def budget_of(work: Conversion, size: int | None, bits: float | None) -> int | None:
    """Bytes for the matrices: of a file's size, or of bits a weight; None: neither is asked."""
    matrices = matrices_of(work)
    if bits is not None:
        if not 0 < bits <= 32:
            raise LimitError(f"{bits} bits a weight; expected above 0, at most 32")
        return int(sum(r * c for _, (r, c) in matrices) * bits / 8)
    if size is None:
        return None
    return size - overhead(work)


def overhead(work: Conversion) -> int:
    """Bytes of a file around its matrices, at most; of grids, those of three schemes."""
    from chalot.text.tokenizer import compiled

    found = [raw for raw in map(work.checkpoint.document, DOCUMENTS) if raw is not None]
    tokenizer = work.checkpoint.document("tokenizer.json")
    found.append((compiled(tokenizer) if tokenizer is not None else None) or b"")
    grids = [t for t in map(tables_of, SCHEMES.values()) if t is not None]
    found += [t.tobytes() for t in grids[:3]]
    stored = sum(stored_bytes(work.schemes[name], *shape) for name, shape in matrices_of(work))
    return planned_bytes(work.config, parse_schemes("nl4")) - stored + sum(map(len, found))


def check_budget(
    work: Conversion, budget: int, schemes: Sequence[Scheme], rest: Scheme | None
) -> None:
    """Raise LimitError, which says the least, where no plan can be so small.

    `rest` is the scheme of embedding and head where it is given: for methods by blocks.
    """
    matrices = matrices_of(work)
    if rest is None:
        ways = ([item_bytes(i, s) for s in schemes] for i in items_of(work.specs))
        least = sum(map(min, ways))
    else:
        lowest = SCHEMES[next(iter(ewq.levels_of(schemes).values()))]
        stored = {n: lowest if n.startswith("layers.") else rest for n, _ in matrices}
        least = sum(stored_bytes(stored[n], *shape) for n, shape in matrices)
    if budget < least:
        beside, weights = overhead(work), sum(r * c for _, (r, c) in matrices)
        bits = max(budget, 0) * 8 / weights
        raise LimitError(
            f"found a size of {budget + beside:,} bytes, {bits:.3f} bits a weight: too small; "
            f"the least that {', '.join(map(str, schemes))} can do here is a file of "
            f"{least + beside:,} bytes, {least * 8 / weights:.3f} bits a weight; ask for that "
            "much, or allow smaller schemes with --schemes"
            + ("" if rest is None else f" or --ewq-rest (now {rest})")
        )


def ewq_budget(work: Conversion, budget: int, schemes: Sequence[Scheme], rest: Scheme) -> int:
    """Bytes for the blocks alone. Raises LimitError: see `check_budget`."""
    check_budget(work, budget, schemes, rest)
    ends = [shape for name, shape in matrices_of(work) if not name.startswith("layers.")]
    return budget - sum(stored_bytes(rest, *shape) for shape in ends)


def fitting_bytes(checkpoint: Checkpoint, context: int | None) -> int:
    """The largest file that this machine can run at a context.

    Raises LimitError where the system does not say how much memory is free.
    """
    found = describe(checkpoint.path, context=context).fit
    assert found is not None  # only a .myai file has none
    if found.memory_available is None:
        raise LimitError("this system does not say how much memory is free; give --size in bytes")
    nl4 = next(o for o in found.options if o.scheme == "nl4")
    beside = nl4.running - nl4.file_bytes
    return min(found.memory_available - beside, found.disk_available)
