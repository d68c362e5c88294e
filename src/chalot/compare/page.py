"""A comparison as a page of its own, as Markdown, and as one table of text."""

from html import escape
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from chalot.charts import Point, scatter, strips
from chalot.compare import Comparison, Form, spread
from chalot.errors import FormatError
from chalot.evaluate.report import with_error
from chalot.formats.new_file import NewFile

HEADS = (
    *("form", "bytes", "bits/weight", "perplexity", "loss above source"),
    *("KL to source", "99 % KL", "same top"),
    *("prefill tokens/s", "decode tokens/s", "peak memory"),
)


def cells(form: Form) -> list[str]:
    """One row of the table."""
    q = form.quality
    if q is None:
        raise FormatError(f"{form.name} was not measured")
    return [
        form.name,
        f"{form.bytes:,}",
        f"{form.bits_per_weight:.2f}",
        with_error(q.perplexity, q.perplexity_error, ".3f"),
        with_error(q.excess, q.excess_error, "+.4f"),
        with_error(q.kl, q.kl_error, ".5f"),
        "-" if q.kl_99 is None else f"{q.kl_99:.3f}",
        "-" if q.same_top is None else f"{q.same_top:.2%}",
        spread(form.prefill_tokens_per_second),
        spread(form.decode_tokens_per_second),
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
        "source computes in its own numbers with a float32 cache. Losses are in nats a token, "
        "errors standard errors over windows. That of a perplexity says how texts differ; that of "
        "the loss above the source, window by window, what the form did."
    )


def parted(cell: str) -> tuple[str, str]:
    """A cell's number, and its error or range, which stands below it on the page."""
    for sign, shown in ((" +- ", "\u00b1 "), (" (", "(")):
        number, found, rest = cell.partition(sign)
        if found:
            return number, shown + rest
    return cell, ""


def in_markdown(cell: str) -> str:
    """Text of a cell that neither ends it nor is markup."""
    return escape(" ".join(cell.split()), quote=False).replace("|", "\\|")


def markdown(found: Comparison) -> str:
    """The table and its note."""
    head, *body = table(found)
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(map(in_markdown, row))} |" for row in body]
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
    points = [
        Point(f.name, f.bytes / 1e6, median(f.decode_tokens_per_second))
        for f in found.forms
        if f.decode_tokens_per_second
    ]
    return scatter(points, "MB of the file", "tokens decoded a second", log_y=False, front=False)


def page(found: Comparison) -> str:
    """One self-contained HTML page: no script, nothing fetched."""
    from jinja2 import Environment

    text = resources.files("chalot").joinpath("compare", "page.html.jinja").read_text("utf-8")
    layers = {f.name: f.layers for f in found.forms if f.layers}
    values: dict[str, Any] = {
        "found": found,
        "name": Path(found.source).name or found.source,
        "heads": HEADS,
        "table": [[(row[0], ""), *map(parted, row[1:])] for row in table(found)[1:]],
        "note": note(found),
        "pareto": pareto(found),
        "speeds": speeds(found),
        "layers": strips(layers, "KL of the source with one layer so stored") if layers else "",
        "by_layer": [[name, *(f"{v:.3g}" for v in row)] for name, row in layers.items()],
        "prompts": [
            [(f.name, f.prompts[i]) for f in found.forms]
            for i in range(min(len(f.prompts) for f in found.forms))
        ],
    }
    return Environment(autoescape=True).from_string(text).render(values)


def write(found: Comparison, out: Path, data: str) -> tuple[Path, Path, Path]:
    """The page at `out`, Markdown and `data` (JSON) beside it, each whole or not at all."""
    paths = out, out.with_suffix(".md"), out.with_suffix(".json")
    for path, text in zip(paths, (page(found), markdown(found), data + "\n"), strict=True):
        with NewFile(path, text[:8].encode(), path.suffix) as file:
            file.write(text.encode())
            file.commit()
    return paths
