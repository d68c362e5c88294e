"""chalot tokenizer train | encode | decode | compare | stats"""

import os
import re
import sys
from argparse import SUPPRESS, ArgumentParser
from argparse import Namespace as Arguments
from pathlib import Path
from typing import Any

from chalot.commands.output import as_json, say, show
from chalot.errors import FormatError, TokenizerError
from chalot.table import pairs, rows, size

MODEL = "a tokenizer.json, a model's file or folder, a short name or a hub id"
SHARED: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (("--threads",), int, "threads to train with (default: the cores)"),
    (("-q", "--quiet"), None, "only the answer"),
    (("-v", "--verbose"), None, "more detail"),
    (("--json",), None, "the report as JSON on stdout"),
)
_BETWEEN = re.compile(r"[\s,\[\]]+")


def arguments(parser: ArgumentParser) -> None:
    """A parser for each part."""
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)

    def part(name: str, text: str) -> ArgumentParser:
        found = parts.add_parser(name, help=text, description=text)
        for flags, kind, help_ in SHARED:  # after the part's name as well as before it
            given: dict[str, Any] = {"action": "store_true"} if kind is None else {"type": kind}
            found.add_argument(*flags, default=SUPPRESS, help=help_, **given)
        found.set_defaults(parser=found)  # for usage errors of this part
        return found

    train = part("train", "a new tokenizer from text")
    train.add_argument("corpus", nargs="+", help="files, folders or patterns of UTF-8 text")
    train.add_argument("-o", "--out", required=True, help="tokenizer.json, or a folder")
    train.add_argument("--vocab", type=int, default=4096, help="tokens in all (default: 4096)")
    train.add_argument(
        "--style", default="qwen2", help="how words are split: qwen2 (default), llama3 or gpt2"
    )
    train.add_argument(
        "--special", nargs="*", metavar="TOKEN", help="special tokens (default: those of chats)"
    )
    train.add_argument(
        "--min-frequency", type=int, default=2, help="how often a pair must be there (default: 2)"
    )
    encode = part("encode", "text to ids")
    encode.add_argument("model", help=MODEL)
    encode.add_argument("text", nargs="?", help="the text (default: stdin)")
    encode.add_argument("--file", help="read the text from a file")
    encode.add_argument(
        "--specials", action="store_true", help="special tokens in the text are meant"
    )
    decode = part("decode", "ids to text")
    decode.add_argument("model", help=MODEL)
    decode.add_argument("ids", nargs="*", help="token ids (default: from stdin)")
    decode.add_argument("--skip-specials", action="store_true", help="leave special tokens out")
    compare = part("compare", "two tokenizers on one text")
    compare.add_argument("a", help=MODEL)
    compare.add_argument("b", help="another one")
    compare.add_argument("--text", required=True, metavar="FILE", help="a file of UTF-8 text")
    stats = part("stats", "vocabulary, memory, speed")
    stats.add_argument("model", help=MODEL)
    stats.add_argument("--text", metavar="FILE", help="also measure on this file of UTF-8 text")


def main(arguments: Arguments) -> int:
    """The exit code."""
    return PARTS[arguments.part](arguments)


def _train(arguments: Arguments) -> int:
    if arguments.threads:
        if arguments.threads < 1:
            raise TokenizerError(f"--threads {arguments.threads}: expected 1 or more")
        os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)
    from chalot.tokenizer import train_tokenizer

    report = train_tokenizer(
        arguments.corpus,
        arguments.out,
        vocabulary=arguments.vocab,
        style=arguments.style,
        specials=arguments.special,
        min_frequency=arguments.min_frequency,
        show_progress=not arguments.quiet and sys.stderr.isatty(),
    )
    if arguments.json:
        print(as_json(report))
        return 0
    if not arguments.quiet:
        if report.skipped:
            say(f"{report.skipped:,} files are not UTF-8 text and were passed over")
        if report.vocabulary < report.asked:
            say(f"the text has no more pairs that are frequent enough; {report.asked:,} were asked")
        say(f"{report.files:,} files, {size(report.bytes)}, {report.seconds:.1f} s")
    show(f"{report.path}: {report.vocabulary:,} tokens")
    return 0


