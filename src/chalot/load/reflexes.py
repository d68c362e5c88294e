"""What a model's calibration turns on: drafts by its first layers, and tokens that leave early.

Drafting is on where calibration found that it pays; it changes no text. Early exit changes texts:
it is on only where it is asked for, and needs a calibration (chalot.calibrated) of that very file.
"""

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np

from chalot import calibrated
from chalot.calibrated import MOST_MARGIN, Calibration, is_simple
from chalot.engine.early_exit import EarlyExit
from chalot.engine.generate import Engine
from chalot.engine.layer_draft import Shallow
from chalot.engine.sampler import SamplingError
from chalot.errors import FormatError, UnsupportedError
from chalot.formats.myai import MyaiFile
from chalot.model.pieces import Maker, extended
from chalot.quant.packing import Matrix

AUTO = "auto"  # the calibrated margin, and the supervisor where it is on
SHORT = "short_head"

Margin = float | str | None


@dataclass(frozen=True)
class ExitReport:
    """How many tokens left early, of those that could, and where: layers -> tokens."""

    margin: float
    supervised: bool
    tokens: int
    left: dict[int, int]

    def __str__(self) -> str:
        """A line for people."""
        where = ", ".join(f"{n} behind {layers} layers" for layers, n in self.left.items())
        return f"early exit by {self.margin:g}: of {self.tokens} tokens {where} (answers change)"


class Reflexes:
    """A calibration, if the file has one, at work. `exit` is the model that tokens leave early."""

    def __init__(
        self, file: MyaiFile, maker: Maker, wanted: bool, early_exit: Margin, streamed: bool
    ) -> None:
        """Read it. Raises FormatError, UnsupportedError, SamplingError where early exit cannot be.

        A calibration that is damaged or another file's is an error of early exit, and else a
        warning: drafts then come from the text alone.
        """
        self.found: Calibration | None = None
        self.maker = maker
        self.exit: EarlyExit | None = None
        self.margin, self.supervised = checked(early_exit), early_exit == AUTO
        place = calibrated.beside(file.path)
        head: Matrix | None = None
        if wanted or self.margin is not None:
            try:
                both = calibrated.read(place, maker.config, file.digest)
            except FormatError as error:
                if self.margin is not None:
                    raise
                warnings.warn(f"not used: {error}", RuntimeWarning, stacklevel=4)
                both = None
            self.found, head = both or (None, None)
        if self.found is not None and head is not None:
            tables = maker.weights.matrices["embedding" if maker.config.tied else "head"].tables
            weights = extended(
                maker.weights, SHORT, replace(head, tables=tables), self.found.short.planes
            )
            self.maker = replace(maker, weights=weights)
        if self.margin is not None:
            self._leave_early(file, streamed)

    def _leave_early(self, file: MyaiFile, streamed: bool) -> None:
        if self.found is None:
            raise FormatError(
                f"{file.path}: early exit needs a calibration; make one: "
                f"chalot calibrate {file.path} --text FILE"
            )
        if not self.found.exits:
            raise UnsupportedError(
                f"{file.path}: has one region, and so no border to leave at; name more with "
                "chalot convert --regions"
            )
        if streamed:
            raise UnsupportedError(
                f"{file.path}: early exit and --budget do not go together; leave one of them out"
            )
        if self.supervised:
            self.margin = self.found.exits[0].margin
        assert self.margin is not None
        borders = [e.layers for e in self.found.exits]
        size = len(self.found.short.tokens)
        self.exit = EarlyExit(self.maker, borders, SHORT, size, self.margin)

    def set_margin(self, margin: float | None = None) -> None:
        """From now on; None: what was asked for."""
        if self.exit is not None and self.margin is not None:
            self.exit.margin = self.margin if margin is None else margin

    def margin_of_prompt(self) -> float | None:
        """The supervisor's margin for the prompt that was just read; None where it is off."""
        if self.exit is None or self.found is None or self.margin is None or not self.supervised:
            return None
        found = self.found.supervisor
        if found is None or not found.on:
            return None
        return self.margin * (found.factor if is_simple(found, self.exit.shallow) else 1.0)

    def shallow(self, engine: Engine) -> Shallow | None:
        """The first layers as a drafter's model, where that pays."""
        if self.found is None or not self.found.draft.on:
            return None
        d, config = self.found.draft, self.maker.config
        head = SHORT if d.short else ("embedding" if config.tied else "head")
        tokens = self.found.short.tokens
        size = len(tokens) if d.short else config.vocabulary
        piece = self.maker.piece(range(d.layers), None, head, size)
        drafts = replace(engine, runnable=piece.runnable, vocabulary=size)
        ids = np.array(tokens, np.int32) if d.short else None
        return Shallow(drafts, ids, d.tokens, d.kept)

    def report(self) -> ExitReport | None:
        """What left early so far; None where nothing may."""
        if self.exit is None or self.margin is None:
            return None
        found = self.exit.leaving
        left = dict(zip(self.exit.borders, found.left, strict=True))
        supervisor = None if self.found is None else self.found.supervisor
        on = supervisor is not None and supervisor.on and self.supervised
        return ExitReport(self.margin, on, found.tokens, left)


def checked(early_exit: Margin) -> float | None:
    """The margin, None for no early exit. Raises SamplingError for what is none."""
    if early_exit is None:
        return None
    if early_exit == AUTO:
        return 0.0  # until the calibration says it
    try:
        margin = math.nan if isinstance(early_exit, bool) else float(early_exit)
    except (TypeError, ValueError):
        margin = math.nan
    if not 0 <= margin <= MOST_MARGIN:
        raise SamplingError(
            f"early_exit is {early_exit!r:.40}; expected 0 to {MOST_MARGIN:g} (of logits), or auto"
        )
    return margin
