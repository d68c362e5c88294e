"""chalot tensor MODEL NAME --input x.npy"""

from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.output import as_json, show


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("model", help="a .myai file, an .npz or its manifest, a .gguf, a folder")
    parser.add_argument("name", help="the weight, such as model.layers.0.mlp.down_proj.weight")
    parser.add_argument(
        "--input", required=True, metavar="X", help="a .npy file, (columns,) or (tokens, columns)"
    )
    parser.add_argument("-o", "--out", metavar="Y", help="a .npy file for the answer")


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.tensor import render
    from chalot.tensor import tensor as run_it

    report, _ = run_it(
        arguments.model,
        arguments.name,
        arguments.input,
        arguments.out,
        threads=arguments.threads,
    )
    show(as_json(report) if arguments.json else render(report))
    return 0
