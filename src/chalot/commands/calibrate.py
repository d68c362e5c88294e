"""chalot calibrate MODEL --text FILE"""

from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.opening import MODEL, converted
from chalot.commands.output import as_json, progress, show


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--text", metavar="FILE", required=True, help="text like the answers to be")
    parser.add_argument("--tokens", type=int, help="look at so many (default: 8192)")
    parser.add_argument("--plot", metavar="FILE", help="agreement by depth as a picture, .svg")


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.calibrate import calibrate, picture, render
    from chalot.charts import new_picture

    path = converted(arguments.model, arguments)
    with progress(arguments, "looking") as advance, new_picture(arguments.plot) as draw:
        report = calibrate(
            path,
            arguments.text,
            tokens=arguments.tokens,
            threads=arguments.threads,
            progress=lambda n, of: advance(f"window {n} of {of}", n, of),
        )
        draw(picture(report.found))
    show(as_json(report) if arguments.json else f"{render(report)}\n{report.path}")
    return 0
