"""What scheme keeps a source in codes best, and what a user is told of coarse or repeated codes.

What such a source holds in numbers, an embedding beside BitNet's ternary matrices, goes to int8: a
hundredth of what nl4 loses, at half of bf16's bytes, which would be more than all that is ternary.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from chalot.errors import ChalotError
from chalot.formats.checkpoint import TensorInfo, open_checkpoint
from chalot.formats.names import hugging_face
from chalot.model.config import ModelConfig
from chalot.model.layers import model_tensors
from chalot.quant.scheme import Scheme

LOST = 0.01  # relative squared error; weights that had few values already stay far below
KEEP = "keep"  # as a scheme: each tensor in codes goes to the one that its reader names
BESIDE = "int8"  # of numbers beside codes


def in_codes(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether any tensor is quantised already."""
    return any(info.scheme for info in tensors.values())


def usual(source: str | Path, default: str) -> str:
    """The scheme when none is asked for: "keep" for files and for folders in codes, else `default`.

    Reads headers. What is not here yet, or cannot be read, is given `default`: who opens it says
    why.
    """
    path = Path(source).expanduser()
    if path.is_file() or path.suffix == ".gguf":  # of the hub
        return KEEP
    if not path.is_dir():
        return default
    try:
        checkpoint = open_checkpoint(path)
    except (ChalotError, OSError):
        return default
    try:
        return usual_of(checkpoint.tensors, default)
    finally:
        checkpoint.close()


def usual_of(tensors: Mapping[str, TensorInfo], default: str) -> str:
    """As `usual`, of what is known by its tensors."""
    return KEEP if in_codes(tensors) else default


def keeps(info: TensorInfo, scheme: Scheme) -> bool:
    """Whether a scheme of few values has the source's own: no column may be scaled on the way."""
    return scheme.is_coarse and info.scheme == str(scheme)


def kept(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, ours: bool = False
) -> dict[str, Scheme]:
    """The scheme of each matrix of a source in codes, by chalot's name; none of one in numbers.

    A file of `ours`, whose numbers were chosen, keeps them too; routers stay numbers everywhere.
    """
    found: dict[str, Scheme] = {}
    if not (ours or in_codes(tensors)):
        return found
    for spec in model_tensors(config):
        info = tensors.get(hugging_face(spec.name))
        if info is None or spec.kind == "vector":
            continue
        if info.scheme or ours:
            found[spec.name] = Scheme.parse(info.scheme or info.dtype)
        elif spec.kind != "router":
            found[spec.name] = Scheme.parse(BESIDE)
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
    path: Path, tensors: Mapping[str, TensorInfo], becomes: Mapping[str, str | None]
) -> Iterator[str]:
    """A line on what becomes of a source in codes; none for a source of numbers.

    `becomes` has each matrix's new type, by chalot's name; None: not quantised, or not again.
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
