"""Pictures as SVG text, for pages and files: points on two axes, and strips of coloured cells.

Colours come from CSS variables with fallbacks, so that a page's light and dark scheme hold inside.
Every number stands in the text or in a title.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from math import floor, isfinite, log10
from pathlib import Path
from typing import NamedTuple

from chalot.errors import OutputError
from chalot.formats.new_file import NewFile

WIDTH, HEIGHT = 480, 320  # so narrow that words can be read on a phone
LEFT, TOP, BOTTOM = 56, 28, 46
LETTER = 7.0  # width of a letter, about
LONGEST, BESIDE_STRIP = 28, 15  # characters of a name beside a point, beside a strip
INK, FAINT, DOT = "var(--ink, #222)", "var(--faint, #ddd)", "var(--accent, #0b6e99)"


def svg_path(text: str) -> Path:
    """Where a picture goes. Raises OutputError for a name that does not end in .svg."""
    path = Path(text).expanduser()
    if path.suffix.lower() != ".svg":
        raise OutputError(
            f"{path}: is no .svg file, and pictures are; choose a name that ends in .svg"
        )
    return path


@contextmanager
def new_picture(path: str | None) -> Iterator[Callable[[str], None]]:
    """What writes a picture to a file, whose place is checked now; to none without a path.

    Whole or not at all; over another .svg only. Raises OutputError, for other endings too.
    """
    if path is None:
        yield lambda _: None
        return
    with NewFile(svg_path(path), b"<svg", ".svg") as file:

        def draw(svg: str) -> None:
            file.write(svg.encode())
            file.commit()

        yield draw


class Point(NamedTuple):
    """A labelled point; `error` is half of a bar along y."""

    label: str
    x: float
    y: float
    error: float = 0.0


class Scale:
    """Values to pixels, by their logarithms where `log`."""

    def __init__(self, values: Sequence[float], first: float, last: float, log: bool) -> None:
        self.log = log
        kept = [v for v in values if isfinite(v) and (v > 0 or not log)]
        low, high = (min(kept), max(kept)) if kept else (1.0, 2.0)
        if log:
            self.low, self.high = log10(low / 1.3), log10(high * 1.3)
        else:
            margin = (high - low or abs(high) or 1.0) * 0.08
            self.low, self.high = low - margin, high + margin
        self.first, self.last = first, last

    def __call__(self, value: float) -> float:
        at = log10(max(value, 1e-300)) if self.log else value
        share = (at - self.low) / (self.high - self.low)
        return self.first + min(max(share, 0.0), 1.0) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round values inside."""
        if self.log:
            found = [
                step * 10.0**power
                for power in range(floor(self.low), floor(self.high) + 1)
                for step in (1, 2, 5)
            ]
            return [v for v in found if self.low <= log10(v) <= self.high]
        rough = (self.high - self.low) / 5
        size = 10.0 ** floor(log10(rough))
        step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
        first = floor(self.low / step) + 1
        return [i * step for i in range(first, first + 12) if i * step <= self.high]


def words(x: float, y: float, text: str, anchor: str = "start", size: int = 13) -> str:
    """Text at a place."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{INK}">{escape(text)}</text>'
    )


def short(name: str, longest: int = LONGEST) -> str:
    """A name that fits beside what it names."""
    return name if len(name) <= longest else name[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def line(x1: float, y1: float, x2: float, y2: float, colour: str = FAINT) -> str:
    """A thin line."""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" style="stroke: {colour}"/>'
    )


def frame(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """The whole SVG; `title` is what a screen reader says."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(title, quote=True)}" font-family="sans-serif">',
            *parts,
            "</svg>",
        ]
    )


def scatter(
    points: Sequence[Point], x_title: str, y_title: str, log_y: bool = True, front: bool = True
) -> str:
    """Points with labels; `front` joins those that no other beats in both (less is better)."""
    shown = [p for p in points if isfinite(p.x) and isfinite(p.y) and (p.y > 0 or not log_y)]
    best = [p for p in shown if not any(q.x <= p.x and q.y < p.y for q in shown)]
    return drawn(shown, shown, [best] if front else [], x_title, y_title, log_y)


