"""chalot run MODEL PROMPT"""

import sys
from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.opening import MODEL, open_model, sampling_arguments, sampling_of
from chalot.commands.output import as_json, say
from chalot.errors import FormatError
from chalot.table import size


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("prompt", nargs="?", help="text to go on from (default: stdin)")
    parser.add_argument("--stop", action="append", default=[], help="end before this text")
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
    with open_model(arguments) as model:
        options = sampling_of(arguments) | {"max_tokens": arguments.max_tokens}
        silent = arguments.quiet or arguments.json
        pieces: list[str] = []
        for piece in model.stream(prompt, stop=arguments.stop, **options):
            if not (pieces or silent):  # before the text, which Ctrl-C may end
                say(f"seed {model.last_stats.seed}")
            pieces.append(piece)
            if not arguments.json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        stats = model.last_stats
        if arguments.json:
            answer = {"prompt": prompt, "text": "".join(pieces), "digest": model.file.digest}
            said = sampling_of(arguments) | {"seed": stats.seed}
            kept = {"max_tokens": arguments.max_tokens, "stop": arguments.stop}
            kept |= {"kv": model.kv, "context": model.context}  # what `chalot replay` needs
            answer |= {"options": said} | kept | {"stats": stats}
            read = model.experts.report()
            print(as_json(answer | ({} if read is None else {"experts": read})))
            return 0
        sys.stdout.write("\n")
        if not (pieces or silent):
            say(f"seed {stats.seed}")
        if arguments.verbose:
            say(
                f"{stats.prompt_tokens} prompt tokens at {stats.prefill_tokens_per_second:.1f}/s, "
                f"{stats.new_tokens} new at {stats.tokens_per_second:.1f}/s{stats.drafting}, "
                f"{model.backend.name} on {model.backend.threads} threads"
            )
            if (read := model.experts.report()) is not None:
                say(
                    f"{read.counted} of {read.experts} experts taken: {size(read.touched_bytes)} "
                    f"of {size(read.expert_bytes)}; {size(read.kept_bytes)} of them stay"
                )
    return 0
