"""A mixture with fewer experts: of each layer those that a text takes most; the router as before.

The text goes through the source's own weights, a layer at a time, and each layer's router says
which experts it would take. Which experts stay is written nowhere but in the weights; what that
costs, `chalot eval --against` says. Whoever prunes changes the model: nothing here does it unasked.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.checking import check_shapes, read_config
from chalot.errors import SchemeError
from chalot.formats.checkpoint import Checkpoint, TensorInfo
from chalot.formats.documents import parse_json
from chalot.formats.names import hugging_face
from chalot.formats.view import CheckpointView
from chalot.kernels.backend import Backend
from chalot.kernels.reference import route
from chalot.model.calibration import Calibration, dense
from chalot.model.config import ModelConfig, inverse_frequencies
from chalot.model.experts import COUNTS
from chalot.model.layers import model_tensors
from chalot.quant.scheme import SCHEMES
from chalot.unfolding import Rows

OPTION = "--experts"
Kept = Mapping[int, tuple[int, ...]]  # by layer, ascending


def check_count(config: ModelConfig, count: int) -> None:
    """Raise SchemeError where a model cannot be pruned to so many experts."""
    found = config.experts
    if found is None:
        raise SchemeError(f"{OPTION} {count}: the model has no experts; leave it out")
    if found.ones:
        raise SchemeError(
            f"{OPTION} {count}: these experts are slices of a dense model, none to be spared; "
            "leave it out, or let chalot upcycle choose others"
        )
    if not found.top <= count <= found.count:
        raise SchemeError(
            f"{OPTION} {count}: a token takes {found.top} of {found.count} experts; expected "
            f"{found.top} to {found.count}"
        )


def most_used(
    checkpoint: Checkpoint, config: ModelConfig, backend: Backend, ids: list[int], count: int
) -> Kept:
    """The `count` experts of each layer that most of these tokens take; of equals the lower."""
    rows, kept = Rows(checkpoint, config), {}
    hidden = np.concatenate([rows.read("embedding", i, i + 1) for i in ids])
    exact = {s.name: SCHEMES["f32"] for s in model_tensors(config)}
    scaled = hidden * np.float32(config.embedding_scale)
    states = Calibration(config, exact, backend, inverse_frequencies(config), scaled)
    for i in range(config.layers):
        inputs = states.layer(i, rows.read, SCHEMES["f32"])
        experts = config.experts_of(i)
        if experts is None:
            continue
        router = dense(rows.read(f"layers.{i}.router"))
        scores = backend.product(router, inputs["feed-forward input"], 1)
        taken = (route("chosen", experts.top, scores) != -1).sum(axis=0)
        kept[i] = tuple(sorted(np.argsort(-taken, kind="stable")[:count].tolist()))
    return kept


class PrunedCheckpoint(CheckpointView):
    """A `Checkpoint` over another, with some of each layer's experts, counted anew from 0."""

    def __init__(self, held: Checkpoint, config: ModelConfig, kept: Kept) -> None:
        super().__init__(held, {})
        self.count = len(next(iter(kept.values())))
        names: dict[str, str] = {}
        routers: dict[str, tuple[int, ...]] = {}
        gone = {hugging_face(s.name) for s in model_tensors(config) if ".experts." in s.name}
        for layer, experts in kept.items():
            for new, old in enumerate(experts):
                for part in ("gate", "up", "down"):
                    own = f"layers.{layer}.experts.{{}}.{part}"
                    names[hugging_face(own.format(new))] = hugging_face(own.format(old))
            routers[hugging_face(f"layers.{layer}.router")] = experts
        names |= {n: n for n in held.tensors if n not in gone}
        self.names, self.routers = names, routers
        same = getattr(held, "aliases", {})  # of a Checkpoint that knows such
        first: dict[str, str] = {}
        self.aliases: dict[str, str] = {}  # of those that are left, to another of them
        for name, source in names.items():
            of = first.setdefault(same.get(source, source), name)
            if of != name:
                self.aliases[name] = of
        self.infos = {n: self._info(n) for n in names}

    def _info(self, name: str) -> TensorInfo:
        info = self.held.tensors[self.names[name]]._replace(name=name)
        if name in self.routers:
            rows = info.shape[0]
            few = info.nbytes // rows * self.count
            return info._replace(shape=(self.count, *info.shape[1:]), nbytes=few)
        return info

    def raw(self, name: str) -> NDArray[Any]:
        """See Checkpoint."""
        found = self.held.raw(self.names.get(name, name))
        return found[list(self.routers[name])] if name in self.routers else found

    def float32(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """See Checkpoint."""
        if name not in self.routers:
            return self.held.float32(self.names.get(name, name), first, last)
        rows = np.arange(self.count)[first : self.count if last is None else last]
        of_all = self.held.float32(name)
        return of_all[[self.routers[name][i] for i in rows]]

    def document(self, name: str) -> bytes | None:
        """See Checkpoint; config.json says how many experts are left."""
        raw = self.held.document(name)
        if raw is None or name != "config.json":
            return raw
        config = parse_json(raw, f"{self.path}: config.json")
        keys = [k for k in COUNTS if config.get(k) is not None] or [COUNTS[0]]
        return json.dumps(config | dict.fromkeys(keys, self.count), indent=1).encode()


def pruned(checkpoint: Checkpoint, count: int, backend: Backend, ids: list[int]) -> Checkpoint:
    """The checkpoint with the `count` most used experts of each layer.

    Raises SchemeError where that cannot be, FormatError where it contradicts its configuration.
    """
    config = read_config(checkpoint)
    check_count(config, count)
    assert config.experts is not None
    if count == config.experts.count:
        return checkpoint
    check_shapes(config, checkpoint)
    return PrunedCheckpoint(checkpoint, config, most_used(checkpoint, config, backend, ids, count))
