"""chalot run MODEL PROMPT"""

import sys
from argparse import ArgumentParser
from argparse import Namespace as Arguments
from typing import Any

from chalot.commands.opening import (
    MODEL,
    open_model,
    sampling_arguments,
    sampling_of,
)
from chalot.commands.output import as_json, say
from chalot.errors import FormatError, OutputError


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("prompt", nargs="?", help="text to go on from (default: stdin)")
    parser.add_argument("--stop", action="append", default=[], help="end before this text")
    text = "give N answers, with random numbers 0 to N - 1; the prompt is read once"
    parser.add_argument("-n", "--answers", type=int, metavar="N", help=text)
    parser.add_argument(
        "--choice", type=int, metavar="I", help="give answer I of many (default: 0)"
    )
    sampling_arguments(parser)


def main(arguments: Arguments) -> int:
    """The exit code."""
    prompt = arguments.prompt
    if prompt is None:
        if sys.stdin.isatty():
            say("reading the prompt from the terminal; end it with Ctrl-D")
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"stdin: byte {error.start} is not UTF-8") from None
    if not prompt:
        raise FormatError("the prompt is empty; give it as an argument or on stdin")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError("the prompt is not valid text; expected UTF-8") from None
    if arguments.answers is not None and arguments.cache is not None:
        raise OutputError("--cache keeps one text, -n makes several; leave one of them out")
    if arguments.cache is not None:
        from chalot.load.sessions import check_cache

        check_cache(arguments.cache)
    with open_model(arguments) as model:
        options = sampling_of(arguments) | {"max_tokens": arguments.max_tokens}
        if arguments.choice is not None:
            options["choice"] = arguments.choice
        if arguments.answers is not None:
            return several(model, prompt, arguments, options)
        session = None
        if arguments.cache is not None:
            session = model.load_session(arguments.cache) if arguments.cache.exists() else None
            if session is not None and session.note:
                raise OutputError(
                    f"{arguments.cache}: holds a conversation, which `chalot chat` goes on with; "
                    "choose another name"
                )
            options["session"] = session = session or model.session()
        silent = arguments.quiet or arguments.json
        pieces: list[str] = []
        for piece in model.stream(prompt, stop=arguments.stop, **options):
            if not (pieces or silent):  # before the text, which Ctrl-C may end
                say(f"seed {model.last_stats.seed}")
            pieces.append(piece)
            if not arguments.json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        if session is not None:
            model.save_session(session, arguments.cache)
        stats = model.last_stats
        if arguments.json:
            answer = {"prompt": prompt, "text": "".join(pieces), "digest": model.file.digest}
            made = made_with(model, arguments)
            print(as_json(answer | made | {"stats": stats} | model.reports))
            return 0
        sys.stdout.write("\n")
        if not (pieces or silent):
            say(f"seed {stats.seed}")
        say_stats(model, arguments)
    return 0


def several(model: Any, prompt: str, arguments: Arguments, options: dict[str, Any]) -> int:
    """-n: answers that share their prompt; the exit code."""
    options |= {"stop": arguments.stop}
    texts = model.answers(prompt, arguments.answers, **options)
    stats = model.last_stats
    if arguments.json:
        first = arguments.choice or 0
        found = [{"choice": first + i, "text": text} for i, text in enumerate(texts)]
        answer = {"prompt": prompt, "answers": found, "digest": model.file.digest}
        print(as_json(answer | made_with(model, arguments) | {"stats": stats}))
        return 0
    if not arguments.quiet:
        say(f"seed {stats.seed}")
    for i, text in enumerate(texts):
        if not arguments.quiet:
            say(f"--- {(arguments.choice or 0) + i}")
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    say_stats(model, arguments)
    return 0


def made_with(model: Any, arguments: Arguments) -> dict[str, Any]:
    """What makes a text, as --json has it and `chalot replay` needs it."""
    names = [n for n in ("choice", "window", "sinks") if getattr(arguments, n) is not None]
    said = {name: getattr(arguments, name) for name in names}
    options = sampling_of(arguments) | {"seed": model.last_stats.seed} | said
    kept = {"max_tokens": arguments.max_tokens, "stop": arguments.stop}
    return {"options": options} | kept | {"kv": model.kv, "context": model.context}


def say_stats(model: Any, arguments: Arguments) -> None:
    """Tokens and speed, with --verbose."""
    stats = model.last_stats
    if arguments.verbose:
        kept = f"{stats.cached_tokens} kept, " if stats.cached_tokens else ""
        say(
            f"{kept}{stats.prompt_tokens} prompt tokens at "
            f"{stats.prefill_tokens_per_second:.1f}/s, "
            f"{stats.new_tokens} new at {stats.tokens_per_second:.1f}/s{stats.drafting}, "
            f"{model.backend.name} on {model.backend.threads} threads"
        )
        for report in model.reports.values():
            say(str(report))
