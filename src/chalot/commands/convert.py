"""chalot convert SOURCE ..."""

import sys
from argparse import ArgumentParser
from argparse import Namespace as Arguments
from dataclasses import replace
from pathlib import Path
from typing import Any

from chalot.commands.output import as_json, progress, say, show
from chalot.commands.unused import refuse_unused
from chalot.errors import OutputError, SchemeError
from chalot.short_names import BITS
from chalot.table import rows


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("source", nargs="*", help="short names, hub ids, folders, models' files")
    parser.add_argument(
        "--all",
        action="store_true",
        help="every checkpoint below the folders SOURCE; without one, all that were downloaded",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-o", "--out", help="what to write (default: NAME-SCHEME.myai)")
    where.add_argument("--output-dir", metavar="DIR", help="where to write NAME-SCHEME.myai")
    parser.add_argument(
        "--to",
        help="myai (default), gguf, npz or safetensors; or by the ending of OUT: .myai or .gguf",
    )
    parser.add_argument(
        "--type",
        help="for gguf: f16 (default), bf16, f32, q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, "
        "iq4_nl, iq4_xs, q3_k, q2_k, tq2_0, tq1_0, or TYPE,KIND=TYPE,...; "
        "for safetensors: bf16 (default), f16, f32",
    )
    parser.add_argument(
        "--no-tokenizer",
        dest="tokenizer",
        action="store_false",
        help="for gguf: leave out a tokenizer that such files cannot hold",
    )
    parser.add_argument(
        "--ternary",
        choices=("least-error", "absmean"),
        help="the scale of ternary weights: what leaves the least error (default), or BitNet's "
        "mean |w| of a matrix, for models trained with it",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--scheme",
        help="f32, bf16, f16, int8, int6, nl4 (default), int4, nl3, nl2, ternary, sign, row8, "
        "row4, row2, row1, or KIND=SCHEME,... "
        "with kinds attention, ffn, embedding, head; keep (default where weights are quantised "
        "already): each goes to the scheme that loses least of it",
    )
    how.add_argument("--plan", metavar="FILE", help="a scheme for each tensor, by chalot plan")
    how.add_argument("--fit", action="store_true", help="the best scheme that fits this machine")
    how.add_argument("--bits", choices=tuple(BITS), help="that width's scheme: 8 int8, 4 nl4, ...")
    parser.add_argument(
        "--regions",
        metavar="NAME=FIRST-LAST,...",
        help="layers by name (default: shallow, deep, fact; 0-5, 6-17, 18-23 of 24)",
    )
    text = "of each layer's experts, those that a text takes most: another model, smaller"
    parser.add_argument("--experts", type=int, metavar="K", help=text)
    parser.add_argument(
        "--share",
        metavar="FILE",
        help="a .myai file in the same folder: what it holds is not stored again, and read there",
    )
    parser.add_argument("--refine", help="better codes at the same bytes: gptq or hqq")
    parser.add_argument(
        "--calibration", metavar="FILE", help="text for --refine (default: chalot's own)"
    )
    parser.add_argument("--context", type=int, help="tokens that must fit too (default: 4096)")
    parser.add_argument(
        "--dry-run", action="store_true", help="only read headers, and say what fits"
    )
    parser.add_argument(
        "--no-validate",
        dest="validate",
        action="store_false",
        help="for npz: do not compare what was written with SOURCE",
    )
    parser.add_argument("--tolerance", type=float, help="for npz: as for chalot validate")


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.convert import batch

    if arguments.out and (len(arguments.source) > 1 or arguments.all):
        arguments.parser.error("-o names one file; expected --output-dir DIR for several")
    if not (arguments.source or arguments.all):
        arguments.parser.error("found no SOURCE; expected short names, hub ids, folders or files")
    refuse_unused(
        arguments,
        (bool(arguments.refine), "--refine", "--calibration"),
        (arguments.fit or arguments.dry_run, "--fit and --dry-run", "--context"),
        (arguments.validate, "what is validated", "--tolerance"),
    )
    check_settings(arguments)
    if arguments.plan and arguments.dry_run:
        arguments.parser.error("--dry-run judges schemes; the plan itself says what it takes")
    if arguments.experts is not None and (arguments.fit or arguments.dry_run):
        arguments.parser.error("--fit and --dry-run judge all experts; leave --experts out")
    if arguments.share is not None and (arguments.fit or arguments.dry_run):
        arguments.parser.error("--fit and --dry-run judge whole files; leave --share out")
    named = batch.sources(arguments.source, arguments.all)
    if len(named) == 1 and not arguments.all:
        report = one(named[0], arguments)
        if arguments.json:
            show(as_json(report))
        return 0 if passed(report) else 1

    def failed(failure: batch.Failure) -> None:
        say(f"chalot: {failure.error}")

    found = batch.run(named, lambda source: one(source, arguments), failed)
    if arguments.json:
        show(as_json(found))
    say(f"{len(found.reports)} of {len(named)} {'read' if arguments.dry_run else 'converted'}")
    for failure in found.failed:
        say(f"failed: {failure.source}")
    return 0 if not found.failed and all(map(passed, found.reports)) else 1


def check_settings(arguments: Arguments) -> None:
    """Usage error where --to and -o contradict each other, or a setting has no use."""
    from chalot.export import refuse_useless, target_of

    off = {"tokenizer": not arguments.tokenizer, "validate": not arguments.validate}
    try:
        to = target_of(arguments.to, arguments.out)
        refuse_useless(
            to, lambda name: off.get(name, getattr(arguments, name) not in (None, False))
        )
    except SchemeError as error:
        arguments.parser.error(str(error))
    if arguments.tolerance is not None:
        from chalot.validate import check_tolerance

        check_tolerance(arguments.tolerance)  # before what is validated is written


def one(source: str, arguments: Arguments) -> Any:
    """Convert one source, say what that cost or would cost, and return the report."""
    from chalot.convert import batch
    from chalot.convert.refining import Refine
    from chalot.convert.storing import TERNARY
    from chalot.describe import fitting
    from chalot.export import TARGETS, export, target_of

    out = arguments.out or ""
    to = target_of(arguments.to, out)
    scheme = arguments.scheme or BITS.get(arguments.bits)
    fit = None
    if arguments.fit or arguments.dry_run:
        usual, fit = judged(source, arguments)
        scheme = fitting.chosen(fit, source) if arguments.fit else scheme or usual
    if to == "npz":
        out = out or arguments.output_dir or "."
    elif not out:
        scheme = scheme or usual_scheme(source, arguments)
        kind = "plan" if arguments.plan else scheme
        if to != "myai":
            kind = arguments.type or TARGETS[to].type
        out = str(batch.place(source, kind, to, Path(arguments.output_dir or "")))
    if fit is not None and arguments.dry_run:
        if not arguments.json:
            show(f"{fitting.render(fit)}\n{source} would become {out}, in {scheme}.")
        return {"source": source, "path": out, "scheme": scheme, "fit": fit}
    make_folder(arguments.output_dir)
    command = "chalot " + " ".join(sys.argv[1:])
    refine = Refine.of(arguments.refine, arguments.calibration) if arguments.refine else None
    with progress(arguments, f"converting {source}") as advance:
        report = export(
            source,
            out,
            to,
            arguments.type,
            scheme=scheme if to == "myai" else None,
            plan=arguments.plan,
            bits=arguments.bits if to == "npz" else None,
            tokenizer=arguments.tokenizer,
            ternary=arguments.ternary or TERNARY[0],
            threads=arguments.threads,
            progress=advance,
            command=command,
            refine=refine,
            experts=arguments.experts,
            regions=arguments.regions,
            share=arguments.share,
        )
    if not arguments.json:
        tell(report, arguments)
    if to == "npz" and arguments.validate:
        report = validated(report, source, arguments)
    return report


def usual_scheme(source: str, arguments: Arguments) -> str:
    """The scheme when none is asked for; what is on the hub is downloaded to know."""
    from chalot.convert.keeping import usual
    from chalot.convert.storing import DEFAULT_SCHEME
    from chalot.sources import resolve

    with progress(arguments, f"opening {source}") as advance:
        return usual(resolve(source, advance), DEFAULT_SCHEME)


def judged(source: str, arguments: Arguments) -> tuple[str | None, Any]:
    """The usual scheme, and what the source would take in each."""
    from chalot.describe import describe

    place = arguments.out and Path(arguments.out).parent
    folder = Path(place or arguments.output_dir or "")
    found = describe(source, context=arguments.context, folder=folder, again=True)
    return found.scheme, found.fit


def validated(report: Any, source: str, arguments: Arguments) -> Any:
    """The report, with what comparing the files with their source found; shown, too."""
    from chalot.validate import render, validate

    with progress(arguments, "validating") as advance:
        found = validate(
            report.path,
            source,
            tolerance=arguments.tolerance,
            threads=arguments.threads,
            progress=advance,
        )
    if not arguments.json:
        show(render(found, arguments.verbose))
    return replace(report, validation=found)


def passed(report: Any) -> bool:
    """Whether a conversion was compared with its source, if at all, and found near enough."""
    found = getattr(report, "validation", None)
    return found is None or found.ok


def make_folder(name: str | None) -> None:
    """Make the folder of --output-dir. Raises OutputError if it cannot be made."""
    try:
        Path(name or "").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"--output-dir {name}: cannot be made ({error.strerror}); choose another place"
        ) from None


