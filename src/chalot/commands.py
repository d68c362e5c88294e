"""What each verb prints: answers to stdout, everything else to stderr, `--json` for machines."""

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

from chalot.errors import ChalotError, FormatError
from chalot.table import rows

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
)


def say(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def speaker(arguments: Arguments) -> Callable[[str], None]:
    """`say`, or silence with --quiet."""
    return (lambda _: None) if arguments.quiet else say


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Warnings as one line, without the source that raised them."""
    say(f"chalot: {message}")


warnings.showwarning = show_warning


def as_json(report: Any) -> str:
    """A report dataclass as JSON; numbers that are not finite become null."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            extra = ("perplexity", "tokens_per_second", "prefill_tokens_per_second")
            return fields | {n: plain(getattr(value, n)) for n in extra if hasattr(value, n)}
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, float) and (value != value or abs(value) == float("inf")):
            return None
        return str(value) if isinstance(value, Path) else value

    return json.dumps(plain(report), indent=1, ensure_ascii=False)


@contextmanager
def progress(arguments: Arguments, what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr when it is a terminal; silent otherwise and with --quiet."""
    if arguments.quiet or not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, name="")
        yield lambda name, done, total: bar.update(task, completed=done, total=total, name=name)


def convert(arguments: Arguments) -> int:
    """chalot convert SOURCE -o OUT"""
    from chalot.convert import convert as run_it

    command = "chalot " + " ".join(sys.argv[1:])
    with progress(arguments, "converting") as advance:
        report = run_it(
            arguments.source,
            arguments.out,
            arguments.scheme,
            threads=arguments.threads,
            progress=advance,
            command=command,
        )
    if arguments.json:
        print(as_json(report))
        return 0
    if not arguments.quiet:
        table = [["kind", "scheme", "tensors", "weights", "bytes", "error", "16-bit", "folded"]]
        for k in report.kinds:
            cells = (k.scheme, k.tensors, f"{k.weights:,}", f"{k.bytes:,}", f"{k.error:.2g}")
            table.append([k.kind, *map(str, cells), str(k.wide), str(k.folded)])
        say(rows(table))
        say("error: relative squared error of the weights; 16-bit: tensors that ask for 16-bit")
        say("activations; folded: tensors whose columns were balanced by powers of two")
    print(f"{report.path}: {report.bytes:,} bytes, {report.bits_per_weight:.2f} bits a weight")
    return 0


def converted(model: str, arguments: Arguments) -> Path:
    """The `.myai` file of what a user named: a checkpoint is converted once into CHALOT_HOME."""
    from chalot.sources import resolve

    path = Path(model).expanduser()
    if path.is_file():
        return path
    import hashlib

    from chalot.home import home

    name = model.strip("/").replace("/", "--") if not path.exists() else path.resolve().name
    key = hashlib.sha256(str(path.resolve() if path.exists() else model).encode()).hexdigest()[:12]
    kept = home() / "models" / f"{name}-{key}-nl4.myai"
    if kept.exists() and not path.exists():
        return kept
    source = resolve(model)
    newest = max(p.stat().st_mtime for p in [source, *source.iterdir()])
    if kept.exists() and kept.stat().st_mtime >= newest:
        return kept
    from chalot.convert import convert as run_it

    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{kept.parent}: cannot be made ({error}); set CHALOT_HOME") from None
    speaker(arguments)(f"converting {model} to nl4, once, into {kept}")
    with progress(arguments, "converting") as advance:
        run_it(source, kept, threads=arguments.threads, progress=advance)
    return kept


def sampling_of(arguments: Arguments) -> dict[str, Any]:
    """Sampling options that were given."""
    return {k: getattr(arguments, k) for k in SAMPLING if getattr(arguments, k) is not None}


def open_model(arguments: Arguments) -> Any:
    """The model a command works on."""
    from chalot.load import load

    path = converted(arguments.model, arguments)
    options = ("threads", "context", "kv", "kv_budget", "mmap", "mlock")
    return load(path, **{name: getattr(arguments, name) for name in options})


def run(arguments: Arguments) -> int:
    """chalot run MODEL "prompt" """
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
            print(as_json(answer | {"options": said, "stats": stats}))
            return 0
        sys.stdout.write("\n")
        if not (pieces or silent):
            say(f"seed {stats.seed}")
        if arguments.verbose:
            say(
                f"{stats.prompt_tokens} prompt tokens at {stats.prefill_tokens_per_second:.1f}/s, "
                f"{stats.new_tokens} new at {stats.tokens_per_second:.1f}/s, "
                f"{model.backend.name} on {model.backend.threads} threads"
            )
    return 0


def chat(arguments: Arguments) -> int:
    """chalot chat MODEL"""
    from chalot.chat import chat as run_it

    with open_model(arguments) as model:
        options = sampling_of(arguments) | {"max_tokens": arguments.max_tokens}
        run_it(model, system=arguments.system, **options)
    return 0


def describe(arguments: Arguments) -> int:
    """chalot describe MODEL"""
    from chalot.describe import describe as run_it
    from chalot.describe import render

    report = run_it(arguments.model, scheme=arguments.scheme, context=arguments.context)
    print(as_json(report) if arguments.json else render(report, verbose=arguments.verbose))
    return 0


def bench(arguments: Arguments) -> int:
    """chalot bench MODEL"""
    from chalot.bench import bench as run_it
    from chalot.bench import render

    path = converted(arguments.model, arguments)
    options = {"threads": arguments.threads, "depths": arguments.depths, "kv": arguments.kv}
    with progress(arguments, "measuring") as advance:
        report = run_it(path, **options, progress=advance)
    print(as_json(report) if arguments.json else render(report))
    return 0


def verify(arguments: Arguments) -> int:
    """chalot verify FILE"""
    from chalot.verify import render
    from chalot.verify import verify as run_it

    with progress(arguments, "verifying") as advance:
        report = run_it(arguments.file, progress=advance)
    print(as_json(report) if arguments.json else render(report))
    return 0 if report.ok else 1


def doctor(arguments: Arguments) -> int:
    """chalot doctor"""
    from chalot.doctor import doctor as run_it
    from chalot.doctor import render

    report = run_it()
    print(as_json(report) if arguments.json else render(report))
    return 0


def demo(arguments: Arguments) -> int:
    """chalot demo"""
    from chalot.demo import demo as run_it

    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        if not arguments.json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def table(report: Any) -> None:
        if not arguments.json:
            print(demo_table(report) + "\n")
            print("The 4-bit form writes (temperature 0.6, seed 7):\n")

    keep = Path(arguments.keep) if arguments.keep else None
    try:
        report = run_it(
            threads=arguments.threads, keep=keep, say=speaker(arguments), show=show, table=table
        )
    except OSError as error:
        raise ChalotError(
            f"the demo's files cannot be written ({error}); use --keep FOLDER"
        ) from error
    if arguments.json:
        print(as_json({"report": report, "sample": "".join(shown)}))
    else:
        print()
        speaker(arguments)(
            f"{report.seconds:.1f} s on {report.threads} threads of {report.kernels}"
        )
    return 0


def demo_table(report: Any) -> str:
    """The one table: size, quality and speed of every form."""
    head = ["model", "bytes", "bits/weight", "perplexity", "KL to original", "same top", "tokens/s"]
    table = [head]
    for r in report.rows:
        q = r.quality
        speed = f"{r.tokens_per_second:,.0f}" if r.tokens_per_second else "-"
        table.append(
            [
                f"{r.model} {r.form}",
                f"{r.bytes:,}",
                f"{r.bits_per_weight:.2f}",
                f"{q.perplexity:.3f}",
                f"{q.kl:.5f} +- {q.kl_error:.5f}",
                f"{q.same_top:.1%}",
                speed,
            ]
        )
    note = f"{report.tokens:,} held-out tokens; protocol {report.protocol}"
    return f"{rows(table)}\n{note}"


if os.environ.get("PYTHONUTF8") != "1":  # a terminal that cannot show a character gets a substitute
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
