#!/usr/bin/env python3
"""Bytes a token against tokens a second, under the roof that memory sets: a picture of a result.

    python benchmarks/roofline.py [--model qwen2.5-0.5b] [--out docs/roofline.svg] [--into PAGE]

Reads the last line of results/peers.jsonl for that model and writes plain SVG. Both axes are
logarithmic. The roof is GB/s / bytes, for the GB/s of the run's own plain read loop, a band from
its slowest to its fastest round; an engine that only waits for memory is on it. A full dot is
decoding after a short prompt, a ring after a long one. Sides that do not say their bytes are left
out.
"""

import argparse
import json
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from machine import HERE
from report import into

WIDTH, HEIGHT = 860, 560
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 50, 60  # margins; labels stand in the right one
LINE = 15  # pixels from one label to the next
COLOURS = {
    "chalot": "#c0392b", "llama.cpp": "#2471a3", "openvino": "#7d3c98",
    "onnxruntime": "#1e8449", "transformers": "#7f8c8d",
}  # fmt: skip
STEPS = (1, 1.5, 2, 3, 4, 5, 7)


@dataclass(frozen=True)
class Point:
    """One side at one depth."""

    side: str
    engine: str
    depth: int
    megabytes: float
    speed: float  # tokens a second


def points(result: dict[str, Any]) -> list[Point]:
    found = []
    for task, part in (("decode", "decode"), ("depth", "decode at depth")):
        measured = result["tasks"].get(task)
        for side, summary in measured["sides"].items() if measured else ():
            size = summary[part].get("bytes_per_token")
            if size:
                engine, depth = result["sides"][side]["engine"], measured["parts"][part]["prompt"]
                speed = summary[part]["tokens_per_second"]["median"]
                found.append(Point(side, engine, depth, size / 1e6, speed))
    return found


def roof(result: dict[str, Any]) -> tuple[float, float]:
    """The least and the greatest GB/s of the plain loop in any round of decoding."""
    loops = [task["bandwidth"]["plain"] for name, task in result["tasks"].items()
             if name in ("decode", "depth")]  # fmt: skip
    return min(loop["min"] for loop in loops), max(loop["max"] for loop in loops)


class Axis:
    """Values on a logarithmic scale to pixels."""

    def __init__(self, values: list[float], first: float, last: float) -> None:
        self.low, self.high = min(values) / 1.25, max(values) * 1.25
        self.first, self.last = first, last

    def __call__(self, value: float) -> float:
        share = log10(value / self.low) / log10(self.high / self.low)
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        every = [step * 10.0**power for power in range(-2, 7) for step in STEPS]
        return [value for value in every if self.low <= value <= self.high]


def text(x: float, y: float, words: str, **attributes: str) -> str:
    given = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{given}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="{colour}" stroke-width="{width}"/>'
    )


def grid(x: Axis, y: Axis) -> list[str]:
    out = []
    for value in x.ticks():
        out.append(line(x(value), y.first, x(value), y.last, "#e5e5e5"))
        out.append(text(x(value), y.first + 18, f"{value:g}", text_anchor="middle"))
    for value in y.ticks():
        out.append(line(x.first, y(value), x.last, y(value), "#e5e5e5"))
        out.append(text(x.first - 8, y(value) + 4, f"{value:g}", text_anchor="end"))
    out.append(text((x.first + x.last) / 2, y.first + 42, "MB read by a token, keys and values too",
                    text_anchor="middle"))  # fmt: skip
    out.append(text(x.first - 50, y.last - 12, "tokens a second"))
    return out


def band(x: Axis, y: Axis, least: float, greatest: float) -> list[str]:
    """Between the two roofs: tokens/s = 1000 GB/s / MB."""
    ends = [(x.low, least), (x.high, least), (x.high, greatest), (x.low, greatest)]
    corners = " ".join(f"{x(size):.1f},{y(1000 * speed / size):.1f}" for size, speed in ends)
    middle = (x.low * x.high) ** 0.5
    words = f"plain read loop, {least:.0f}-{greatest:.0f} GB/s"
    return [
        '<clipPath id="plot"><rect '
        f'x="{x.first}" y="{y.last}" width="{x.last - x.first}" height="{y.first - y.last}"/>'
        "</clipPath>",
        f'<polygon points="{corners}" fill="#f5cba7" stroke="#d68910" clip-path="url(#plot)"/>',
        text(x(middle), y(1000 * greatest / middle) - 10, words, fill="#9c640c"),
    ]


def marks(x: Axis, y: Axis, found: list[Point]) -> list[str]:
    """Dots and rings; labels of a column to the right, moved apart, each with a line to its dot."""
    out = []
    least = min(point.depth for point in found)
    labels = sorted(found, key=lambda point: (-point.speed, point.side))
    labels = [point for n, point in enumerate(labels)
              if point.depth == least or all(p.side != point.side for p in found
                                             if p.depth == least)]  # fmt: skip
    below = y.last
    for point in labels:
        at = max(y(point.speed), below)
        below = at + LINE
        colour = COLOURS.get(point.engine, "#000000")
        out.append(line(x(point.megabytes), y(point.speed), x.last + 8, at, "#cccccc", 0.7))
        out.append(text(x.last + 12, at + 4, f"{point.side}  {point.speed:,.1f}", fill=colour))
    for point in found:
        colour = COLOURS.get(point.engine, "#000000")
        fill = colour if point.depth == least else "#ffffff"
        out.append(
            f'<circle cx="{x(point.megabytes):.1f}" cy="{y(point.speed):.1f}" r="4.5" '
            f'fill="{fill}" stroke="{colour}" stroke-width="1.5">'
            f"<title>{escape(point.side)}, depth {point.depth}: {point.megabytes:.1f} MB, "
            f"{point.speed:.1f} tokens/s</title></circle>"
        )
    return out


def picture(result: dict[str, Any]) -> str:
    """The whole SVG."""
    found = points(result)
    if not found:
        raise SystemExit("that result has no decoding with known bytes")
    least, greatest = roof(result)
    sizes, speeds = [p.megabytes for p in found], [p.speed for p in found]
    speeds.append(1000 * greatest / min(sizes))
    x = Axis(sizes, LEFT, WIDTH - RIGHT)
    y = Axis(speeds, HEIGHT - BOTTOM, TOP)
    depths = sorted({p.depth for p in found})
    kinds = zip(("full", "ring"), depths, strict=False)  # one depth alone has no rings
    shown = ", ".join(f"{kind}: after {depth:,} tokens" for kind, depth in kinds)
    title = f"{result['model']}, {result['threads']} threads, {result['date'][:10]}; {shown}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="#333333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT - 50, 22, title, font_size="14"),
        *grid(x, y),
        *band(x, y, least, greatest),
        *marks(x, y, found),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-0.5b")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "peers.jsonl")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "roofline.svg")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="show it in that page too")
    options = parser.parse_args()
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    runs = [run for run in map(json.loads, lines) if run["model"] == options.model]
    if not runs:
        raise SystemExit(f"{options.results} has no line of {options.model}; run peers.py first")
    options.out.write_text(picture(runs[-1]), "utf-8")
    if options.into:
        into(options.into, "picture", f"![Bytes against tokens a second]({options.out.name})")


if __name__ == "__main__":
    main()