def tell(report: Any, arguments: Arguments) -> None:
    """The cost of each kind of tensor on stderr, the file on stdout."""
    if not arguments.quiet:
        for note in report.notes:
            say(note)
        say(losses(report.kinds))
    show(f"{report.path}: {report.bytes:,} bytes, {report.bits_per_weight:.2f} bits a weight")


def losses(kinds: Any) -> str:
    """The table of what each kind cost; columns that say nothing of any kind are left out."""
    table = [["kind", "scheme", "tensors", "weights", "bytes", "error"]]
    for k in kinds:
        cells = (k.scheme, k.tensors, f"{k.weights:,}", f"{k.bytes:,}", f"{k.error:.2g}")
        table.append([k.kind, *map(str, cells)])
    legend = ["error: relative squared error of the weights that are written, to the source's"]

    def column(name: str, cells: list[str], what: str) -> None:
        legend.append(f"{name}: {what}")
        for line, cell in zip(table, [name, *cells], strict=True):
            line.append(cell)

    if any(k.source_error is not None for k in kinds):
        before = ["-" if k.source_error is None else f"{k.source_error:.2g}" for k in kinds]
        column("before", before, "error of the source's, to those it was quantised from")
    if any(k.wide for k in kinds):
        column("16-bit", [str(k.wide) for k in kinds], "tensors that ask for 16-bit activations")
    if any(k.folded for k in kinds):
        what = "tensors whose columns were balanced by powers of two"
        column("folded", [str(k.folded) for k in kinds], what)
    if any(k.product_errors for k in kinds):
        what = "relative squared error of products on text that took no part, before and after"
        pairs = [k.product_errors for k in kinds]
        both = [f"{pair[0]:.3g} -> {pair[1]:.3g}" if pair else "-" for pair in pairs]
        column("products", both, what)
    return "\n".join([rows(table), *legend])
