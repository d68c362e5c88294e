"""A comparison as a page of its own, as Markdown, and as one table of text."""

from importlib import resources
from statistics import median
from typing import Any

from chalot.charts import Point, scatter, strips
from chalot.compare import Comparison, Form, spread
from chalot.errors import UnsupportedError

HEADS = (
    *("form", "bytes", "bits/weight", "perplexity", "KL to source", "99 % KL", "same top"),
    *("prefill tokens/s", "decode tokens/s", "peak memory"),
)


def cells(form: Form) -> list[str]:
    """One row of the table."""
    q = form.quality
    if q is None:
        raise UnsupportedError(f"{form.name} was not measured")
    kl = "-" if q.kl is None else f"{q.kl:.5f} +- {q.kl_error:.5f}"
    return [
        form.name,
        f"{form.bytes:,}",
        f"{form.bits_per_weight:.2f}",
        f"{q.perplexity:.3f} +- {q.perplexity_error:.3f}",
        kl,
        "-" if q.kl_99 is None else f"{q.kl_99:.3f}",
        "-" if q.same_top is None else f"{q.same_top:.2%}",
        spread(form.prefill),
        spread(form.decode),
        "-" if form.peak_bytes is None else f"{form.peak_bytes / 1e6:,.0f} MB",
    ]


def table(found: Comparison) -> list[list[str]]:
    """Headings, then a row for each form."""
    return [list(HEADS), *(cells(f) for f in found.forms)]


def note(found: Comparison) -> str:
    """What the figures are of."""
    return (
        f"{found.tokens:,} tokens of {found.text} scored; protocol {found.protocol}. Speeds are "
        f"medians (ranges) of rounds in turn, {found.kernels} on {found.threads} threads. The "
        "source computes in its own numbers with a float32 cache. Errors are standard errors over "
        "windows."
    )


def markdown(found: Comparison) -> str:
    """The table and its note."""
    head, *body = table(found)
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in body]
    return "\n".join([*lines, "", note(found)]) + "\n"


def pareto(found: Comparison) -> str:
    """Size against loss."""
    points = [
        Point(f.name, f.bytes / 1e6, f.quality.kl, f.quality.kl_error or 0.0)
        for f in found.forms
        if f.quality is not None and f.quality.kl is not None
    ]
    return scatter(points, "MB of the file", "KL to the source, nats a token")


def speeds(found: Comparison) -> str:
    """Size against decoding."""
    points = [Point(f.name, f.bytes / 1e6, median(f.decode)) for f in found.forms if f.decode]
    return scatter(points, "MB of the file", "tokens decoded a second", log_y=False, front=False)


def page(found: Comparison) -> str:
    """One self-contained HTML page: no script, nothing fetched."""
    from jinja2 import Environment

    text = resources.files("chalot").joinpath("compare", "page.html.jinja").read_text("utf-8")
    layers = {f.name: f.layers for f in found.forms if f.layers}
    values: dict[str, Any] = {
        "found": found,
        "table": table(found),
        "note": note(found),
        "pareto": pareto(found),
        "speeds": speeds(found),
        "layers": strips(layers, "KL of the source with one layer so stored") if layers else "",
        "prompts": [
            [(f.name, f.prompts[i]) for f in found.forms]
            for i in range(min(len(f.prompts) for f in found.forms))
        ],
    }
    return Environment(autoescape=True).from_string(text).render(values)
