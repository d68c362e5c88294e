"""Experts that are slices of a dense model's feed-forward: all of them together are the dense one.

    down(act(gate x) * up x) = sum over slices s of down[:, s](act(gate[s] x) * up[s] x)

Each slice counts whole, not by a softmax; no family of transformers says so, and so config.json
keeps the dense family and adds `chalot_slices` (model/experts.py).
"""

import json
from collections.abc import Callable, Mapping

import numpy as np

from chalot.calibration_text import CalibrationText
from chalot.checking import RUN, check_shapes, read_config
from chalot.errors import UnsupportedError, WeightError
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.floats import float32_to_bf16
from chalot.formats.names import hugging_face
from chalot.kernels.backend import Backend
from chalot.kernels.program import PAGE
from chalot.model.calibration import Calibration
from chalot.model.config import ModelConfig, inverse_frequencies
from chalot.model.experts import SLICES
from chalot.model.layers import model_tensors
from chalot.quant.fold import column_sums
from chalot.quant.packing import DENSE
from chalot.quant.scheme import SCHEMES
from chalot.unfolding import Rows
from chalot.upcycle.choosing import Chosen, Indices, choose
from chalot.upcycle.copies import refuse_mixture, settings_of
from chalot.upcycle.settings import Settings
from chalot.upcycle.view import PARTS, Floats, View, dense_name, numbers

MOST, LEAST = 64, 8  # windows of PAGE tokens; more choose better
ROOM = 128_000_000  # bytes of what is kept of the text
Progress = Callable[[str, int, int], None]


def windows(text: CalibrationText, checkpoint: Checkpoint, config: ModelConfig) -> list[int]:
    """The text's first tokens, in whole windows. Raises as `CalibrationText.ids`."""
    each = PAGE * (3 * config.feed_forward + 8 * config.hidden)  # shares, marks; inputs, states
    ids = text.ids(checkpoint, config, PAGE)
    return ids[: min(len(ids) // PAGE, MOST, max(LEAST, ROOM // each)) * PAGE]


def choose_all(
    checkpoint: Checkpoint,
    config: ModelConfig,
    asked: Settings,
    ids: list[int],
    backend: Backend,
    progress: Progress,
) -> list[Chosen]:
    """The slices of every layer, as the text goes through one layer after another.

    In memory are one layer, and of the text what ROOM is for.
    """
    rows = Rows(checkpoint, config)
    hidden = np.concatenate([rows.read("embedding", i, i + 1) for i in ids])
    hidden *= np.float32(config.embedding_scale)
    x = np.empty((len(ids), config.hidden), np.float32)
    shares = np.empty((len(ids), config.feed_forward), np.uint16)
    lengths, done = np.zeros(0, np.float32), 0

    def read(name: str) -> Floats:
        nonlocal lengths
        values = rows.read(name)
        if not np.isfinite(values).all():
            raise WeightError(
                f"{checkpoint.path}: tensor {hugging_face(name)} has NaN or Inf among its weights; "
                "take another checkpoint"
            )
        if name.endswith(".down"):
            lengths = np.sqrt(column_sums(values.astype(np.float64) ** 2)).astype(np.float32)
        return values

    def watch(slots: Mapping[str, Floats]) -> None:
        nonlocal done
        inner = slots["feed-forward inner"]
        here = slice(done % len(ids), done % len(ids) + len(inner))
        x[here] = slots["feed-forward input"]
        shares[here] = float32_to_bf16(np.abs(inner) * lengths)
        done += len(inner)

    schemes = {s.name: SCHEMES["f32"] for s in model_tensors(config)}
    frequencies = inverse_frequencies(config)
    states = Calibration(config, schemes, backend, frequencies, hidden, watch=watch)
    chosen = []
    for i in range(config.layers):
        types = {checkpoint.tensors[dense_name(i, part)].dtype for part in PARTS}
        dtype = types.pop()
        states.layer(i, read, SCHEMES[dtype if not types and dtype in DENSE else "f32"])
        chosen.append(choose(x, shares, asked.shared, asked.routed, backend))
        progress(f"layers.{i}", i + 1, config.layers)
    return chosen


class Slices(View):
    """A dense checkpoint as slices of its feed-forwards."""

    def __init__(
        self,
        source: Checkpoint,
        asked: Settings,
        text: CalibrationText,
        backend: Backend,
        progress: Progress,
    ) -> None:
        """Raises FormatError for a checkpoint that is not whole, UnsupportedError, UpcycleError."""
        config = read_config(source)
        refuse_mixture(source, config)
        check_shapes(config, source)
        if config.feed_forward_bias or config.inner_norms or config.post_norms:
            raise UnsupportedError(
                f"{source.path}: a feed-forward with biases, or norms inside or behind it "
                f"({config.family}), cannot be sliced"
            )
        width = asked.width(config.feed_forward)
        said = settings_of(source)
        said[SLICES] = {"routed": asked.routed, "shared": asked.shared, "top_k": asked.top}
        super().__init__(source, json.dumps(said, indent=2).encode())
        ids = windows(text, source, config)
        self.chosen = choose_all(source, config, asked, ids, backend, progress)
        self.places: dict[str, tuple[str, Indices]] = {}  # a slice's tensor -> dense one, columns
        self.routers: dict[str, Floats] = {}
        dense = {dense_name(i, p) for i in range(config.layers) for p in PARTS}
        self.infos |= {n: info for n, info in source.tensors.items() if n not in dense}
        for i, found in enumerate(self.chosen):
            p = f"model.layers.{i}.mlp."
            self.routers[p + "gate.weight"] = found.router
            slices = {f"{p}experts.{e}.": g for e, g in enumerate(found.groups)}
            if asked.shared:
                slices[p + "shared_expert."] = found.shared
            for at, columns in slices.items():
                for part in PARTS:
                    self._slice(at + PARTS[part] + ".weight", dense_name(i, part), columns)
        self.infos |= {n: numbers(n, router.shape) for n, router in self.routers.items()}
        assert all(len(g) == width for c in self.chosen for g in c.groups)

    def _slice(self, name: str, dense: str, columns: Indices) -> None:
        info = self.held.tensors[dense]
        rows, width = info.shape
        shape = (rows, len(columns)) if is_down(dense) else (len(columns), width)
        part = info.nbytes * len(columns) // (width if is_down(dense) else rows)
        self.infos[name] = info._replace(name=name, shape=shape, nbytes=part)
        self.places[name] = dense, columns

    def rows(self, name: str, first: int, last: int) -> Floats:
        """Rows of a tensor that is there."""
        if name in self.routers:
            return self.routers[name][first:last].copy()
        if name not in self.places:
            return super().rows(name, first, last)
        dense, columns = self.places[name]
        if is_down(dense):
            out = np.empty((last - first, len(columns)), np.float32)
            size = max(1, RUN // self.held.tensors[dense].shape[1])
            for at in range(first, last, size):
                some = self.held.float32(dense, at, min(at + size, last))
                out[at - first : at - first + size] = some[:, columns]
            return out
        wanted = columns[first:last]
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1  # runs of neighbours are read at once
        runs = [r for r in np.split(wanted, breaks) if len(r)]
        found = [self.held.float32(dense, int(r[0]), int(r[-1]) + 1) for r in runs]
        return np.concatenate(found) if found else np.zeros((0, self.infos[name].shape[1]), "f4")


def is_down(name: str) -> bool:
    """Whether a dense tensor's slices are of its columns."""
    return name.endswith(f"{PARTS['down']}.weight")
