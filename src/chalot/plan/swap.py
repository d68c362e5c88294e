"""What storing some tensors otherwise does to the model: its true KL on a text, the rest as it was.

The source computes in its own numbers. Its hidden states before every layer are kept, so that a
swap runs only from its layer on. A text is windows of one cache page each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from chalot.evaluate.quality import log_softmax
from chalot.formats.myai import MyaiFile
from chalot.kernels.backend import Backend
from chalot.kernels.program import PAGE, Batch, Program
from chalot.model.cache import PageCache
from chalot.model.cache import Sequence as Place
from chalot.model.calibration import layer_inputs
from chalot.model.layers import TensorSpec, model_tensors
from chalot.model.transformer import Weights, build, build_from, build_layer
from chalot.quant.grids import tables_of
from chalot.quant.packing import Matrix, numbers, pack_dense
from chalot.quant.scheme import SCHEMES, Scheme
from chalot.reading import read_frequencies, read_model_config, read_weights

Floats = NDArray[np.float32]
MEMORY = 256 << 20  # bytes of the source's probabilities that are kept
MOST_TOKENS = 2048


@dataclass(frozen=True)
class Item:
    """Tensors that are stored alike, as one product reads them. `layer` is -1 for the embedding."""

    name: str
    layer: int
    tensors: tuple[TensorSpec, ...]

    @property
    def weights(self) -> int:
        """Of all its tensors."""
        return sum(t.shape[0] * t.shape[1] for t in self.tensors)


TOGETHER = {"query": "qkv", "key": "qkv", "value": "qkv", "gate": "gate, up", "up": "gate, up"}


def items_of(specs: Iterable[TensorSpec], apart: bool = False) -> list[Item]:
    """The matrices of a model in groups that move together, in the order of a forward pass.

    With `apart` each is an item of its own.
    """
    together = {} if apart else TOGETHER
    groups: dict[tuple[str, int], list[TensorSpec]] = {}
    layers = 0
    for spec in specs:
        if spec.kind == "vector":
            continue
        parts = spec.name.split(".")
        layer = int(parts[1]) if parts[0] == "layers" else -1
        layers = max(layers, layer + 1)
        name = ".".join([*parts[:-1], together.get(parts[-1], parts[-1])])
        groups.setdefault((name, layers if name == "head" else layer), []).append(spec)
    return [Item(name, layer, tuple(found)) for (name, layer), found in groups.items()]


def as_hidden(states: Floats) -> Matrix:
    """Hidden states as an embedding of as many tokens."""
    scheme = SCHEMES["f32"]
    return Matrix(scheme, (states.shape[0], states.shape[1]), pack_dense(states, scheme))


def stored(backend: Backend, rows: Floats, scheme: Scheme) -> Matrix:
    """Some rows as a scheme stores them."""
    shape = (rows.shape[0], rows.shape[1])
    if not scheme.is_coded:
        return Matrix(scheme, shape, pack_dense(rows, scheme))
    return Matrix(scheme, shape, backend.encode(rows, scheme), tables_of(scheme))


class Swaps:
    """The source on a text, and how far it moves when tensors are swapped."""

    def __init__(
        self, file: MyaiFile, backend: Backend, ids: Sequence[int], apart: bool = False
    ) -> None:
        """`file` holds the source in its own numbers; `ids` are cut to whole windows.

        `apart` is as for `items_of`.
        """
        self.file, self.backend = file, backend
        self.config = read_model_config(file)
        self.weights = read_weights(file, self.config, None)
        self.frequencies = read_frequencies(file, self.config)
        self.items = items_of(model_tensors(self.config), apart)
        room = min(MOST_TOKENS, max(PAGE, MEMORY // (4 * self.config.vocabulary)))
        count = max(1, min(len(ids), room) // PAGE)
        size = min(PAGE, len(ids))
        self.windows, self.size = count, size
        self.ids = np.array(ids[: count * size], np.int32)
        self.hidden: list[Floats] = []
        self.inputs: list[dict[str, Floats]] = []  # by layer: what its matrices are multiplied with
        self._through_the_layers()
        logits = self._run(self._program(self.weights), self.ids)
        self.base = log_softmax(logits).astype(np.float32)

    def _through_the_layers(self) -> None:
        embedding = self.weights.matrices["embedding"]
        states = rows_of(embedding, self.ids) * np.float32(self.config.embedding_scale)
        for i in range(self.config.layers):
            self.hidden.append(states)
            program, slots = build_layer(
                self.config, self.weights, i, as_hidden(states), self.frequencies
            )
            runnable = self.backend.compile(program)
            batch, cache = self._batch(program, np.arange(len(states), dtype=np.int32), False)
            runnable.run(batch, cache.arena)
            layer = runnable, slots
            self.inputs.append(layer_inputs(self.config, self.weights, i, layer, states))
            states = runnable.slot(slots["hidden"], len(states))
        self.hidden.append(states)

    def _program(self, weights: Weights) -> Program:
        return build(self.config, weights, self.frequencies, "f32")

    def _program_from(self, first: int, weights: Weights) -> Program:
        hidden = as_hidden(self.hidden[first])
        return build_from(self.config, weights, first, hidden, 1.0, self.frequencies, "f32")

    def _batch(
        self, program: Program, tokens: NDArray[np.int32], wanted: bool
    ) -> tuple[Batch, PageCache]:
        n = len(tokens)
        cache = PageCache(program.cache, self.windows * PAGE)
        places = [Place(cache) for _ in range(self.windows)]
        for place in places:
            place.reserve(self.size)
        line = np.arange(n, dtype=np.int32)
        rows = line if wanted else line[:0]
        batch = Batch(tokens, line % self.size, line // self.size, cache.tables(places), rows)
        return batch, cache

    def _run(self, program: Program, tokens: NDArray[np.int32]) -> Floats:
        batch, cache = self._batch(program, tokens, True)
        return self.backend.compile(program).run(batch, cache.arena)

    def floats(self, name: str) -> Floats:
        """A tensor (rows, columns) of the source."""
        matrix = self.weights.matrices[name]
        return np.ascontiguousarray(numbers(matrix)[:, : matrix.shape[1]])

    def encoded(self, item: Item, scheme: Scheme) -> dict[str, Matrix]:
        """An item's tensors as the scheme stores them."""
        return {t.name: stored(self.backend, self.floats(t.name), scheme) for t in item.tensors}

    def kl(
        self,
        swapped: Mapping[str, Matrix],
        vectors: Mapping[str, Floats] | None = None,
        planes: Mapping[str, int] | None = None,
    ) -> float:
        """Mean KL (nats a token) from the source to itself with these tensors instead.

        `planes` are of the activations of what is swapped: the source's plan, unless given.
        """
        return float(np.mean(self.kl_by_window(swapped, vectors, planes)))

    def kl_by_window(
        self,
        swapped: Mapping[str, Matrix],
        vectors: Mapping[str, Floats] | None = None,
        planes: Mapping[str, int] | None = None,
    ) -> list[float]:
        """The mean of each window: see `kl`."""
        weights = replace(
            self.weights,
            matrices={**self.weights.matrices, **swapped},
            vectors={**self.weights.vectors, **(vectors or {})},
            planes={**self.weights.planes, **(self._planes(swapped) if planes is None else planes)},
        )
        first = min(layer_of(name, self.config.layers) for name in swapped)
        if first < 0:
            logits = self._run(self._program(weights), self.ids)
        else:
            program = self._program_from(first, weights)
            logits = self._run(program, np.arange(len(self.ids), dtype=np.int32))
        out = []
        for at in range(0, len(logits), self.size):
            p = self.base[at : at + self.size].astype(np.float64)
            q = log_softmax(logits[at : at + self.size])
            out.append(float((np.exp(p) * (p - q)).sum()) / len(p))
        return out

    def _planes(self, swapped: Mapping[str, Matrix]) -> dict[str, int]:
        """Bits of activations as converting chose them, of what is coded."""
        entries = self.file.manifest.tensors
        return {n: entries[n].activation // 8 for n, m in swapped.items() if m.scheme.is_coded}


def layer_of(name: str, layers: int) -> int:
    """From which layer on a tensor matters: -1 for the embedding, all of them for the head."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else layers if name == "head" else -1


def rows_of(matrix: Matrix, ids: NDArray[np.int32]) -> Floats:
    """Rows of a dense matrix by number."""
    return np.ascontiguousarray(numbers(matrix)[ids, : matrix.shape[1]])
