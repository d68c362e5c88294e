"""chalot verify FILE"""

from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.output import as_json, progress, show


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("file", help="a .myai file")


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.verify import render
    from chalot.verify import verify as run_it

    with progress(arguments, "verifying") as advance:
        report = run_it(arguments.file, progress=advance)
    show(as_json(report) if arguments.json else render(report))
    return 0 if report.ok else 1
