"""A model that is served: its scheduler and worker thread, its tokenizer, its grammars."""

import threading
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from chalot import machine
from chalot.engine.generate import Work
from chalot.engine.worker import Worker
from chalot.errors import ChalotError
from chalot.load import Model
from chalot.load.concurrent import scheduler
from chalot.model.cache import Sequence
from chalot.serve.settings import Settings
from chalot.serve.structured import Structures
from chalot.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Facts:
    """What is said of the model."""

    name: str
    digest: str
    scheme: str  # of its matrices
    context: int
    file_bytes: int
    bits_per_weight: float


def facts_of(model: Model, name: str) -> Facts:
    """From the manifest."""
    entries = model.file.manifest.tensors.values()
    schemes = {e.scheme for e in entries if len(e.shape) > 1}
    return Facts(
        name,
        model.file.digest,
        "+".join(sorted(schemes)),
        model.context,
        model.file.path.stat().st_size,
        round(model.file.bits_per_weight, 4),
    )


class Served:
    """See module. `start` begins to compute, `stop` ends what runs."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model = model
        self.tokenizer: Tokenizer = model.tokenizer
        self.settings = settings
        self.facts = facts_of(model, settings.name)
        self.defaults = model.generation_defaults()
        self.scheduler = scheduler(model, settings.slots, settings.queue)
        self.worker = Worker(self.scheduler, model.lock)
        self._opening = threading.Lock()

    def start(self) -> None:
        """Open the tokenizer, and begin to compute; the second time, nothing."""
        self.tokenizer.encode("ready?")
        if not self.worker.alive:
            self.worker.start()

    def stop(self) -> None:
        """End what runs."""
        self.worker.stop()

    @property
    def alive(self) -> bool:
        """Whether the worker computes, which ends if chalot has a bug, and the file is whole."""
        try:
            self.model.file.check_length()
        except ChalotError:
            return False
        return self.worker.alive

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer."""
        return self.tokenizer.eos_ids

    @property
    def resident_bytes(self) -> int:
        """Memory of this process, the mapped file's pages included."""
        return machine.resident_bytes()

    @cached_property
    def _structures(self) -> Structures:
        document = self.model.file.document("tokenizer.json") or b"{}"
        return Structures(document.decode(), self.model.config.vocabulary, self.ends)

    def structures(self) -> Structures:
        """Grammars for this model's tokens, opened when first needed. Raises Fault."""
        with self._opening:
            return self._structures

    # ---- embeddings, in the worker's thread; their pages are the model's, not the scheduler's

    def open_text(self) -> Sequence:
        """Where `hidden` reads a text into."""
        return Sequence(self.model.engine.cache)

    def hidden(self, sequence: Sequence, ids: list[int]) -> NDArray[np.float32]:
        """(tokens, hidden): what the head would be multiplied with, after each of some tokens.

        Reads them into the sequence.
        """
        self.model.engine.best([Work(sequence, ids, "all")], 1)
        return self.model.engine.runnable.slot(self.model.head_input, len(ids))
