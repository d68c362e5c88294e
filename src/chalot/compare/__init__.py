"""The verb `compare`: a source and its smaller forms in one table: bytes, loss, speed, memory.

All forms see the same text; their speeds are taken in turn, round by round, so that a machine that
is busy for a while is so for all of them. Peak memory is that of a process that loads the form,
reads a prompt and answers.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from chalot import __version__
from chalot.convert import convert
from chalot.convert.storing import parse_schemes
from chalot.errors import FormatError, LimitError, OutputError
from chalot.evaluate.protocols import PROTOCOL, check_count, windows
from chalot.evaluate.quality import Quality
from chalot.evaluate.quality import compare as compare_quality
from chalot.evaluate.report import uncut
from chalot.formats.files import read_text
from chalot.formats.myai import MyaiFile
from chalot.kernels.backend import open_backend
from chalot.load import Model
from chalot.model.layers import layer_tensors
from chalot.plan.swap import Swaps
from chalot.quant.packing import DENSE
from chalot.sources import called

ROUNDS = 5
PREFILL, DECODED = 256, 32  # tokens of a round
TOKENS = 8192  # of the text, unless more are asked for
SOURCE = "source"  # the form that the others are compared with
SHAPE = (
    *("family", "hidden", "layers", "heads", "kv_heads", "head_dim", "feed_forward"),
    "vocabulary",
)
MOST_PROMPTS = 100
Progress = Callable[[str, int, int], None]


@dataclass
class Form:
    """One file: what it is, and what it was measured to cost."""

    name: str
    file: str
    bytes: int
    bits_per_weight: float
    quality: Quality | None = None
    prefill_tokens_per_second: list[float] = field(default_factory=list)  # a round each
    decode_tokens_per_second: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    layers: list[float] = field(default_factory=list)  # KL with that layer alone so stored
    prompts: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """The source first, then its forms."""

    source: str
    text: str
    tokens: int
    protocol: str
    kernels: str
    threads: int
    version: str
    forms: tuple[Form, ...]


def measure_speed(model: Model) -> tuple[float, float]:
    """Tokens a second of prefill and of decoding, once."""
    room = min(PREFILL, model.context - DECODED)
    ids = [(i * 97) % model.config.vocabulary for i in range(max(room, 1))]
    with model.session(temperature=0, draft=False) as session:
        start = time.perf_counter()
        session.prefill(ids)
        read = time.perf_counter() - start
        count = min(DECODED, model.context - len(ids))
        start = time.perf_counter()
        for _ in range(count):
            session.step()
        return len(ids) / read, count / (time.perf_counter() - start)


PEAK = """
import sys
from chalot.load import Model
with Model(sys.argv[1], context=int(sys.argv[3]), threads=int(sys.argv[2])) as m:
    with m.session(temperature=0) as s:
        s.prefill([(i * 97) % m.config.vocabulary for i in range(min(256, m.context - 8))])
        for _ in range(4): s.step()
    lines = open("/proc/self/status").read().splitlines()  # a child's rusage has its parent's peak
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


