"""Arguments to verbs. A verb is imported when called; bad input ends in one line, exit code 1.

Exit codes: 0 done, 1 an error that was explained, 2 wrong usage, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from chalot import __version__
from chalot.errors import ChalotError

Arguments = argparse.Namespace
NEXT = """\
chalot shrinks a language model and runs it on this machine. What to do next:

  chalot demo                                 the bundled model, converted, measured and run
  chalot convert FOLDER -o model.myai         a Hugging Face folder or hub id to a 4-bit file
  chalot run model.myai "Once upon a time"    text
  chalot chat model.myai                      a conversation
  chalot describe FOLDER_OR_FILE              sizes, and whether it fits here
  chalot --help                               all commands
"""


class Parser(argparse.ArgumentParser):
    """Usage errors go to stderr with the verb's own help named."""

    def error(self, message: str) -> Any:
        """Two lines, exit code 2."""
        self.exit(2, f"chalot: {message}\nTry: {self.prog} --help\n")


def option_table() -> dict[str, dict[str, Any]]:
    """Sampling options of run and chat: flag -> argparse's arguments."""
    return {
        "--max-tokens": {"type": int, "help": "most new tokens (default: until the model ends)"},
        "--temperature": {"type": float, "help": "0 takes the most likely token"},
        "--top-k": {"type": int, "help": "choose among the k most likely; 0: among all"},
        "--top-p": {"type": float, "help": "choose among the most likely that hold this share"},
        "--min-p": {"type": float, "help": "leave out what is below this part of the likeliest"},
        "--repetition-penalty": {"type": float, "help": "above 1: tokens just used become rarer"},
        "--seed": {"type": int, "help": "same seed, same text (default: drawn and shown)"},
    }


def common(parser: argparse.ArgumentParser) -> None:
    """What every verb takes."""
    parser.add_argument("--threads", type=int, help="threads to compute with (default: the cores)")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the answer")
    parser.add_argument("-v", "--verbose", action="store_true", help="more detail")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of `option_table`, context and cache."""
    for flag, settings in option_table().items():
        parser.add_argument(flag, **settings)
    parser.add_argument("--context", type=int, help="most tokens of prompt and answer")
    parser.add_argument("--mlock", action="store_true", help="keep the model's file in memory")
    parser.add_argument(
        "--no-mmap", dest="mmap", action="store_false", help="read it into memory, in huge pages"
    )
    kinds = ("int8", "f16", "f32")
    parser.add_argument("--kv", choices=kinds, default="int8", help="type of the cache")
    parser.add_argument(
        "--kv-budget", type=size_option, metavar="SIZE", help="most bytes of the cache, as 512MB"
    )


def size_option(text: str) -> int:
    """A size in bytes."""
    from chalot.table import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser() -> Parser:
    """All verbs and their options."""
    parser = Parser(prog="chalot", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"chalot {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)

    def verb(name: str, text: str, reports: bool = True) -> argparse.ArgumentParser:
        found = verbs.add_parser(name, help=text, description=text)
        common(found)
        if reports:
            found.add_argument("--json", action="store_true", help="the report as JSON on stdout")
        return found

    convert = verb("convert", "convert a checkpoint to one .myai file")
    convert.add_argument("source", help="a Hugging Face folder or a hub id")
    convert.add_argument("-o", "--out", required=True, help="the file to write")
    convert.add_argument(
        "--scheme",
        default="nl4",
        help="f32, bf16, f16, int8, nl4 (default), or KIND=SCHEME,... "
        "with kinds attention, ffn, embedding, head",
    )
    run = verb("run", "generate text after a prompt")
    run.add_argument("model", help="a .myai file, a folder, or a hub id (converted once)")
    run.add_argument("prompt", nargs="?", help="text to go on from (default: stdin)")
    run.add_argument("--stop", action="append", default=[], help="end before this text")
    add_sampling(run)
    chat = verb("chat", "talk to a model by its own chat template", reports=False)
    chat.add_argument("model", help="a .myai file, a folder, or a hub id (converted once)")
    chat.add_argument("--system", help="what the model is told first")
    add_sampling(chat)
    describe = verb("describe", "what a model is, and whether it fits here")
    describe.add_argument("model", help="a .myai file, a folder, or a hub id (headers only)")
    describe.add_argument("--context", type=int, help="tokens to say the memory for")
    describe.add_argument("--scheme", help="as which scheme to judge a checkpoint (default: nl4)")
    bench = verb("bench", "how fast a model runs here, beside what memory allows")
    bench.add_argument("model", help="a .myai file, a folder, or a hub id (converted once)")
    bench.add_argument(
        "--depths", type=int, nargs="+", metavar="TOKENS", help="texts' lengths to measure at"
    )
    kinds = ("int8", "f16", "f32")
    bench.add_argument("--kv", choices=kinds, help="type of the cache, as for run")
    verify = verb("verify", "check every extent and checksum of a .myai file")
    verify.add_argument("file", help="a .myai file")
    verb("doctor", "what this machine has, and what chalot makes of it")
    demo = verb("demo", "convert, measure and run the bundled model")
    demo.add_argument("--keep", help="a folder to leave the converted files in")
    return parser


def table() -> dict[str, Callable[[Arguments], int]]:
    """verb -> what runs it."""
    from chalot import commands

    return {
        name: getattr(commands, name)
        for name in ("convert", "run", "chat", "describe", "bench", "verify", "doctor", "demo")
    }


def main(argv: list[str] | None = None) -> int:
    """The command `chalot`. Returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.verb is None:
        sys.stdout.write(NEXT)
        return 0
    # numpy's BLAS, which only the oracle uses, else starts threads: 60 ms
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        return table()[arguments.verb](arguments)
    except ChalotError as error:
        sys.stderr.write(f"chalot: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("chalot: interrupted\n")
        return 130
    except (
        BrokenPipeError
    ):  # the reader of stdout has gone: nothing to say, and nobody to say it to
        sys.stderr.close()
        return 1
    except OSError as error:  # a name too long, a disk that fails: whatever no room has foreseen
        sys.stderr.write(f"chalot: {str(error)[:300]}\n")
        return 1
    except MemoryError:
        sys.stderr.write("chalot: out of memory; choose a smaller --context or model\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
