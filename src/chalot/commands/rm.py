"""chalot rm NAME ..."""

from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.output import as_json, show


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("name", nargs="+", help="as chalot models shows it, or what it was made of")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.shelf import remove

    done = remove(arguments.name, arguments.dry_run)
    if arguments.json:
        show(as_json({"removed": done, "dry_run": arguments.dry_run}))
        return 0
    said = "would be removed" if arguments.dry_run else "removed"
    for kept in done:
        show(f"{kept.name}: {kept.bytes:,} bytes {said}")
    return 0
