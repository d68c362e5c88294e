"""What leaving early costs: KL and agreement against full depth, and what it saves, by margin.

The same file along the same text, with early exit and without. Every token may leave, as if the
model had written the text itself; keys and values of the layers that it skipped are filled in, and
later tokens see those.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from chalot.errors import FormatError
from chalot.evaluate.quality import Quality, compare
from chalot.formats.files import read_text
from chalot.load import Model
from chalot.table import rows

PROMPT, ANSWER = 32, 32  # tokens whose speed is measured


@dataclass(frozen=True)
class AtMargin:
    """One margin. `left` is the share of tokens that left, by the layers behind which they did."""

    margin: float
    left: dict[int, float]
    quality: Quality  # KL and agreement are against full depth
    speed: float  # decoding, over that of full depth: in turn, no drafts


@dataclass(frozen=True)
class ExitsReport:
    """A model's early exits along a text."""

    model: str
    text: str
    base: Quality
    margins: tuple[AtMargin, ...]


def exits(
    path: str | Path,
    text: str | Path,
    margins: Sequence[float | str],
    *,
    tokens: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> ExitsReport:
    """Measure each margin. Raises FormatError, where the model has no calibration too."""
    written = read_text(Path(text))
    found = []
    with Model(path, threads=threads, draft=False) as base:
        ids = base.tokenizer.encode(written)[:tokens]
        for n, margin in enumerate(margins):

            def advance(done: int, of: int, n: int = n) -> None:
                progress(n * of + done, of * len(margins))

            with Model(path, threads=threads, draft=False, early_exit=margin) as model:
                qualities = compare(base, [model], ids, advance)
                report = model.reflexes.report()
                if report is None:
                    raise FormatError(f"{path}: early exit is off")
                left = {k: n / max(report.tokens, 1) for k, n in report.left.items()}
                speed = ratio(base, model, ids)
                found.append(AtMargin(report.margin, left, qualities[1], speed))
    return ExitsReport(str(path), str(text), qualities[0], tuple(found))


def ratio(base: Model, model: Model, ids: Sequence[int]) -> float:
    """The speed of `model` over that of `base`: the least time of each, measured in turn."""
    best = [float("inf"), float("inf")]
    for _ in range(3):
        for which, one in enumerate((base, model)):
            room = min(one.context - PROMPT, ANSWER)
            with one.session(temperature=0) as session:
                session.prefill(list(ids[:PROMPT]))
                session.step()
                start = time.perf_counter()
                for _ in range(room - 1):
                    session.step()
                best[which] = min(best[which], time.perf_counter() - start)
    return best[0] / best[1]


def render(report: ExitsReport) -> str:
    """A table by margin."""
    borders = list(report.margins[0].left)
    head = ["margin", *(f"leave at {b}" for b in borders), "KL", "+-", "same top", "perplexity"]
    table = [[*head, "speed"]]
    for m in report.margins:
        q = m.quality
        table.append(
            [
                f"{m.margin:g}",
                *(f"{m.left[b]:.1%}" for b in borders),
                f"{q.kl or 0:.5f}",
                f"{q.kl_error or 0:.5f}",
                f"{q.same_top or 0:.2%}",
                f"{q.perplexity:.3f}",
                f"{m.speed:.2f} x",
            ]
        )
    table.append(
        ["full depth", *("-" for _ in borders), "0", "-", "100.00%"]
        + [f"{report.base.perplexity:.3f}", "1.00 x"]
    )
    return (
        f"{rows(table)}\n{report.base.tokens:,} tokens of {report.text}; KL and top token against "
        "full depth. Early exit changes answers; it is off unless it is asked for."
    )
