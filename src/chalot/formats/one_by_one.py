"""Matrices of a Hugging Face folder, one by one and by one name, however the files hold them.

    mlp.experts.E.gate_proj, up_proj, down_proj    Qwen's and OLMoE's: the names that are given here
    block_sparse_moe.experts.E.w1, w3, w2          Mixtral's; its router is block_sparse_moe.gate
    mlp.experts.gate_up_proj (E, 2 width, hidden)  all in one, as transformers 5 keeps them; gate
    mlp.experts.down_proj (E, hidden, width)       is the upper half of the rows
    self_attn.qkv_proj, mlp.gate_up_proj           Phi-3's: rows of q, k and v, of gate and up

Sources: transformers 5, conversion_mapping.py; models/phi3/modeling_phi3.py.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError
from chalot.formats.checkpoint import Checkpoint, TensorInfo
from chalot.formats.files import quoted
from chalot.formats.floats import widened
from chalot.formats.view import CheckpointView

MIXTRAL = ".block_sparse_moe."
WEIGHTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
OF_MIXTRAL = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
GIVEN = re.compile(r"(model\.layers\.\d+)\.mlp\.(?:experts\.(\d+)\.(\w+_proj)|gate)\.weight")
STACKED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)")
FUSED = re.compile(r"(model\.layers\.\d+)\.(self_attn\.qkv_proj|mlp\.gate_up_proj)\.weight")
FUSED_INTO = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
FUSED_INTO |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")
MOST = 1 << 17  # experts of all stacks: what is listed stays small


class Place(NamedTuple):
    """Where a matrix is: in which tensor of the file's, and which rows of it; None: all of it."""

    name: str
    shape: tuple[int, ...]
    first: int | None = None


def one_name(name: str) -> str:
    """Mixtral's names as Qwen's; others stay."""
    found = OF_MIXTRAL.fullmatch(name)
    if found:
        layer, expert, weight = found.groups()
        return f"{layer}.mlp.experts.{expert}.{WEIGHTS[weight]}.weight"
    return name.replace(MIXTRAL, ".mlp.") if name.endswith(".gate.weight") else name


def name_of_family(name: str, family: str) -> str:
    """The tensor of a family's own files that a matrix lies in: alone, but for Phi-3's."""
    if family == "phi3":
        *at, part, kind = ["", *name.split(".")]
        return ".".join([*at, FUSED_INTO.get(part, part), kind])[1:]
    found = GIVEN.fullmatch(name) if family == "mixtral" else None
    if found is None:
        return name
    layer, expert, part = found.groups()
    if expert is None:
        return f"{layer}{MIXTRAL}gate.weight"
    weight = next(w for w, given in WEIGHTS.items() if given == part)
    return f"{layer}{MIXTRAL}experts.{expert}.{weight}.weight"


def one_by_one(
    tensors: Mapping[str, TensorInfo], where: object
) -> Iterator[tuple[str, TensorInfo, Place]]:
    """Every tensor by one name, stacks as their experts, fused matrices as their parts.

    Raises FormatError for a stack that is none, or two tensors of one name.
    """
    listed = 0
    seen: set[str] = set()
    for held, info in tensors.items():
        if stack := STACKED.fullmatch(held):
            parts = _of_stack(stack[1], stack[2], info, where)
        elif FUSED.fullmatch(held):
            parts = _of_fused(held, tensors, where)
        else:
            parts = [(one_name(held), Place(held, info.shape))]
        listed += len(parts)
        if listed > 3 * len(tensors) + MOST:
            raise FormatError(f"{where}: found more than {MOST:,} experts; damaged file?")
        numbers = max(math.prod(info.shape), 1)
        for name, place in parts:
            if name in seen:
                raise FormatError(f"{where}: holds tensor {quoted(name)} twice, by two names")
            seen.add(name)
            nbytes = info.nbytes * math.prod(place.shape) // numbers
            nbytes = info.nbytes if place.first is None else nbytes
            yield name, info._replace(name=name, shape=place.shape, nbytes=nbytes), place


