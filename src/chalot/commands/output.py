"""What commands share of printing: answers to stdout, everything else to stderr."""

import dataclasses
import json
import os
import sys
import warnings
from argparse import Namespace as Arguments
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chalot.table import IN_PROSE, printable


def say(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


def show(text: str) -> None:
    """An answer on stdout, with a line's end."""
    print(printable(text))


def speaker(arguments: Arguments) -> Callable[[str], None]:
    """`say`, or silence with --quiet."""
    return (lambda _: None) if arguments.quiet else say


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Warnings as one line, without the source that raised them."""
    say(f"chalot: {message}")


warnings.showwarning = show_warning


# json.dumps leaves some of them as they are; beyond its own line ends they stand in texts only
ESCAPED = {code: f"\\u{code:04x}" for code in IN_PROSE}


def as_json(report: Any) -> str:
    """A report dataclass as JSON; numbers that are not finite become null."""
    from msgspec import Struct
    from msgspec.structs import asdict

    def plain(value: Any) -> Any:
        if isinstance(value, Struct):
            value = asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            extra = (
                "perplexity",
                "perplexity_error",
                "tokens_per_second",
                "prefill_tokens_per_second",
                "acceptance",
                "tokens_per_pass",
                "speed_up",
            )
            return fields | {n: plain(getattr(value, n)) for n in extra if hasattr(value, n)}
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, float) and (value != value or abs(value) == float("inf")):
            return None
        return str(value) if isinstance(value, Path) else value

    return json.dumps(plain(report), indent=1, ensure_ascii=False).translate(ESCAPED)


@contextmanager
def progress(arguments: Arguments, what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr from the first call on, on a terminal; silent otherwise and with --quiet."""
    if arguments.quiet or not sys.stderr.isatty():
        yield lambda *_: None
        return
    bar: Any = None

    def advance(name: str, done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = new_bar()
            bar.add_task(printable(what), total=None, name="")
            bar.start()
        bar.update(bar.task_ids[0], completed=done, total=total, name=printable(name))

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def new_bar() -> Any:
    """A bar that goes when its work is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )


if os.environ.get("PYTHONUTF8") != "1":  # a terminal that cannot show a character gets a substitute
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
