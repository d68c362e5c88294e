"""What scheme keeps a source in codes best, and what a user is told of coarse or repeated codes."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from chalot.formats.checkpoint import TensorInfo
from chalot.formats.names import hugging_face
from chalot.model.config import ModelConfig
from chalot.model.layers import model_tensors
from chalot.quant.scheme import Scheme

LOST = 0.01  # relative squared error; weights that had few values already stay far below
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


def coarse_note(
    schemes: Mapping[str, Scheme], errors: Mapping[str, tuple[float, float]]
) -> Iterator[str]:
    """A line where weights of many values were given 1 or 2 bits; `errors` are (lost, had)."""
    lossy = {
        str(s): 0.0
        for name, s in schemes.items()
        if s.is_coarse and errors[name][0] > LOST * errors[name][1]
    }
    if lossy:
        lost = [errors[name] for name, s in schemes.items() if str(s) in lossy]
        share = sum(e for e, _ in lost) / max(sum(had for _, had in lost), 1e-30)
        yield (
            f"{', '.join(lossy)}: meant for models that were trained for it; these weights were "
            f"not, and {share:.0%} of them is lost (relative squared error), so the text will make "
            "little sense. nl4 and int8 suit any model."
        )


def notes(
    path: Path, tensors: Mapping[str, TensorInfo], schemes: Mapping[str, Scheme]
) -> Iterator[str]:
    """A line on what becomes of a source in codes; none for a source of numbers."""
    types: set[str] = set()
    again: set[str] = set()
    for name, scheme in schemes.items():
        info = tensors[hugging_face(name)]
        if info.scheme:
            types.add(info.dtype)
            again |= {f"{info.dtype} to {scheme}"} if scheme.is_coded else set()
    if types:
        what = "what that lost stays lost"
        if again:
            what = f"quantising them again ({', '.join(sorted(again))}) adds to what that lost"
        yield f"{path}: its weights are {', '.join(sorted(types))} already; {what}"
