"""A model in pieces: runs of layers as programs of their own, which share one cache.

A piece begins from hidden states as the one before it left them, bit by bit: rows of a float32
matrix that it "embeds" times 1. So something may happen between two pieces: weights are fetched and
dropped, or a token leaves early. The operations are those of the whole model, in the same order,
and so is every bit of what they give.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from chalot.kernels.backend import Backend, Runnable
from chalot.kernels.program import Batch, CacheShape, Program
from chalot.model.config import ModelConfig
from chalot.model.transformer import Builder, Weights, head_input, head_name
from chalot.quant.packing import Matrix, aligned
from chalot.quant.scheme import PANEL, SCHEMES, round_up

ROWS = 256  # tokens that are handed over at once; a longer batch goes through in parts
NONE: NDArray[np.int32] = np.zeros(0, np.int32)


class Handover:
    """Hidden states between pieces: (ROWS, hidden) float32, and the same as an embedding."""

    def __init__(self, hidden: int) -> None:
        raw = aligned(ROWS * round_up(hidden, PANEL) * 4)
        self.rows: NDArray[np.float32] = raw.view(np.float32).reshape(ROWS, -1)[:, :hidden]
        self.matrix = Matrix(SCHEMES["f32"], (ROWS, hidden), raw)


@dataclass(frozen=True)
class Maker:
    """What all pieces of a model are made from."""

    config: ModelConfig
    weights: Weights
    inverse_frequency: NDArray[np.float32]
    cache: CacheShape  # of the whole model
    backend: Backend

    def piece(
        self, layers: range, given: Handover | None, head: str = "", vocabulary: int = 0
    ) -> "Piece":
        """Layers that begin from what is handed over, or from tokens; with logits by `head`."""
        b = self._begun(given)
        for i in layers:
            b.layer(i, i)
        if head:
            b.head(head)
        program = b.program(self.cache, self.inverse_frequency, vocabulary)
        found = head_input(program) if head else -1
        return self._made(program, layers, b.named["hidden"], found)

    def fill(self, layers: range, given: Handover) -> "Piece":
        """Keys and values of layers that tokens skip, from the hidden states handed over."""
        b = self._begun(given)
        for i in layers:
            b.fill(i)
        return self._made(b.program(self.cache, self.inverse_frequency), layers, b.named["hidden"])

    def _begun(self, given: Handover | None) -> Builder:
        b = Builder(self.config, self.weights)
        hidden = b.slot("hidden", self.config.hidden)
        if given is None:
            b.embed(hidden, self.weights.matrices["embedding"], self.config.embedding_scale)
        else:
            b.embed(hidden, given.matrix, 1.0)
        return b

    def _made(self, program: Program, layers: range, hidden: int, head_input: int = -1) -> "Piece":
        return Piece(self.backend.compile(program), hidden, layers, head_input)


@dataclass(frozen=True)
class Piece:
    """A compiled run of layers: `hidden` is the slot of the hidden states.

    `head_input` is that of what its head is multiplied with; -1 for a piece without one.
    """

    runnable: Runnable
    hidden: int
    layers: range
    head_input: int = -1

    def states(self, batch: Batch, arena: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(tokens, hidden) behind its layers."""
        self.runnable.run(replace(batch, wanted=NONE), arena)
        return self.runnable.slot(self.hidden, len(batch.tokens))


def handed(batch: Batch) -> Batch:
    """The batch for a piece that begins from hidden states: token t is row t."""
    return replace(batch, tokens=np.arange(len(batch.tokens), dtype=np.int32))


def parts(batch: Batch) -> Iterator[Batch]:
    """A batch in runs of ROWS tokens."""
    count = len(batch.tokens)
    if count <= ROWS:
        yield batch
        return
    for at in range(0, count, ROWS):
        some = slice(at, at + ROWS)
        inside = (batch.wanted >= at) & (batch.wanted < at + ROWS)
        yield Batch(
            batch.tokens[some],
            batch.positions[some],
            batch.sequences[some],
            batch.pages,
            batch.wanted[inside] - np.int32(at),
        )


class Pieces:
    """The whole model as pieces, one after another: a `Runnable`.

    `borders` are the layers that a piece ends before; the head is the last piece. `before` is told
    each piece's number before it runs. A batch that wants no logits does not run the head.
    """

    def __init__(
        self, maker: Maker, borders: Iterable[int], before: Callable[[int], None] = lambda _: None
    ) -> None:
        self.vocabulary = maker.config.vocabulary
        self.before = before
        self.given = Handover(maker.config.hidden)
        ends = sorted({*borders, maker.config.layers} - {0})
        spans = [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self.pieces = [maker.piece(s, self.given if s.start else None) for s in spans]
        self.head = maker.piece(range(0), self.given, head_name(maker.config))

    def run(self, batch: Batch, arena: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See Runnable."""
        found = [self.head.runnable.run(part, arena) for part in self._through_layers(batch, arena)]
        return np.concatenate([np.zeros((0, self.vocabulary), np.float32), *found])

    def best(
        self, batch: Batch, arena: NDArray[np.uint8], count: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """See Runnable."""
        ids = [np.zeros((0, count), np.int32)]
        logits = [np.zeros((0, count), np.float32)]
        for part in self._through_layers(batch, arena):
            found = self.head.runnable.best(part, arena, count)
            ids.append(found[0])
            logits.append(found[1])
        return np.concatenate(ids), np.concatenate(logits)

    def _through_layers(self, batch: Batch, arena: NDArray[np.uint8]) -> Iterator[Batch]:
        """What the head is to be run on, behind the layers; nothing where no logits are wanted."""
        for part in parts(batch):
            for number, piece in enumerate(self.pieces):
                self.before(number)
                states = piece.states(part if not number else handed(part), arena)
                self.given.rows[: len(states)] = states
            if len(part.wanted):
                self.before(len(self.pieces))
                yield handed(part)

    def slot(self, index: int, tokens: int) -> NDArray[np.float32]:
        """Of the head's program."""
        return self.head.runnable.slot(index, tokens)


def extended(weights: Weights, head: str, matrix: Matrix, planes: int) -> Weights:
    """The weights with one more matrix, a head of fewer rows."""
    more = {**weights.matrices, head: matrix}
    return replace(weights, matrices=more, planes={**weights.planes, head: planes})


def borders_of(regions: Sequence[range]) -> list[int]:
    """The layers before which regions end, but for the last."""
    return [r.stop for r in regions[:-1]]
