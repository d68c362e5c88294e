"""The model that a command works on: options of sampling and cache, and conversion once."""

from argparse import ArgumentParser, ArgumentTypeError
from argparse import Namespace as Arguments
from pathlib import Path
from typing import Any

from chalot.commands.output import progress, speaker

SAMPLING: dict[str, dict[str, Any]] = {  # flag -> argparse's arguments
    "--temperature": {"type": float, "help": "0 takes the most likely token"},
    "--top-k": {"type": int, "help": "choose among the k most likely; 0: among all"},
    "--top-p": {"type": float, "help": "choose among the most likely that hold this share"},
    "--min-p": {"type": float, "help": "leave out what is below this part of the likeliest"},
    "--repetition-penalty": {"type": float, "help": "above 1: tokens just used become rarer"},
    "--seed": {"type": int, "help": "same seed, same text (default: drawn and shown)"},
}
MODEL = "a .myai file; or a folder, file, short name or hub id, converted once"


def size(text: str) -> int:
    """A size in bytes."""
    from chalot.table import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def names(text: str) -> list[str]:
    """Names, with commas between."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise ArgumentTypeError(f"found {text!r:.40}, expected names with commas between: nl4,int8")
    return found


def margin(text: str) -> float | str:
    """A margin of early exit; its range is the model's to check."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise ArgumentTypeError(f"found {text!r:.40}, expected a number or auto") from None


def cache_type(parser: ArgumentParser, default: str | None) -> None:
    """--kv"""
    kinds = ("int8", "f16", "f32")
    parser.add_argument("--kv", choices=kinds, default=default, help="type of the cache")


def sampling_arguments(parser: ArgumentParser) -> None:
    """The options of SAMPLING, context and cache."""
    text = "most new tokens (default: until the model ends)"
    parser.add_argument("--max-tokens", type=int, help=text)
    for flag, settings in SAMPLING.items():
        parser.add_argument(flag, **settings)
    parser.add_argument("--context", type=int, help="most tokens of prompt and answer")
    parser.add_argument("--mlock", action="store_true", help="keep the model's file in memory")
    parser.add_argument(
        "--no-mmap", dest="mmap", action="store_false", help="read it into memory, in huge pages"
    )
    text = "of each layer's experts, those that stay in memory; the rest is read when it is used"
    parser.add_argument("--experts-resident", type=int, metavar="N", help=text)
    parser.add_argument(
        "--keep", type=names, default=(), metavar="REGION,...", help="keep regions in memory"
    )
    text = "most bytes of weights in memory, as 200MB; the rest is read again for each token"
    parser.add_argument("--budget", type=size, metavar="SIZE", help=text)
    drafting_arguments(parser)
    text = "skip layers where the best token leads by so much (logits), or auto; changes answers"
    parser.add_argument("--early-exit", metavar="MARGIN", type=margin, help=text)
    long_text_arguments(parser)
    cache_type(parser, "int8")
    parser.add_argument(
        "--kv-budget", type=size, metavar="SIZE", help="most bytes of the cache, as 512MB"
    )


def drafting_arguments(parser: ArgumentParser) -> None:
    """--draft, --no-draft, --draft-tokens"""
    which = parser.add_mutually_exclusive_group()
    text = "a small model that guesses ahead; the answer stays the same"
    which.add_argument("--draft", metavar="SMALL", help=text)
    text = "guess nothing ahead, from the text so far either"
    which.add_argument("--no-draft", dest="draft", action="store_false", help=text)
    parser.set_defaults(draft=True)
    text = "most tokens to guess ahead (default: 16; fewer where they do not pay)"
    parser.add_argument("--draft-tokens", type=int, metavar="N", default=16, help=text)


def long_text_arguments(parser: ArgumentParser) -> None:
    """--window, --sinks, --cache"""
    text = "see the last N positions alone: text without end, in a cache that does not grow"
    parser.add_argument("--window", type=int, metavar="N", help=text)
    text = "first positions that are seen besides (default: 4)"
    parser.add_argument("--sinks", type=int, metavar="N", help=text)
    text = "keep what was read in this file, and go on from what it holds"
    parser.add_argument("--cache", type=Path, metavar="FILE", help=text)


def converted(model: str, arguments: Arguments) -> Path:
    """The `.myai` file of what a user named: anything else is converted once into CHALOT_HOME."""
    from chalot.library import converted as run_it

    with progress(arguments, "converting") as advance:
        return run_it(model, threads=arguments.threads, say=speaker(arguments), progress=advance)


def sampling_of(arguments: Arguments) -> dict[str, Any]:
    """Sampling options that were given."""
    return {
        name: getattr(arguments, name)
        for name in (flag[2:].replace("-", "_") for flag in SAMPLING)
        if getattr(arguments, name) is not None
    }


def open_model(arguments: Arguments) -> Any:
    """The model a command works on."""
    from chalot.load import load

    path = converted(arguments.model, arguments)
    names: tuple[str, ...] = ("threads", "context", "kv", "kv_budget", "mmap", "mlock")
    names += ("draft", "draft_tokens", "experts_resident")
    names += ("keep", "budget", "early_exit", "window", "sinks")
    options = {name: getattr(arguments, name) for name in names}
    options["texts"] = max(getattr(arguments, "answers", None) or 1, 1)
    if isinstance(arguments.draft, str):
        options["draft"] = converted(arguments.draft, arguments)
    model = load(path, **options)
    say_context(model, arguments)
    return model


def say_context(model: Any, arguments: Arguments) -> None:
    """One line where --kv-budget makes the context smaller than the model's own."""
    if model.cut:
        speaker(arguments)(
            f"a context of {model.context} tokens, of the model's {model.config.context}, "
            "is what --kv-budget holds"
        )
