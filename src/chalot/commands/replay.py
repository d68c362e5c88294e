"""chalot replay FILE [MODEL]"""

from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.opening import cache_type
from chalot.commands.output import as_json, show


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    text = "what chat's /save, `run --json` or the chat page wrote; a server's request and response"
    parser.add_argument("file", help=text)
    text = "the .myai file (default: the converted model that the transcript names)"
    parser.add_argument("model", nargs="?", help=text)
    parser.add_argument("--context", type=int, help="most tokens (default: as it was)")
    cache_type(parser, None)


def main(arguments: Arguments) -> int:
    """The exit code: 1 if any byte differs."""
    from chalot.replay import render
    from chalot.replay import replay as run_it

    options = {name: getattr(arguments, name) for name in ("kv", "context", "threads")}
    report = run_it(arguments.file, arguments.model, **options)
    show(as_json(report) if arguments.json else render(report))
    return 0 if report.ok else 1
