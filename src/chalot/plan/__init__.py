"""The verb `plan`: which scheme for which tensor, by entropy or by measured loss.

A plan is a file (`chalot.planfile`) that `convert --plan` obeys. Methods:

    ewq                   entropy-weighted quantisation: a level for each block, by its entropy
    fast-ewq              the same levels, guessed from the configuration (plan/fast_ewq.py)
    error .. measured     the planner, with a loss table of that depth (plan/losses.py)

Budgets are bytes of the file's matrices; vectors, documents and alignment come on top, and are
taken off first.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from chalot.calibration_text import CalibrationText
from chalot.convert.conversion import Conversion
from chalot.convert.storing import DEFAULT_SCHEME, Storing, parse_schemes
from chalot.errors import FormatError, SchemeError
from chalot.evaluate.report import uncut
from chalot.formats.checkpoint import Checkpoint, open_checkpoint
from chalot.formats.myai import MyaiFile
from chalot.formats.new_file import NewFile
from chalot.kernels.backend import open_backend
from chalot.mixture import refuse_mixture
from chalot.plan import ewq, fast_ewq
from chalot.plan.budget import (
    budget_of,
    check_budget,
    ewq_budget,
    fitting_bytes,
    matrices_of,
)
from chalot.plan.choose import Chosen, cheapest, choose, improve, item_bytes
from chalot.plan.losses import DEPTHS, KNOWS_KL, Table, loss_table
from chalot.plan.swap import Swaps
from chalot.planfile import SIMPLE, VERSION, PlanDocument, as_bytes, fingerprint
from chalot.quant.entropy import fit
from chalot.quant.packing import stored_bytes
from chalot.quant.scheme import SCHEMES, Scheme
from chalot.sources import resolve
from chalot.typed import MAY_COUNT, MAY_PATH, PATH, check_types

BY_BLOCK = ("ewq", "fast-ewq")
METHODS = (*BY_BLOCK, *DEPTHS)
PLAN = b'{\n "format"'  # how a plan's file begins: nothing else is written over
USUAL_SCHEMES = ("bf16", "int8", "int6", "nl4", "nl3", "nl2")
USUAL_LEVELS = ("bf16", "int8", "nl4")  # of methods by blocks
FIT = "fit"  # as a size: what this machine can run
LEAST = 32  # tokens of calibration text
Progress = Callable[[str, int, int], None]


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
    schemes: Sequence[Scheme],
    budget: int | None,
    rest: Scheme,
    progress: Progress,
) -> PlanDocument:
    """EWQ; embedding and head, which are no blocks, take the scheme `rest`."""
    if budget is not None:
        budget = ewq_budget(work, budget, schemes, rest)
    specs, levels = list(work.specs), ewq.levels_of(schemes)
    blocks = ewq.analyse(work.read, specs, variant, x, budget, levels, progress)
    tensors = ewq.tensors_of(specs, blocks, levels, rest)
    said = ewq.details(blocks, variant, x)
    return document(work, checkpoint, f"ewq {variant}", tensors, details=said)


def by_guess(
    work: Conversion,
    checkpoint: Checkpoint,
    schemes: Sequence[Scheme],
    budget: int | None,
    rest: Scheme,
) -> PlanDocument:
    """FastEWQ; under a budget blocks go by what the tree says of them."""
    guess, levels, specs = fast_ewq.guess(work.config), ewq.levels_of(schemes), list(work.specs)
    blocks, given = ewq.by_block(specs), guess.levels
    if budget is not None:
        left = ewq_budget(work, budget, schemes, rest)
        found = fit(guess.order, given, ewq.sizes(blocks, levels), left, tuple(levels))
        given = found or given  # `ewq_budget` has seen that there is one
    by_name = dict(zip(blocks, given, strict=True))
    record = fast_ewq.fitted()
    said = {
        "x": 1.0,
        **{n: getattr(record, n) for n in ("agreement", "majority", "error", "models")},
        "blocks": {
            n: {"decided": d, "level": by_name[n]}
            for n, d in zip(blocks, guess.levels, strict=True)
        },
    }
    tensors = ewq.by_level(specs, by_name, levels, rest)
    return document(work, checkpoint, "fast-ewq", tensors, details=said)


def by_loss(
    work: Conversion,
    checkpoint: Checkpoint,
    depth: str,
    schemes: Sequence[Scheme],
    bounds: tuple[int | None, float | None, int],
    text: Path | None,
    apart: bool,
    threads: int | None,
    progress: Progress,
) -> PlanDocument:
    """The planner: a loss table, the best allocation, and exchanges that the true KL approves."""
    if bounds[0] is not None:
        check_budget(work, bounds[0], schemes, None)
    said = CalibrationText.of(text)
    ids = said.ids(checkpoint, work.config, LEAST)
    with uncut(checkpoint.path, threads, balance="nl4") as made:
        file = MyaiFile(made)
        try:
            swaps = Swaps(file, open_backend(threads=threads), ids, apart)
            key = f"{file.manifest.source.digest} {said.digest} {len(swaps.ids)} {apart}"
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
        text=str(said),
        details={"losses": table, "tokens": len(swaps.ids)},
    )


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


def check_choice(
    method: str,
    variant: str,
    x: float,
    size: int | str | None,
    bits: float | None,
    max_kl: float | None,
) -> None:
    """Raise FormatError where what is asked for does not go together."""
    if method not in METHODS:
        raise FormatError(f"method {method!r} is not known; choose {', '.join(METHODS)}")
    if variant not in ewq.VARIANTS:
        raise FormatError(f"variant {variant!r} is not known; choose {', '.join(ewq.VARIANTS)}")
    if not 0 <= x < math.inf:
        raise FormatError(
            f"found {x} sigmas below the mean; expected a finite number of 0 or more, as 1.0"
        )
    if isinstance(size, str) and size != FIT:
        raise FormatError(f"size {size!r}; expected bytes, or {FIT!r}")
    if sum(v is not None for v in (size, bits, max_kl)) > 1:
        raise FormatError("give one of a size, bits a weight and a largest KL, not several")
    if max_kl is not None and method not in KNOWS_KL:
        raise FormatError(
            f"method {method} expects no KL that could be bounded; choose {', '.join(KNOWS_KL)}"
        )
    if max_kl is not None and not 0 < max_kl < math.inf:
        raise FormatError(f"found a largest KL of {max_kl}; expected nats a token above 0, as 0.02")


def check_simple(method: str, schemes: Sequence[Scheme], rest: str | None) -> None:
    """Raise SchemeError for a plan that the simple form could not say."""
    if method not in BY_BLOCK:
        raise SchemeError(
            f"found --method {method} with --simple, which has a level for each block; leave out "
            f"--simple, or choose {' or '.join(BY_BLOCK)}"
        )
    unknown = [str(s) for s in schemes if str(s) not in SIMPLE.values()]
    if unknown:
        raise SchemeError(
            f"found {', '.join(unknown)} with --simple, which knows {', '.join(SIMPLE.values())}; "
            "leave out --simple, or choose of these with --schemes"
        )
    if rest is not None and Scheme.parse(rest) != SCHEMES[DEFAULT_SCHEME]:
        raise SchemeError(
            f"found {rest} for embedding and head with --simple, which has no place for it: "
            f"converting gives them {DEFAULT_SCHEME}; leave out --ewq-rest, or --simple"
        )


def plan(
    source: str | Path,
    out: str | Path,
    *,
    method: str = "fisher",
    variant: str = "softmax",
    x: float = 1.0,
    size: int | str | None = None,
    context: int | None = None,
    bits: float | None = None,
    max_kl: float | None = None,
    schemes: Sequence[str] | None = None,
    text: str | Path | None = None,
    exchanges: int = 40,
    apart: bool = False,
    rest: str | None = None,
    simple: bool = False,
    threads: int | None = None,
    progress: Progress = lambda *_: None,
) -> PlanDocument:
    """Choose a scheme for every tensor of a checkpoint, and write the plan to `out`.

    At most one of `size` (bytes of the file, or "fit": what this machine can run at `context`),
    `bits` (a weight, of all matrices) and `max_kl` (expected, nats a token) bounds it; without one
    a planner's file has the size of `nl4`, and EWQ is free. EWQ's levels are the `schemes`, three
    or four; `rest` is what it gives embedding and head, "int8" unless said. With `apart` a planner
    chooses for query, key and value, gate and up each, and not together. `simple` writes {"0":
    "raw", ...}: of blocks only, so that `rest` is what converting gives the others. The file
    appears whole or not at all. Raises LimitError for a budget below what is possible, and says
    the least; SchemeError, FormatError, WeightError.
    """
    check_types(
        source=(source, PATH),
        out=(out, PATH),
        text=(text, MAY_PATH),
        context=(context, MAY_COUNT),
        threads=(threads, MAY_COUNT),
    )
    check_choice(method, variant, x, size, bits, max_kl)
    if exchanges < 0:
        raise FormatError(f"found {exchanges} exchanges; expected 0 or more")
    usual = USUAL_LEVELS if method in BY_BLOCK else USUAL_SCHEMES
    known = list(dict.fromkeys(Scheme.parse(s) for s in schemes or usual))
    if len(known) < 2:
        raise SchemeError("a plan needs two schemes to choose from; name more with --schemes")
    if method in BY_BLOCK:
        ewq.levels_of(known)
    if simple:
        check_simple(method, known, rest)
    last = Scheme.parse(rest or (DEFAULT_SCHEME if simple else "int8"))
    checkpoint = open_checkpoint(resolve(source))
    with closing(checkpoint), NewFile(Path(out), PLAN, "plan") as file:
        work = Conversion(
            checkpoint,
            Storing(parse_schemes("nl4")),
            open_backend(threads=threads),
            lambda *_: None,
        )
        refuse_mixture(work.config, "chalot plan", "convert it by kinds, as --scheme ffn=nl4")
        most = fitting_bytes(checkpoint, context) if isinstance(size, str) else size
        budget = budget_of(work, most, bits)
        if method == "ewq":
            made = by_entropy(work, checkpoint, variant, x, known, budget, last, progress)
        elif method == "fast-ewq":
            made = by_guess(work, checkpoint, known, budget, last)
        else:
            words = None if text is None else Path(text).expanduser()
            bounds = budget, max_kl, exchanges
            made = by_loss(work, checkpoint, method, known, bounds, words, apart, threads, progress)
        file.write(as_bytes(made, simple))
        file.commit()
    return made
