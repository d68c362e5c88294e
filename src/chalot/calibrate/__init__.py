"""The verb `calibrate`: what a model's first layers know already, and whether that pays here.

Agreement with full depth is measured behind every layer along a text, costs on this machine; from
both come how to draft with the first layers (chalot.engine.layer_draft), where tokens may leave
early (chalot.engine.early_exit), and a supervisor of prompts. The text's first half says which
tokens are frequent, the second half all the rest, so no figure is of what it was chosen by but the
choice of the best among its candidates.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chalot import calibrated
from chalot.calibrate.choose import best_draft, best_exits
from chalot.calibrate.clock import Costs, measure
from chalot.calibrate.depths import Head, Looked, look
from chalot.calibrate.probe import supervise
from chalot.calibrated import Calibration, Depth, ShortHead
from chalot.charts import Point, drawn
from chalot.errors import ContextError, UnsupportedError
from chalot.formats.files import read_text
from chalot.kernels.program import PAGE
from chalot.load import Model
from chalot.model.transformer import head_name
from chalot.quant.packing import take_rows
from chalot.quant.scheme import PANEL
from chalot.table import pairs, rows
from chalot.typed import MAY_COUNT, PATH, check_types

SHARES = (32, 16, 8, 4)  # a short head has this part of the vocabulary
FEWEST = 2 * PAGE  # tokens of a text: half of them are looked at
TOKENS = 8192  # that are looked at, unless something else is asked for

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CalibrateReport:
    """What was found, and where it was put."""

    model: str
    path: str
    found: Calibration


def calibrate(
    model: str | Path,
    text: str | Path,
    *,
    tokens: int | None = None,
    threads: int | None = None,
    progress: Progress = lambda *_: None,
) -> CalibrateReport:
    """Look at a `.myai` file along a text; write what was found beside it (chalot.calibrated).

    `tokens` of the text's second half are looked at, 8,192 unless it says otherwise. Raises
    UnsupportedError for a model of one layer, ContextError for a text that is too short,
    TokenizerError, FormatError, OutputError.
    """
    check_types(
        model=(model, PATH),
        text=(text, PATH),
        tokens=(tokens, MAY_COUNT),
        threads=(threads, MAY_COUNT),
    )
    path = Path(model).expanduser()
    written = read_text(Path(text))
    place = calibrated.beside(path)
    with (
        Model(path, threads=threads, draft=False, calibration=False) as opened,
        calibrated.new_calibration(place) as write,
    ):
        config = opened.config
        if config.layers < 2:
            raise UnsupportedError(f"{path}: has one layer; there is nothing shallower to look at")
        ids = opened.tokenizer.encode(written)
        windows = looked_at(ids, TOKENS if tokens is None else tokens)
        heads = short_heads(opened, ids[: len(ids) // 2])
        borders = tuple(r.first for r in config.regions[1:])
        looked = look(opened.maker, windows, heads, borders, progress)
        costs = measure(opened.engine, opened.maker, heads, windows[0][0])
        digest = hashlib.sha256(written.encode()).hexdigest()[:16]
        found, head = conclude(opened, looked, costs, heads, f"{Path(text).name} {digest}")
        write(found, head.matrix)
    return CalibrateReport(str(path), str(place), found)


def looked_at(ids: Sequence[int], tokens: int) -> list[list[int]]:
    """Windows of the text's second half. Raises ContextError where there is too little of it."""
    half = list(ids[len(ids) // 2 :])[: max(tokens, 0)]
    if len(ids) < FEWEST or len(half) < PAGE:
        raise ContextError(
            f"a text of {len(ids)} tokens, of which {len(half)} are looked at; expected {FEWEST} "
            f"or more, and --tokens of {PAGE} or more: take a longer text"
        )
    return [half[at : at + PAGE] for at in range(0, len(half) - PAGE + 1, PAGE)]


def short_heads(model: Model, ids: Sequence[int]) -> dict[int, Head]:
    """Heads of the most frequent tokens, by size; the rest in the order of their ids."""
    size = model.config.vocabulary
    counts = np.bincount(np.array(ids), minlength=size)
    order = np.lexsort((np.arange(size), -counts))
    matrix = model.maker.weights.matrices[head_name(model.config)]
    out = {}
    for share in SHARES:
        few = max(2 * PANEL, size // share // PANEL * PANEL)
        if few < size:
            kept = np.sort(order[:few])
            out[few] = Head(take_rows(matrix, kept), kept.astype(np.int32))
    if not out:
        raise UnsupportedError(
            f"{model.file.path}: a vocabulary of {size} has no tokens to leave out; expected more "
            f"than {2 * PANEL}"
        )
    return out


def conclude(
    model: Model, looked: Looked, costs: Costs, heads: dict[int, Head], text: str
) -> tuple[Calibration, Head]:
    """All choices, and the short head that they take."""
    config, backend = model.config, model.backend
    borders = tuple(r.first for r in config.regions[1:])
    draft, size = best_draft(looked, costs)
    head, full = heads[size], config.vocabulary
    exits = best_exits(looked, costs, borders, head, config.layers) if borders else ()
    supervisor = None
    if exits:
        first = exits[0].layers
        same = looked.tops[full][first - 1] == looked.final
        supervisor = supervise(looked.states[first], same, looked.windows)
    assert head.ids is not None
    scheme, planes = str(head.matrix.scheme), model.maker.weights.planes.get(head_name(config), 0)
    coverage = float(np.isin(looked.ids, head.ids).mean())
    both = zip(looked.agreement(full), looked.agreement(size), strict=True)
    found = Calibration(
        model=model.file.digest,
        text=text,
        machine=f"{backend.name} on {backend.threads} threads",
        tokens=len(looked.final),
        seconds=costs.said(),
        depths=tuple(Depth(k, *pair) for k, pair in enumerate(both, 1)),
        short=ShortHead(scheme, tuple(head.ids.tolist()), planes, coverage),
        draft=draft,
        exits=exits,
        supervisor=supervisor,
    )
    return found, head


def picture(found: Calibration) -> str:
    """SVG: agreement with full depth by layers."""
    series = {
        "whole head": [Point("", d.layers, 100 * d.agreement) for d in found.depths],
        f"{len(found.short.tokens):,} tokens": [
            Point("", d.layers, 100 * d.short_agreement) for d in found.depths
        ],
    }
    lines = list(series.values())
    ends = [p[-1]._replace(label=name) for name, p in series.items()]
    shown = [p for points in lines for p in points]
    return drawn(shown, ends, lines, "layers", "same best token as full depth, %", False)


def render(report: CalibrateReport) -> str:
    """What was found, as text."""
    found = report.found
    d, short, s = found.draft, found.short, found.supervisor
    table = [["layers", "agreement", f"with {len(short.tokens):,} tokens"]]
    for depth in found.depths:
        table.append([str(depth.layers), f"{depth.agreement:.1%}", f"{depth.short_agreement:.1%}"])
    facts = [
        ("looked at", f"{found.tokens:,} tokens, {found.machine}"),
        ("short head", f"{len(short.tokens):,} tokens, {short.coverage:.1%} of the text"),
        (
            "drafting",
            f"{'on' if d.on else 'off'}: best are {d.tokens} tokens by {d.layers} layers with the "
            f"{'short' if d.short else 'whole'} head, expected gain {d.gain:.2f} x "
            f"({d.kept:.0%} agree)",
        ),
    ]
    for e in found.exits:
        facts.append(
            (
                "early exit",
                f"behind {e.layers} layers {e.leave:.1%} leave by a margin of {e.margin:g}, "
                f"{e.agree:.1%} of them agree; saves {e.saves:+.1%} of a pass in all",
            )
        )
    if s is None:
        facts.append(("supervisor", "off: too few prompts to judge one; take a longer text"))
    else:
        facts.append(
            (
                "supervisor",
                f"{'on' if s.on else 'off'}: AUROC {s.auroc:.3f} +- {s.error:.3f} on {s.prompts} "
                f"prompts; majority 0.500 (right in {s.majority:.0%}), length {s.length_auroc:.3f}",
            )
        )
    return f"{rows(table)}\n\n{pairs(facts)}"
