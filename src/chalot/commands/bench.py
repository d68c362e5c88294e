"""chalot bench MODEL"""

from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.opening import MODEL, cache_type, converted
from chalot.commands.output import as_json, progress, say, show


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument(
        "--depths", type=int, nargs="+", metavar="TOKENS", help="texts' lengths to measure at"
    )
    cache_type(parser, None)


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.bench import bench as run_it
    from chalot.bench import render

    path = converted(arguments.model, arguments)
    options = {"threads": arguments.threads, "depths": arguments.depths, "kv": arguments.kv}
    with progress(arguments, "measuring") as advance:
        report = run_it(path, **options, progress=advance)
    show(as_json(report) if arguments.json else render(report))
    if report.disturbed:
        say(f"chalot: {report.disturbed} while measuring; these figures mean little")
    return 0