def peak_memory(path: str, threads: int, context: int) -> int | None:
    """Bytes a process of its own takes at most; None where the system does not tell."""
    command = [sys.executable, "-c", PEAK, path, str(threads), str(context)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=600, check=True)
        return int(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def layer_losses(swaps: Swaps, path: str) -> list[float]:
    """The KL of the source with one layer of a form instead, for each layer."""
    file = MyaiFile(Path(path))
    try:
        out = []
        for i in range(swaps.config.layers):
            specs = layer_tensors(swaps.config, i)
            matrices = {s.name: file.matrix(s.name) for s in specs if s.kind != "vector"}
            vectors = {s.name: file.vector(s.name) for s in specs if s.kind == "vector"}
            planes = {
                n: file.manifest.tensors[n].activation // 8
                for n, m in matrices.items()
                if m.scheme.is_coded
            }
            out.append(max(swaps.kl(matrices, vectors, planes), 0.0))
        return out
    finally:
        file.close()


def answer(model: Model, prompt: str, most: int) -> dict[str, Any]:
    """One prompt's text and speed."""
    text = model.generate(prompt, max_tokens=most, temperature=0)
    stats = model.last_stats
    return {
        "prompt": prompt,
        "text": text,
        "new_tokens": stats.new_tokens,
        "tokens_per_second": stats.tokens_per_second,
        "prefill_tokens_per_second": stats.prefill_tokens_per_second,
    }


def in_turn(models: Sequence[Model], forms: Sequence[Form], progress: Progress) -> None:
    """Speeds, round by round, after one that does not count."""
    for n in range(ROUNDS + 1):
        for model, form in zip(models, forms, strict=True):
            prefill, decode = measure_speed(model)
            if n:
                form.prefill_tokens_per_second.append(prefill)
                form.decode_tokens_per_second.append(decode)
        progress("speed", n, ROUNDS)


def named(files: Sequence[Path], schemes: Sequence[str]) -> dict[str, Path | None]:
    """Form -> its file, a plan, or None for a scheme to be made; no two of one name."""
    out: dict[str, Path | None] = {}
    for path in files:
        name, n = path.stem, 1
        while name in out or name in schemes or name == SOURCE:
            n += 1
            name = f"{path.stem} ({n})"
        out[name] = path
    return out | dict.fromkeys(schemes)


def make(
    source: str | Path,
    forms: Mapping[str, Path | None],
    folder: Path,
    threads: int | None,
    progress: Progress,
) -> dict[str, Path]:
    """Form -> its .myai file; those of plans and schemes are converted into `folder`."""
    made: dict[str, Path] = {}
    for n, (name, path) in enumerate(forms.items()):
        if path is not None and path.suffix != ".json":
            made[name] = path
            continue
        progress(f"converting to {name}", n, len(forms))
        kind = name.replace(",", "+").replace("/", "-")
        made[name] = folder / f"{Path(called(source)).stem}-{kind}.myai"
        if any(p is not None and p.resolve() == made[name].resolve() for p in forms.values()):
            raise OutputError(
                f"{made[name]}: is one of the models to compare, and where {name} would be kept; "
                "choose another --folder"
            )
        if path is None:
            convert(source, made[name], name, threads=threads)
        else:
            convert(source, made[name], plan=path, threads=threads)
    return made


def check_same(base: Model, model: Model, words: str) -> None:
    """Raise FormatError where a model is no form of the base."""
    for name in SHAPE:
        found, expected = getattr(model.config, name), getattr(base.config, name)
        if found != expected:
            raise FormatError(
                f"{model.file.path}: its {name} is {found}, the source's {expected}; expected a "
                "file that was made from the source"
            )
    if model.tokenizer.encode(words[:4096]) != base.tokenizer.encode(words[:4096]):
        raise FormatError(
            f"{model.file.path}: reads text otherwise than the source; expected a file that was "
            "made from it"
        )


def compare(
    source: str | Path,
    files: Sequence[str | Path],
    text: str | Path,
    folder: str | Path,
    *,
    schemes: Sequence[str] = (),
    tokens: int = TOKENS,
    prompts: Sequence[str] = (),
    max_tokens: int = 64,
    threads: int | None = None,
    progress: Progress = lambda *_: None,
) -> Comparison:
    """Measure a source beside its `files`, and its forms in `schemes`, which stay in `folder`.

    A file is a .myai, or a plan (.json) to convert by. `tokens` of the text are read; `prompts` are
    answered by every form after a warm-up. Raises FormatError, ContextError for too short a text,
    LimitError where it does not fit, and what converting raises.
    """
    words = read_text(Path(text))
    if len(prompts) > MOST_PROMPTS:
        raise LimitError(f"{len(prompts)} prompts; expected at most {MOST_PROMPTS}")
    check_count("--tokens", tokens)
    check_count("--max-tokens", max_tokens)
    forms = named([Path(f).expanduser() for f in files], list(dict.fromkeys(schemes)))
    for scheme in schemes:
        parse_schemes(scheme)  # before anything is made
    if not forms:
        raise FormatError("nothing to compare with; name .myai files, plans, or --schemes nl4,int8")
    with ExitStack() as opened:
        base = opened.enter_context(
            Model(opened.enter_context(uncut(source, threads)), threads=threads, kv="f32")
        )
        ids = base.tokenizer.encode(words)[:tokens]
        list(windows(ids, 2))  # too short a text ends here
        place = Path(folder).expanduser()
        place.mkdir(parents=True, exist_ok=True)
        models = [base]
        for path in make(source, forms, place, threads, progress).values():
            models.append(opened.enter_context(Model(path, threads=threads)))
            check_same(base, models[-1], words)
        measured = [
            Form(name, str(m.file.path), m.file.all_bytes, m.file.bits_per_weight)
            for name, m in zip([SOURCE, *forms], models, strict=True)
        ]
        measure(measured, models, ids, prompts, max_tokens, progress)
        measured[0].file = str(source)  # its numbers were in a file that goes now
        return Comparison(
            str(source),
            Path(text).name,
            measured[0].quality.tokens if measured[0].quality else 0,
            str(PROTOCOL.within(min(m.context for m in models), len(ids))),
            base.backend.name,
            base.backend.threads,
            __version__,
            tuple(measured),
        )


def measure(
    forms: Sequence[Form],
    models: Sequence[Model],
    ids: list[int],
    prompts: Sequence[str],
    max_tokens: int,
    progress: Progress,
) -> None:
    """Everything of all forms; the first is the source."""
    base = models[0]
    found = compare_quality(base, models[1:], ids, lambda n, of: progress("quality", n, of))
    in_turn(models, forms, progress)
    swaps = None
    if all(e.scheme in DENSE for e in base.file.manifest.tensors.values()):
        swaps = Swaps(base.file, open_backend(threads=base.backend.threads), ids)
    for n, (form, quality) in enumerate(zip(forms, found, strict=True)):
        progress("layers and memory", n, len(forms))
        form.quality = quality
        form.peak_bytes = peak_memory(form.file, base.backend.threads, base.context)
        # a source of codes has no layers to put back, nor has a form with fewer experts
        same = models[n].config.experts == base.config.experts
        if n and swaps is not None and same:
            form.layers = layer_losses(swaps, form.file)
        for prompt in prompts:
            form.prompts.append(answer(models[n], prompt, max_tokens))


def spread(values: Sequence[float]) -> str:
    """The median and the range."""
    if not values:
        return "-"
    return f"{median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"
