"""chalot validate MODEL --against SOURCE"""

from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.output import as_json, progress, show


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("model", help="a .myai file, an .npz or its manifest, a .gguf, a folder")
    parser.add_argument("--against", required=True, metavar="SOURCE", help="what it was made of")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest relative error (default: 0.02 at 8 bits, 0.1 at 4, 0.2 at 2, 0.5 at 1)",
    )


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.validate import render
    from chalot.validate import validate as run_it

    with progress(arguments, "validating") as advance:
        report = run_it(
            arguments.model,
            arguments.against,
            tolerance=arguments.tolerance,
            threads=arguments.threads,
            progress=advance,
        )
    show(as_json(report) if arguments.json else render(report, arguments.verbose))
    return 0 if report.ok else 1
