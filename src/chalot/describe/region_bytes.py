"""What each region of a model takes: the part of `describe` that speaks of regions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from chalot.mixture import Sized
from chalot.model.config import ModelConfig
from chalot.model.layers import layer_tensors
from chalot.table import rows

OUTSIDE = "outside"  # what is in no layer


@dataclass(frozen=True)
class RegionReport:
    """A region of layers (chalot.model.regions); or what is in no layer, under "outside"."""

    name: str
    first: int | None
    last: int | None
    weights: int
    bytes: int


def region_reports(config: ModelConfig, tensors: Iterable[Sized]) -> tuple[RegionReport, ...]:
    """Weights and bytes by region; together they are those of the model."""
    left = {t.name: t for t in tensors}
    out = []
    for region in config.regions:
        names = [s.name for layer in region.layers for s in layer_tensors(config, layer)]
        inside = [left.pop(name) for name in names]
        out.append(RegionReport(region.name, region.first, region.last, *sizes(inside)))
    return (*out, RegionReport(OUTSIDE, None, None, *sizes(left.values())))


def sizes(tensors: Iterable[Sized]) -> tuple[int, int]:
    """(weights, bytes)"""
    both = [(prod(t.shape), t.bytes if t.shares is None else 0) for t in tensors]
    return sum(weights for weights, _ in both), sum(stored for _, stored in both)


def region_table(reports: Sequence[RegionReport]) -> str:
    """As text."""
    table = [["region", "layers", "weights", "bytes"]]
    for r in reports:
        where = "embedding, final norm, head" if r.first is None else f"{r.first}-{r.last}"
        table.append([r.name, where, f"{r.weights:,}", f"{r.bytes:,}"])
    return rows(table)
