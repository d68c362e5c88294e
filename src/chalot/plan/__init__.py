"""The verb `plan`: which scheme for which tensor, by entropy or by measured loss.

A plan is a file (`chalot.planfile`) that `convert --plan` obeys. Methods:

    ewq                   entropy-weighted quantisation: a level for each block, by its entropy
    error .. measured     the planner, with a loss table of that depth (plan/losses.py)

Budgets are bytes of the file's matrices; vectors, documents and alignment come on top, and are
taken off first.
"""

import hashlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from chalot.convert import (
    CALIBRATION_TEXT,
    DOCUMENTS,
    Conversion,
    parse_schemes,
    planned_bytes,
)
from chalot.describe import describe
from chalot.errors import FormatError, LimitError, SchemeError
from chalot.evaluate.report import read_text, uncut
from chalot.formats.checkpoint import Checkpoint, open_checkpoint
from chalot.formats.myai import MyaiFile
from chalot.kernels.backend import open_backend
from chalot.plan import ewq
from chalot.plan.choose import Chosen, cheapest, choose, improve, item_bytes
from chalot.plan.losses import DEPTHS, Table, loss_table
from chalot.plan.swap import Swaps
from chalot.planfile import VERSION, PlanDocument, fingerprint, write_plan
from chalot.quant.packing import stored_bytes
from chalot.quant.scheme import SCHEMES, Scheme
from chalot.sources import resolve

METHODS = ("ewq", *DEPTHS)
USUAL_SCHEMES = ("bf16", "int8", "int6", "nl4", "nl2")
FIT = "fit"  # as a size: what this machine can run
Progress = Callable[[str, int, int], None]


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
    documents = sum(len(work.checkpoint.document(n) or b"") for n in DOCUMENTS)
    whole = planned_bytes(work.config, parse_schemes("nl4")) + documents
    stored = sum(stored_bytes(work.schemes[name], *shape) for name, shape in matrices)
    return size - (whole - stored)


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


def total_bytes(work: Conversion, tensors: dict[str, str]) -> int:
    """Bytes of all matrices as planned."""
    return sum(stored_bytes(SCHEMES[tensors[n]], *shape) for n, shape in matrices_of(work))


def document(
    work: Conversion, checkpoint: Checkpoint, method: str, tensors: dict[str, str], **more: object
) -> PlanDocument:
    """The plan's file."""
    size = total_bytes(work, tensors)
    weights = sum(r * c for _, (r, c) in matrices_of(work))
    return PlanDocument(
        VERSION,
        checkpoint.path.name,
        fingerprint(checkpoint),
        method,
        tensors,
        size,
        size * 8 / weights,
        **more,  # type: ignore[arg-type]
    )


def by_entropy(
    work: Conversion,
    checkpoint: Checkpoint,
    variant: str,
    x: float,
    budget: int | None,
    rest: Scheme,
    progress: Progress,
) -> PlanDocument:
    """EWQ; embedding and head, which are no blocks, take the scheme `rest`."""
    if variant not in ewq.VARIANTS:
        raise FormatError(f"variant {variant!r} is not known; choose {', '.join(ewq.VARIANTS)}")
    if budget is not None:
        ends = [s for n, s in matrices_of(work) if not n.startswith("layers.")]
        budget -= sum(stored_bytes(rest, *shape) for shape in ends)
    specs = list(work.specs)
    blocks = ewq.analyse(work.read, specs, variant, x, budget, progress=progress)
    tensors = ewq.tensors_of(specs, blocks, ewq.DEFAULT, rest)
    said = ewq.details(blocks, variant, x)
    return document(work, checkpoint, f"ewq {variant}", tensors, details=said)


def by_loss(
    work: Conversion,
    checkpoint: Checkpoint,
    depth: str,
    schemes: Sequence[Scheme],
    bounds: tuple[int | None, float | None, int],
    text: Path | None,
    threads: int | None,
    progress: Progress,
) -> PlanDocument:
    """The planner: a loss table, the best allocation, and exchanges that the true KL approves."""
    if text is None:
        place = resources.files("chalot").joinpath(*CALIBRATION_TEXT)
        name, words = "bundled", place.read_text("utf-8")
    else:
        name, words = text.name, read_text(text)
    digest = hashlib.sha256(words.encode()).hexdigest()
    with uncut(checkpoint.path, threads, balance="nl4") as made:
        file = MyaiFile(made)
        try:
            ids = ids_of(file, words)
            swaps = Swaps(file, open_backend(threads=threads), ids)
            key = f"{file.manifest.source.digest} {digest} {len(swaps.ids)}"
            table = loss_table(swaps, depth, schemes, key, progress)
            found, kl = chosen(swaps, table, schemes, *bounds, progress)
            tensors = {
                t.name: found.schemes[item.name] for item in swaps.items for t in item.tensors
            }
        finally:
            file.close()
    return document(
        work,
        checkpoint,
        depth,
        tensors,
        expected_loss=found.expected,
        measured_loss=kl,
        text=f"{name} {digest[:16]}",
        details={"losses": table, "tokens": len(swaps.ids)},
    )


