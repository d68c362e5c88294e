"""A model's layers as named regions: what planner, early exit, drafting and residency refer to.

Without a choice in the file: shallow, deep and fact, the first quarter, the middle half and the
last quarter of the layers (0-5, 6-17 and 18-23 of 24). What is no layer, embedding, final norm and
head, is in none.
"""

import re
from collections.abc import Sequence

import msgspec

NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
ITEM = re.compile(r"\s*([^=\s]+)\s*=\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*")
TAKEN = ("embedding", "head", "attention", "ffn", "vector", "layers")  # means something else


class Region(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Layers `first` to `last`, both included."""

    name: str
    first: int
    last: int

    @property
    def layers(self) -> range:
        """Its layers."""
        return range(self.first, self.last + 1)

    def __str__(self) -> str:
        return f"{self.name}={self.first}-{self.last}"


Regions = tuple[Region, ...]


def default_regions(layers: int) -> Regions:
    """Shallow, deep, fact; a model of one or two layers has fewer."""
    outer = max(1, round(layers / 4))
    borders = sorted({0, min(outer, layers), max(layers - outer, min(outer, layers)), layers})
    names = {1: ("shallow",), 2: ("shallow", "fact")}.get(
        len(borders) - 1, ("shallow", "deep", "fact")
    )
    spans = zip(names, borders, borders[1:], strict=False)
    return tuple(Region(name, first, end - 1) for name, first, end in spans)


def check_regions(regions: Sequence[Region], layers: int) -> None:
    """Raise ValueError unless they have names of their own and cover the layers, in order."""
    names = [r.name for r in regions]
    for name in names:
        if not NAME.fullmatch(name) or name in TAKEN or names.count(name) > 1:
            raise ValueError(
                f"region {name[:40]!r}: expected a name of its own, a to z, digits and _, none of "
                f"{', '.join(TAKEN)}"
            )
    begin = 0
    for r in regions:
        if r.first != begin or not r.first <= r.last < layers:
            raise ValueError(
                f"region {r}: expected to begin at layer {begin} and to end by {layers - 1}; "
                f"regions follow each other and cover layers 0 to {layers - 1}"
            )
        begin = r.last + 1
    if begin != layers:
        raise ValueError(f"layers {begin} to {layers - 1} are in no region; name them too")


def parse_regions(text: str) -> Regions:
    """Regions of "shallow=0-3,deep=4-9". Raises ValueError for another form."""
    found = []
    for item in text.split(","):
        match = ITEM.fullmatch(item)
        if match is None:
            raise ValueError(f"{item[:40]!r}: expected NAME=FIRST-LAST, as shallow=0-5")
        name, first, last = match.groups()
        found.append(Region(name, int(first), int(last or first)))
    return tuple(found)


def find_region(regions: Sequence[Region], name: str) -> Region:
    """The region of that name. Raises ValueError for one that is not there."""
    for region in regions:
        if region.name == name:
            return region
    there = ", ".join(str(r) for r in regions)
    raise ValueError(f"region {name[:40]!r} is not known; the model has {there}")
