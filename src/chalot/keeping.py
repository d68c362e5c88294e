"""Sources in codes already: the scheme that loses least of each tensor, and what is said of it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from chalot.formats.checkpoint import TensorInfo
from chalot.formats.names import hugging_face
from chalot.model.config import ModelConfig
from chalot.model.layers import model_tensors
from chalot.quant.scheme import Scheme

KEEP = "keep"  # as a scheme: each tensor in codes goes to the one that its reader names


def usual(source: str | Path, default: str) -> str:
    """The scheme when none is asked for: `default` for folders and hub ids, "keep" for files."""
    return KEEP if Path(source).expanduser().is_file() else default


def kept(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> dict[str, Scheme]:
    """The scheme of each matrix that is in codes, by chalot's name; numbers have none."""
    found = {}
    for spec in model_tensors(config):
        info = tensors.get(hugging_face(spec.name))
        if info is not None and info.scheme and spec.kind != "vector":
            found[spec.name] = Scheme.parse(info.scheme)
    if "embedding" in found:
        found.setdefault("head", found["embedding"])  # as without "keep"; a tied head has no other
    return found


def notes(
    path: Path, tensors: Mapping[str, TensorInfo], becomes: Mapping[str, str | None]
) -> Iterator[str]:
    """A line on what becomes of a source in codes; none for a source of numbers.

    `becomes` has each matrix's new type, by chalot's name; None for a type of plain numbers.
    """
    types: set[str] = set()
    again: set[str] = set()
    for name, kind in becomes.items():
        info = tensors[hugging_face(name)]
        if info.scheme:
            types.add(info.dtype)
            again |= {f"{info.dtype} to {kind}"} if kind else set()
    if types:
        what = "what that lost stays lost"
        if again:
            what = f"quantising them again ({', '.join(sorted(again))}) adds to what that lost"
        yield f"{path}: its weights are {', '.join(sorted(types))} already; {what}"
