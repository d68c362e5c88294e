"""chalot compare SOURCE [MODEL...] --text FILE -o report.html"""

from argparse import ArgumentParser
from argparse import Namespace as Arguments
from pathlib import Path

from chalot.commands.opening import names
from chalot.commands.output import as_json, progress, show
from chalot.commands.unused import refuse_unused
from chalot.errors import FormatError, OutputError
from chalot.table import rows


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("source", help="what the forms are made from: a folder, file or hub id")
    parser.add_argument("models", nargs="*", help=".myai files made from it, or plans (.json)")
    parser.add_argument("--schemes", type=names, help="forms to make too, as nl4,int8")
    parser.add_argument("--text", required=True, metavar="FILE", help="text to measure on")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text (default: 8192)")
    parser.add_argument("--prompts", metavar="FILE", help="prompts that every form answers")
    parser.add_argument("--max-tokens", type=int, help="of each answer (default: 64)")
    parser.add_argument(
        "-o", "--out", default="report.html", help="the page; .md and .json are put beside it"
    )
    parser.add_argument("--folder", help="where forms are kept (default: beside the page)")


def check_place(out: Path) -> None:
    """Make the page's folder now, before an hour's work. Raises OutputError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out.parent}: cannot be made ({error.strerror})") from None


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.compare import compare
    from chalot.compare.page import note, table, write
    from chalot.evaluate.answers import read_prompts

    out = Path(arguments.out).expanduser()
    if out.suffix != ".html":
        raise FormatError(f"{out}: the page is HTML; give it a name that ends in .html")
    refuse_unused(arguments, (bool(arguments.prompts), "--prompts", "--max-tokens"))
    check_place(out)
    prompts = read_prompts(Path(arguments.prompts).expanduser()) if arguments.prompts else []
    with progress(arguments, "comparing") as advance:
        found = compare(
            arguments.source,
            arguments.models,
            arguments.text,
            arguments.folder or out.parent,
            schemes=arguments.schemes or [],
            tokens=arguments.tokens,
            prompts=prompts,
            max_tokens=64 if arguments.max_tokens is None else arguments.max_tokens,
            threads=arguments.threads,
            progress=advance,
        )
    data = as_json(found)
    paths = write(found, out, data)
    if arguments.json:
        show(data)
        return 0
    show(rows(table(found)))
    if not arguments.quiet:
        show(f"{note(found)}\n{', '.join(map(str, paths))}")
    return 0