def _encode(arguments: Arguments) -> int:
    from chalot.tokenizer import LONG, as_pieces, tokenizer

    if arguments.text is not None and arguments.file is not None:
        raise FormatError("found a text and --file, expected one of them")
    text = arguments.text
    if text is None:
        text = _read(arguments.file)
    opened = tokenizer(arguments.model, fast=len(text) >= LONG)
    ids = opened.encode(text, specials=arguments.specials)
    if arguments.json:
        print(as_json({"ids": ids, "pieces": as_pieces(opened, ids)}))
    elif arguments.verbose:
        for id_, piece in zip(ids, as_pieces(opened, ids), strict=True):
            print(id_, repr(piece))
    else:
        print(*ids)
    return 0


def _decode(arguments: Arguments) -> int:
    from chalot.tokenizer import check_ids, tokenizer

    words = arguments.ids or [_read(None)]
    numbers = [word for text in words for word in _BETWEEN.split(text) if word]
    for number in numbers:
        if not re.fullmatch(r"[0-9]{1,10}", number):
            raise TokenizerError(f"found {number!r:.40}, expected token ids: whole numbers from 0")
    opened = tokenizer(arguments.model)
    ids = check_ids(opened, map(int, numbers))
    text = opened.decode(ids, skip_specials=arguments.skip_specials)
    print(as_json({"text": text}) if arguments.json else text)
    return 0


def _compare(arguments: Arguments) -> int:
    from chalot.tokenizer import compare, report

    found = compare(arguments.a, arguments.b, _read(arguments.text))
    if arguments.json:
        print(as_json(found))
        return 0
    table = [["", str(arguments.a), str(arguments.b)], *map(list, report(found))]
    print(rows(table))
    if found.same_ids:
        print("\nThe ids are the same.")
    elif found.spans is None:
        print("\nThe bytes of their tokens differ, so places cannot be compared.")
    else:
        print(f"\nCut differently in {found.spans:,} places" + (", such as" if found.spans else ""))
        for d in found.differences:
            print(f"  byte {d.byte:,}: {_short(d.a)}  <->  {_short(d.b)}")
    return 0


def _short(pieces: list[str]) -> str:
    shown = " ".join(map(repr, pieces[:8]))
    return shown[:120] + (" ..." if len(pieces) > 8 or len(shown) > 120 else "")


def _stats(arguments: Arguments) -> int:
    from chalot.tokenizer import stats

    found = stats(arguments.model, None if arguments.text is None else _read(arguments.text))
    if arguments.json:
        print(as_json(found))
        return 0
    specials = " ".join(list(found.special_tokens)[: None if arguments.verbose else 12])
    more = len(found.special_tokens) - 12
    facts = [
        ("vocabulary", f"{found.vocabulary:,} tokens"),
        ("ids without a token", f"{found.holes:,}"),
        ("special tokens", f"{len(found.special_tokens):,}: {specials}"),
        ("chat template", "yes" if found.chat_template else "no"),
        ("opened from", size(found.bytes)),
        ("opening", f"{found.opening_ms:.1f} ms"),
    ]
    if more > 0 and not arguments.verbose:
        facts[2] = (facts[2][0], f"{facts[2][1]} and {more:,} more (-v shows all)")
    if found.memory_bytes is not None:
        facts.append(("memory", size(found.memory_bytes)))
    if (use := found.use) is not None:
        facts += [
            ("tokens of the text", f"{use.tokens:,} ({use.different:,} different ones)"),
            ("bytes a token", f"{use.bytes_per_token:.3f}"),
            ("encoding", f"{use.megabytes_per_second:.1f} MB/s"),
            ("decodes to the text", "yes" if use.round_trip else "no"),
        ]
    show(pairs(facts))
    return 0


def _read(name: str | None) -> str:
    """A file's text, or stdin's."""
    try:
        if name is not None:
            return Path(name).expanduser().read_bytes().decode()
        if sys.stdin.isatty():
            say("reading from the terminal; end with Ctrl-D")
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{name or 'stdin'}: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise FormatError(f"{name}: cannot be read ({error.strerror})") from None


PARTS = {
    "train": _train,
    "encode": _encode,
    "decode": _decode,
    "compare": _compare,
    "stats": _stats,
}
