"""chalot describe MODEL"""

from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.output import as_json, show


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("model", help="a .myai file, a folder, or a hub id (headers only)")
    parser.add_argument("--context", type=int, help="tokens to say the memory for")
    parser.add_argument("--scheme", help="as which scheme to judge a checkpoint (default: nl4)")


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.describe import describe as run_it
    from chalot.describe.description import render

    report = run_it(arguments.model, scheme=arguments.scheme, context=arguments.context)
    show(as_json(report) if arguments.json else render(report, verbose=arguments.verbose))
    return 0
