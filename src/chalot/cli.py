"""Arguments to verbs. A verb is imported when called; bad input ends in one line.

Exit codes: 0 done, 1 an error that was explained, 2 wrong usage, 130 interrupted.
"""

import argparse
import os
import re
import sys
from importlib import import_module
from typing import Any

from chalot import __version__
from chalot.commands import TALKS, VERBS
from chalot.errors import ChalotError, out_of_memory, told

# benchmarks/threads.py: with twice as many threads as cores
SHARED_CORES = "decoding was 2 to 6 times slower where that was measured; leave out --threads"
PROSE = ("system", "stop")  # options that may be empty or blank, or say themselves why not
PLACES = ("out", "output_dir")  # options that name what is written
PLAIN = "\0"  # before a word that is no option, whatever it looks like; no command line holds it
ABOUT = "Shrinks a language model, says what that costs, and runs it on this machine."
NEXT = """\
chalot shrinks a language model and runs it on this machine. What to do next:

  chalot demo                                 the bundled model, converted, measured and run
  chalot convert FOLDER -o model.myai         a Hugging Face folder or hub id to a 4-bit file
  chalot run model.myai "Once upon a time"    text
  chalot chat model.myai                      a conversation
  chalot describe FOLDER_OR_FILE              sizes, and whether it fits here
  chalot --help                               all commands
"""


def printable(text: str) -> str:
    """Names in it must not steer the terminal."""
    from chalot.table import printable as escaped

    return escaped(text)


def whole_number(text: str) -> int:
    """What `type=int` of every verb stands for."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r:.40}, expected a whole number") from None


def number(text: str) -> float:
    """What `type=float` of every verb stands for."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r:.40}, expected a number") from None


class Parser(argparse.ArgumentParser):
    """Usage errors go to stderr with the verb's own help named."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.intermixed = False
        self.register("type", int, whole_number)
        self.register("type", float, number)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Arguments of a verb may stand before, between and behind its options."""
        if self._subparsers is not None or self.intermixed:
            return super().parse_known_args(args, namespace)
        self.intermixed = True  # what is called next calls this method
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = False

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise for a value that is none of an option's choices, or no verb."""
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action,
                f"found {value!r:.80}, expected one of {', '.join(known)}{meant(value, known)}",
            )

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Raise for an option that is given an empty text: a name or a path is never that."""
        if action.option_strings and action.dest not in PROSE:
            for text in arg_strings:
                if not text.strip():
                    what = action.metavar if isinstance(action.metavar, str) else action.dest
                    raise argparse.ArgumentError(
                        action, f"found an empty text, expected {what.upper()}; or leave it out"
                    )
        return super()._get_values(action, arg_strings)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """A word's value, its mark taken off."""
        text = arg_string if self._subparsers is not None else arg_string.removeprefix(PLAIN)
        return super()._get_value(action, text)

    def error(self, message: str) -> Any:
        """Two lines, exit code 2."""
        self.exit(2, f"chalot: {printable(message)}\nTry: {self.prog} --help\n")


def with_values(argv: list[str]) -> list[str]:
    """`--kv-budget -5MB` as `--kv-budget=-5MB`: argparse takes -5MB for an option else.

    Words behind a verb's `--` are marked as PLAIN: argparse drops some of them else.
    """
    out: list[str] = []
    end = argv.index("--") if "--" in argv[1:] else len(argv)
    for word in argv[:end]:
        last = out[-1] if out else ""
        is_size = re.fullmatch(r"-\.?\d[\d.]*[A-Za-z]+", word)
        if is_size and re.fullmatch(r"--[a-z-]+", last):
            out[-1] = f"{last}={word}"
        else:
            out.append(word)
    return out + [PLAIN + word for word in argv[end + 1 :]]


def refuse_unknown(unknown: list[str], parser: argparse.ArgumentParser) -> None:
    """Usage error for options that a verb does not have, with the one that was perhaps meant."""
    first = unknown[0].removeprefix(PLAIN)
    name = first.partition("=")[0]
    known = re.findall(r"--[a-z][a-z-]*", parser.format_help()) if name[:2] == "--" else []
    what = "option" if unknown[0].startswith("-") else "argument"
    hint = meant(name, known)
    parser.error(f"found {what} {first!r:.80}, which {parser.prog} does not take{hint}")


def meant(word: str, known: list[str]) -> str:
    """ "; did you mean ...?" where a known word is near, else nothing."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def warn_of_threads(asked: int | None) -> None:
    """One line when more threads are asked for than there are cores: it is never faster."""
    text = os.environ.get("CHALOT_THREADS", "")
    count = asked if asked is not None else int(text) if text.isdigit() else 0
    if count > 1:
        from chalot import machine

        cores = machine.default_threads()
        if count > cores:
            sys.stderr.write(f"chalot: {count} threads share {cores} cores: {SHARED_CORES}\n")


def common(parser: argparse.ArgumentParser) -> None:
    """What every verb takes."""
    parser.add_argument("--threads", type=int, help="threads to compute with (default: the cores)")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the answer")
    parser.add_argument("-v", "--verbose", action="store_true", help="more detail")


def build_parser(verb: str | None = None) -> Parser:
    """The parser. Only the file of the verb that is called is read, for its options."""
    parser = Parser(prog="chalot", description=ABOUT)
    parser.add_argument("--version", action="version", version=f"chalot {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for name, text in VERBS.items():
        found = verbs.add_parser(name, help=text, description=text)
        if name != verb:
            continue
        common(found)
        found.set_defaults(parser=found)  # for usage errors that only the verb can see
        if name not in TALKS:
            found.add_argument("--json", action="store_true", help="the report as JSON on stdout")
        import_module(f"chalot.commands.{name}").arguments(found)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command `chalot`. Returns the exit code."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as error:
        kept = told(error)
        sys.stderr.write(f"chalot: interrupted{printable(kept and f'; {kept}')}\n")
        return 130


def _main(argv: list[str]) -> int:
    parser = build_parser(next((a for a in argv if a in VERBS), None))
    arguments, unknown = parser.parse_known_args(with_values(argv))
    if unknown:
        refuse_unknown(unknown, getattr(arguments, "parser", parser))
    if arguments.verb is None:
        sys.stdout.write(NEXT)
        return 0
    for name in PLACES:
        if given := getattr(arguments, name, None):  # no shell does that behind "="
            setattr(arguments, name, os.path.expanduser(given))  # noqa: PTH111  a slash stays
    # numpy's BLAS, which only the oracle uses, else starts threads: 60 ms
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if not arguments.quiet:
        warn_of_threads(arguments.threads)
    try:
        return int(import_module(f"chalot.commands.{arguments.verb}").main(arguments))
    except ChalotError as error:
        sys.stderr.write(f"chalot: {printable(' '.join(told(error).split()))}\n")
        return 1
    except BrokenPipeError:  # who read stdout has gone: nothing to say, and nobody to say it to
        sys.stderr.close()
        return 1
    except OSError as error:  # a name too long, a disk that fails: whatever no room has foreseen
        sys.stderr.write(f"chalot: {printable(str(error)[:300])}\n")
        return 1
    except UnicodeEncodeError as error:
        found = ascii(error.object)[:80]
        sys.stderr.write(f"chalot: found {found}, expected a name in UTF-8; rename the file\n")
        return 1
    except (MemoryError, RuntimeError, ImportError) as error:
        if not out_of_memory(error):
            raise
        sys.stderr.write("chalot: out of memory; choose a smaller --context or model\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