def _of_stack(at: str, kind: str, info: TensorInfo, where: object) -> list[tuple[str, Place]]:
    """The matrices in a stack, which counts as one matrix of all their rows."""
    pair = kind == "gate_up_proj"
    if len(info.shape) != 3 or (pair and info.shape[1] % 2):
        raise FormatError(
            f"{where}: tensor {quoted(info.name)} has shape {info.shape[:4]}, expected (experts, "
            f"{'twice their width, hidden' if pair else 'hidden, their width'})"
        )
    count, rows, columns = info.shape
    if count > MOST:
        raise FormatError(f"{where}: tensor {quoted(info.name)} has {count} experts; damaged file?")
    parts = ("gate_proj", "up_proj") if pair else ("down_proj",)
    step = rows // len(parts)
    names = [f"{at}.{e}.{part}.weight" for e in range(count) for part in parts]
    return [(n, Place(info.name, (step, columns), i * step)) for i, n in enumerate(names)]


def _of_fused(
    held: str, tensors: Mapping[str, TensorInfo], where: object
) -> list[tuple[str, Place]]:
    """The parts of a matrix of Phi-3's; how many rows q has, its o_proj's columns say."""
    shape, at = tensors[held].shape, held.rsplit(".", 2)[0]
    rows = shape[0] if len(shape) == 2 else 0
    if held.endswith("qkv_proj.weight"):
        output = tensors.get(f"{at}.o_proj.weight")
        q = output.shape[-1] if output is not None and len(output.shape) == 2 else 0
        parts = {"q_proj": q, "k_proj": (rows - q) // 2, "v_proj": (rows - q) // 2}
    else:
        parts = {"gate_proj": rows // 2, "up_proj": rows // 2}
    if min(parts.values()) < 1 or sum(parts.values()) != rows:
        raise FormatError(
            f"{where}: tensor {quoted(held)} has shape {shape[:4]}, which {' and '.join(parts)} do "
            "not fill"
        )
    first, out = 0, []
    for name, size in parts.items():
        out.append((f"{at}.{name}.weight", Place(held, (size, shape[1]), first)))
        first += size
    return out


class OneByOne(CheckpointView):
    """A `Checkpoint` over another whose matrices have other names, or lie in one."""

    def __init__(self, held: Checkpoint) -> None:
        """Raises FormatError as `one_by_one`."""
        found = list(one_by_one(held.tensors, held.path))
        super().__init__(held, {name: info for name, info, _ in found})
        self._places = {name: place for name, _, place in found}

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise FormatError(f"{self.path}: has no tensor {quoted(name)}")
        return self._places[name]

    def raw(self, name: str) -> NDArray[Any]:
        """See Checkpoint."""
        place = self._place(name)
        found = self.held.raw(place.name)
        if place.first is None:
            return found
        return found.reshape(-1, found.shape[-1])[place.first :][: place.shape[0]]

    def float32(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """See Checkpoint."""
        place = self._place(name)
        if place.first is None:
            return self.held.float32(place.name, first, last)
        last = self.end(name, first, last)
        if STACKED.fullmatch(place.name) is None:
            return self.held.float32(place.name, place.first + first, place.first + last)
        return widened(self.raw(name)[first:last]).astype(np.float32)


def is_other(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether some matrices have other names, or lie in one."""
    return any(
        MIXTRAL in name or STACKED.fullmatch(name) or FUSED.fullmatch(name) for name in tensors
    )


def apart(held: Checkpoint) -> Checkpoint:
    """The checkpoint with its matrices one by one; itself where they are so already."""
    return OneByOne(held) if is_other(held.tensors) else held


def listed(tensors: Mapping[str, TensorInfo], where: object) -> Mapping[str, TensorInfo]:
    """Tensors of headers as `apart` gives them."""
    if not is_other(tensors):
        return tensors
    return {name: info for name, info, _ in one_by_one(tensors, where)}
