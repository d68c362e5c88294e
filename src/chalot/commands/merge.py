"""chalot merge A B -o OUT"""

import sys
from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.convert import tell
from chalot.commands.output import as_json, progress, show
from chalot.errors import SchemeError


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("a", metavar="A", help="a checkpoint: hub id, folder, or file")
    parser.add_argument("b", metavar="B", help="another one of the same shape")
    parser.add_argument("-o", "--out", required=True, help="the file or folder to write")
    parser.add_argument(
        "--method",
        default="linear",
        help="linear (default): a mean; slerp: along the arc between them; task: what tuning "
        "changed in both, added to --base",
    )
    text = "of B (default: 0.5), or of both changes for task (default: 1)"
    parser.add_argument("--weight", type=float, help=text)
    parser.add_argument("--base", help="for task: what A and B were tuned from")
    parser.add_argument("--to", help="myai (default), safetensors, gguf or npz")
    parser.add_argument("--scheme", help="for myai: as for chalot convert")
    parser.add_argument("--type", help="for safetensors and gguf: as for chalot convert")


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.export import refuse_useless, target_of
    from chalot.merge import MergeError, Recipe, merge

    try:
        recipe = Recipe(arguments.method, arguments.weight)
        to = target_of(arguments.to, arguments.out)
        refuse_useless(to, lambda name: getattr(arguments, name, None) is not None)
    except (MergeError, SchemeError) as error:
        arguments.parser.error(str(error))
    with progress(arguments, f"merging {arguments.a} and {arguments.b}") as advance:
        report = merge(
            arguments.a,
            arguments.b,
            arguments.out,
            recipe,
            base=arguments.base,
            to=arguments.to,
            scheme=arguments.scheme,
            type=arguments.type,
            threads=arguments.threads,
            progress=advance,
            command="chalot " + " ".join(sys.argv[1:]),
        )
    if arguments.json:
        show(as_json(report))
    else:
        tell(report, arguments)
    return 0
