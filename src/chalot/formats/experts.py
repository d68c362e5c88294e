"""Experts of a Hugging Face folder, one by one and by one name, however the files hold them.

    mlp.experts.E.gate_proj, up_proj, down_proj    Qwen's and OLMoE's: the names that are given here
    block_sparse_moe.experts.E.w1, w3, w2          Mixtral's; its router is block_sparse_moe.gate
    mlp.experts.gate_up_proj (E, 2 width, hidden)  all in one, as transformers 5 keeps them; gate
    mlp.experts.down_proj (E, hidden, width)       is the upper half of the rows

Source: transformers 5, conversion_mapping.py.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError
from chalot.formats.checkpoint import Checkpoint, TensorInfo
from chalot.formats.files import quoted
from chalot.formats.floats import widened

MIXTRAL = ".block_sparse_moe."
WEIGHTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
OF_MIXTRAL = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
STACKED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)")
MOST = 1 << 17  # experts of all stacks: what is listed stays small


class Place(NamedTuple):
    """Where a tensor is: in which of the file's, and the rows of it where that is a stack."""

    name: str
    first: int = 0


def one_name(name: str) -> str:
    """Mixtral's names as Qwen's; others stay."""
    found = OF_MIXTRAL.fullmatch(name)
    if found:
        layer, expert, weight = found.groups()
        return f"{layer}.mlp.experts.{expert}.{WEIGHTS[weight]}.weight"
    return name.replace(MIXTRAL, ".mlp.") if name.endswith(".gate.weight") else name


def one_by_one(
    tensors: Mapping[str, TensorInfo], where: object
) -> Iterator[tuple[str, TensorInfo, Place]]:
    """Every tensor by one name, stacks as their experts, and where it is.

    Raises FormatError for a stack that is none, or two tensors of one name.
    """
    listed = 0
    seen: set[str] = set()
    for held, info in tensors.items():
        stack = STACKED.fullmatch(held)
        if stack is None:
            names, shapes, step = [one_name(held)], [info.shape], 0
        else:
            names, shapes, step = _of_stack(stack[1], stack[2], info, where)
        listed += len(names)
        if listed > len(tensors) + MOST:
            raise FormatError(f"{where}: found more than {MOST:,} experts; damaged file?")
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            if name in seen:
                raise FormatError(f"{where}: holds tensor {quoted(name)} twice, by two names")
            seen.add(name)
            whole = 1 if stack is None else max(int(np.prod(info.shape)), 1)
            part = info.nbytes if stack is None else info.nbytes * int(np.prod(shape)) // whole
            made = info._replace(name=name, shape=shape, nbytes=part)
            yield name, made, Place(held, i * step)


def _of_stack(
    at: str, kind: str, info: TensorInfo, where: object
) -> tuple[list[str], list[tuple[int, ...]], int]:
    """Names and shapes of the matrices in a stack, and the rows from one to the next."""
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
    return names, [(step, columns)] * len(names), step


class ExpertsOneByOne:
    """A `Checkpoint` over another whose experts have other names, or lie in stacks."""

    def __init__(self, held: Checkpoint) -> None:
        """Raises FormatError as `one_by_one`."""
        self.held = held
        self.path: Path = held.path
        self._tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, Place] = {}
        for name, info, place in one_by_one(held.tensors, held.path):
            self._tensors[name], self._places[name] = info, place

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, each expert's own among them; read-only."""
        return MappingProxyType(self._tensors)

    def _rows(self, name: str, first: int, last: int | None) -> tuple[str, int, int | None]:
        """The tensor that holds it, and the rows there, stacks laid out as one matrix."""
        if name not in self._places:
            raise FormatError(f"{self.path}: has no tensor {quoted(name)}")
        place, rows = self._places[name], self._tensors[name].shape[0]
        if STACKED.fullmatch(place.name) is None:
            return place.name, first, last
        last = rows if last is None else last
        if not 0 <= first <= last <= rows:
            raise IndexError(f"{name}: rows {first}:{last} of {rows}")
        return place.name, place.first + first, place.first + last

    def raw(self, name: str) -> NDArray[Any]:
        """See Checkpoint."""
        held, first, last = self._rows(name, 0, None)
        found = self.held.raw(held)
        if STACKED.fullmatch(held) is None:
            return found
        return found.reshape(-1, found.shape[-1])[first:last]

    def float32(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """See Checkpoint."""
        held, start, end = self._rows(name, first, last)
        if STACKED.fullmatch(held) is None:
            return self.held.float32(held, start, end)
        stack = self.held.raw(held)
        return widened(stack.reshape(-1, stack.shape[-1])[start:end]).astype(np.float32)

    def document(self, name: str) -> bytes | None:
        """See Checkpoint."""
        return self.held.document(name)

    def check_unchanged(self) -> None:
        """See Checkpoint."""
        self.held.check_unchanged()

    def close(self) -> None:
        """See Checkpoint."""
        self.held.close()


def is_other(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether some experts have other names, or lie in stacks."""
    return any(MIXTRAL in name or STACKED.fullmatch(name) for name in tensors)


def expert_by_expert(held: Checkpoint) -> Checkpoint:
    """The checkpoint with its experts one by one; itself where they are so already."""
    return ExpertsOneByOne(held) if is_other(held.tensors) else held


def listed(tensors: Mapping[str, TensorInfo], where: object) -> Mapping[str, TensorInfo]:
    """Tensors of headers as `expert_by_expert` gives them."""
    if not is_other(tensors):
        return tensors
    return {name: info for name, info, _ in one_by_one(tensors, where)}
