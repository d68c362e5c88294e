"""chalot upcycle SOURCE -o OUT ..."""

import sys
from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.convert import tell
from chalot.commands.output import as_json, progress, show


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("source", help="a dense model: short name, hub id, folder, or file")
    parser.add_argument("-o", "--out", required=True, help="the .myai file or folder to write")
    parser.add_argument("--experts", type=int, default=8, help="of each layer (default: 8)")
    parser.add_argument(
        "--top-k", type=int, default=2, help="routed experts that a token takes (default: 2)"
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="of each copy, as a part of the tensor's standard deviation (default: 0, all equal)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise and of the copies' router")
    parser.add_argument(
        "--slice",
        action="store_true",
        help="experts are slices of the feed-forward's columns, not copies of it",
    )
    parser.add_argument(
        "--shared", type=int, default=0, help="how many of the slices are always on (default: 0)"
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="text for --slice (default: chalot's own)"
    )
    parser.add_argument("--to", help="myai (default) or safetensors")
    parser.add_argument("--scheme", help="for myai: as for chalot convert")
    parser.add_argument("--type", help="for safetensors: bf16 (default), f16, f32")


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.upcycle import Settings, upcycle

    asked = Settings(
        arguments.experts,
        arguments.top_k,
        arguments.noise,
        arguments.seed,
        arguments.shared,
        arguments.slice,
    )
    with progress(arguments, f"up-cycling {arguments.source}") as advance:
        report = upcycle(
            arguments.source,
            arguments.out,
            asked,
            calibration=arguments.calibration,
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
