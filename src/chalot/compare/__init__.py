"""The verb `compare`: a source and its smaller forms in one table: bytes, loss, speed, memory.

All forms see the same text; their speeds are taken in turn, round by round, so that a machine that
is busy for a while is so for all of them. Peak memory is that of a process that loads the form,
reads a prompt and answers.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from chalot import __version__
from chalot.convert import convert
from chalot.errors import FormatError, LimitError
from chalot.evaluate.protocols import PROTOCOL
from chalot.evaluate.quality import Quality
from chalot.evaluate.quality import compare as compare_quality
from chalot.evaluate.report import bits_per_weight, read_text, uncut
from chalot.formats.myai import MyaiFile
from chalot.kernels.backend import open_backend
from chalot.load import Model
from chalot.model.layers import layer_tensors
from chalot.plan.swap import Swaps

ROUNDS = 5
PREFILL, DECODED = 256, 32  # tokens of a round
TOKENS = 8192  # of the text, unless more are asked for
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
    prefill: list[float] = field(default_factory=list)  # tokens a second, a round each
    decode: list[float] = field(default_factory=list)
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
    with model.session(temperature=0) as session:
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
                form.prefill.append(prefill)
                form.decode.append(decode)
        progress("speed", n, ROUNDS)


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
    """Measure a source, its `files` (.myai) and its forms in `schemes`, which stay in `folder`.

    `tokens` of the text are read; `prompts` are answered by every form after a warm-up. Raises
    FormatError, LimitError where it does not fit, and what converting raises.
    """
    words = read_text(Path(text).expanduser())
    if len(prompts) > MOST_PROMPTS:
        raise LimitError(f"{len(prompts)} prompts; expected at most {MOST_PROMPTS}")
    place = Path(folder).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    made = {Path(f).stem: Path(f).expanduser() for f in files}
    for n, scheme in enumerate(schemes):
        progress(f"converting to {scheme}", n, len(schemes))
        made[scheme] = place / f"{Path(str(source)).name}-{scheme.replace(',', '+')}.myai"
        convert(source, made[scheme], scheme, threads=threads)
    if not made:
        raise FormatError("nothing to compare with; name .myai files, or --schemes nl4,int8")
    with uncut(source, threads) as base_file:
        base = Model(base_file, threads=threads, kv="f32")
        models = [base, *(Model(p, threads=threads) for p in made.values())]
        names = ["source", *made]
        forms = [
            Form(name, str(m.file.path), m.file.size, bits_per_weight(m))
            for name, m in zip(names, models, strict=True)
        ]
        try:
            ids = base.tokenizer.encode(words)[:tokens]
            for model in models[1:]:
                if model.tokenizer.encode(words[:4096]) != base.tokenizer.encode(words[:4096]):
                    raise FormatError(f"{model.file.path}: reads text otherwise than the source")
            found = compare_quality(base, models[1:], ids, lambda n, of: progress("quality", n, of))
            in_turn(models, forms, progress)
            swaps = Swaps(base.file, open_backend(threads=threads), ids)
            for n, (form, quality) in enumerate(zip(forms, found, strict=True)):
                progress("layers and memory", n, len(forms))
                form.quality = quality
                form.peak_bytes = peak_memory(form.file, base.backend.threads, base.context)
                if n:
                    form.layers = layer_losses(swaps, form.file)
                for prompt in prompts:
                    form.prompts.append(answer(models[n], prompt, max_tokens))
            return Comparison(
                str(source),
                Path(text).name,
                found[0].tokens,
                str(PROTOCOL),
                base.backend.name,
                base.backend.threads,
                __version__,
                tuple(forms),
            )
        finally:
            for model in models:
                model.close()


def spread(values: Sequence[float]) -> str:
    """The median and the range."""
    if not values:
        return "-"
    return f"{median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"