def ids_of(file: MyaiFile, words: str) -> list[int]:
    """The text's tokens. Raises FormatError for too few, or ids beyond the vocabulary."""
    from chalot.load import read_model_config
    from chalot.text.tokenizer import from_source

    ids = from_source(file).encode(words)
    vocabulary = read_model_config(file).vocabulary
    if len(ids) < 32:
        raise FormatError(f"the calibration text has {len(ids)} tokens; expected some hundreds")
    if max(ids) >= vocabulary:
        raise FormatError(
            f"the tokenizer gives id {max(ids)}, the model has {vocabulary} tokens; "
            "do they belong together?"
        )
    return ids


def chosen(
    swaps: Swaps,
    table: Table,
    schemes: Sequence[Scheme],
    budget: int | None,
    max_kl: float | None,
    tries: int,
    progress: Progress,
) -> tuple[Chosen, float | None]:
    """The plan by item, and its true KL where that was looked at."""
    if max_kl is not None:
        found = cheapest(swaps.items, table, schemes, max_kl)
        budget = found.bytes
    else:
        if budget is None:  # the size of the default scheme
            budget = sum(item_bytes(i, SCHEMES["nl4"]) for i in swaps.items)
        found = choose(swaps.items, table, schemes, budget)
    if not tries:
        return found, None
    return improve(swaps, table, schemes, found, budget, tries, progress)


def plan(
    source: str | Path,
    out: str | Path,
    *,
    method: str = "linear",
    variant: str = "softmax",
    x: float = 1.0,
    size: int | str | None = None,
    context: int | None = None,
    bits: float | None = None,
    max_kl: float | None = None,
    schemes: Sequence[str] = USUAL_SCHEMES,
    text: str | Path | None = None,
    exchanges: int = 40,
    rest: str = "int8",
    threads: int | None = None,
    progress: Progress = lambda *_: None,
) -> PlanDocument:
    """Choose a scheme for every tensor of a checkpoint, and write the plan to `out`.

    At most one of `size` (bytes of the file, or "fit": what this machine can run at `context`),
    `bits` (a weight, of all matrices) and `max_kl` (expected, nats a token) bounds it; without one
    a planner's file has the size of `nl4`, and EWQ is free. `rest` is what EWQ gives embedding and
    head. Raises LimitError for a budget below what is possible, and says the least; SchemeError,
    FormatError, WeightError.
    """
    if method not in METHODS:
        raise FormatError(f"method {method!r} is not known; choose {', '.join(METHODS)}")
    if isinstance(size, str) and size != FIT:
        raise FormatError(f"size {size!r}; expected bytes, or {FIT!r}")
    if sum(v is not None for v in (size, bits, max_kl)) > 1:
        raise FormatError("give one of a size, bits a weight and a largest KL, not several")
    known = [Scheme.parse(s) for s in schemes]
    if len(set(known)) < 2 and method != "ewq":
        raise SchemeError("a plan needs two schemes to choose from; name more with --schemes")
    most: int | None = None
    budget: int | None = None
    checkpoint = open_checkpoint(resolve(source))
    try:
        work = Conversion(
            checkpoint, parse_schemes("nl4"), open_backend(threads=threads), lambda *_: None
        )
        most = size if isinstance(size, int | None) else fitting_bytes(checkpoint, context)
        budget = budget_of(work, most, bits)
        if method == "ewq":
            made = by_entropy(work, checkpoint, variant, x, budget, Scheme.parse(rest), progress)
        else:
            words = None if text is None else Path(text).expanduser()
            bounds = budget, max_kl, exchanges
            made = by_loss(work, checkpoint, method, known, bounds, words, threads, progress)
    except LimitError as error:
        if most is None or budget is None:
            raise
        raise LimitError(f"{error} (beside them a file has {most - budget:,} bytes)") from None
    finally:
        checkpoint.close()
    write_plan(made, Path(out))
    return made
