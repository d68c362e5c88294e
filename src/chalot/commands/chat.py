"""chalot chat MODEL"""

from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.opening import MODEL, open_model, sampling_arguments, sampling_of


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--system", help="what the model is told first")
    sampling_arguments(parser)


def main(arguments: Arguments) -> int:
    """The exit code."""
    import signal

    from chalot.chat import chat as run_it

    with open_model(arguments) as model:
        options = sampling_of(arguments) | {"max_tokens": arguments.max_tokens}
        run_it(model, system=arguments.system, cache=arguments.cache, **options)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who left by Ctrl-C may have pressed it once more
    return 0
