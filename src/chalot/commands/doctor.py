"""chalot doctor"""

from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.output import as_json, show


def arguments(_: ArgumentParser) -> None:
    """Nothing."""


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.doctor import doctor as run_it
    from chalot.doctor import render

    report = run_it()
    show(as_json(report) if arguments.json else render(report))
    return 0