def curves(series: Mapping[str, Sequence[Point]], x_title: str, y_title: str) -> str:
    """Points of each series, joined, with its name at its largest x; y by its logarithm."""
    kept = {
        name: [p for p in points if isfinite(p.x) and isfinite(p.y) and p.y > 0]
        for name, points in series.items()
    }
    lines = [points for points in kept.values() if points]
    ends = [
        max(points, key=lambda p: p.x)._replace(label=n) for n, points in kept.items() if points
    ]
    shown = [p for points in lines for p in points]
    return drawn(shown, ends, lines, x_title, y_title, True)


def drawn(
    shown: Sequence[Point],
    labelled: Sequence[Point],
    lines: Sequence[Sequence[Point]],
    x_title: str,
    y_title: str,
    log_y: bool,
) -> str:
    """Two axes, points, lines through some of them, and labels in the right margin."""
    longest = max((len(short(p.label)) for p in labelled), default=0)
    right = WIDTH - 20 - LETTER * longest
    x = Scale([p.x for p in shown], LEFT, right, False)
    y = Scale([p.y for p in shown], HEIGHT - BOTTOM, TOP, log_y)
    parts = []
    for v in x.ticks():
        parts += [
            line(x(v), TOP, x(v), HEIGHT - BOTTOM),
            words(x(v), HEIGHT - BOTTOM + 18, f"{v:g}", "middle"),
        ]
    for v in y.ticks():
        parts += [line(LEFT, y(v), right, y(v)), words(LEFT - 8, y(v) + 4, f"{v:g}", "end")]
    parts.append(words((LEFT + right) / 2, HEIGHT - 10, x_title, "middle"))
    parts.append(words(8, 14, y_title))
    for points in lines:
        path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in sorted(points, key=lambda p: p.x))
        parts.append(f'<polyline points="{path}" style="fill: none; stroke: {DOT}; opacity: .5"/>')
    for p in shown:
        if p.error:
            parts.append(line(x(p.x), y(max(p.y - p.error, 1e-12)), x(p.x), y(p.y + p.error), INK))
        title = f"{p.label}: {p.x:,.4g}, {p.y:.4g}" + (f" +- {p.error:.2g}" if p.error else "")
        parts.append(
            f'<circle cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="4.5" style="fill: {DOT}">'
            f"<title>{escape(title)}</title></circle>"
        )
    below = 0.0
    for p in sorted(labelled, key=lambda p: y(p.y)):
        at = max(y(p.y) + 4, below + 14)
        below = at
        parts.append(line(x(p.x) + 5, y(p.y), right + 6, at - 4))
        parts.append(words(right + 10, at, short(p.label)))
    return frame(WIDTH, HEIGHT, f"{y_title} by {x_title}", parts)


def strips(rows: Mapping[str, Sequence[float]], title: str) -> str:
    """A row of cells for each name, darker where larger (by logarithm), on one scale."""
    values = [v for row in rows.values() for v in row if v > 0 and isfinite(v)]
    low, high = (log10(min(values)), log10(max(values))) if values else (0.0, 1.0)
    columns = max((len(r) for r in rows.values()), default=1)
    left, cell = 118, min(40.0, (WIDTH - 126) / columns)
    parts = [words(8, 14, title)]
    for n, (name, row) in enumerate(rows.items()):
        top = 26 + n * 26
        parts.append(words(left - 8, top + 15, short(name, BESIDE_STRIP), "end"))
        for i, value in enumerate(row):
            share = 0.0
            if value > 0 and isfinite(value):
                share = (log10(value) - low) / ((high - low) or 1)
            parts.append(
                f'<rect x="{left + i * cell:.1f}" y="{top}" width="{cell - 1:.1f}" height="22" '
                f'style="fill: {DOT}; opacity: {0.08 + 0.92 * share:.2f}">'
                f"<title>{escape(name)}, layer {i}: {value:.3g}</title></rect>"
            )
    bottom = 26 + len(rows) * 26 + 16
    every = max(1, columns // 12)
    parts += [
        words(left + (i + 0.5) * cell, bottom - 2, str(i), "middle", 11)
        for i in range(0, columns, every)
    ]
    return frame(WIDTH, bottom + 6, title, parts)
