"""A `.myai` file, opened: mapped, checked, and made a program with a cache. Ids in, logits out."""

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from chalot import machine
from chalot.engine.early_exit import EarlyExit
from chalot.engine.generate import CHUNK, Engine, Work
from chalot.errors import ContextError, FormatError, LimitError
from chalot.formats.myai import MyaiFile
from chalot.formats.residency import lock, read_ahead
from chalot.kernels.backend import Backend, Runnable, open_backend
from chalot.kernels.program import CACHE, CACHE_TYPES, PAGE
from chalot.load import sessions
from chalot.load.drafts import keep_costs, read_costs
from chalot.load.experts_memory import ExpertsMemory
from chalot.load.reflexes import Margin, Reflexes
from chalot.load.residence import Residence
from chalot.model.cache import PageCache, Sequence
from chalot.model.config import ModelConfig, for_context
from chalot.model.pieces import Maker, Pieces
from chalot.model.transformer import build, cache_shape, head_input
from chalot.model.window import LONGEST, SINKS, Window
from chalot.reading import read_frequencies, read_model_config, read_weights
from chalot.typed import COUNT, MAY_COUNT, PATH, check_types, token_ids


def default_context(config: ModelConfig, position_bytes: int, budget: int | None) -> int:
    """The model's own context, or what fits the budget, or half of the memory that is free."""
    free = machine.memory_available()
    room = budget if budget is not None else None if free is None else free // 2
    if room is None:
        return config.usual_context
    return min(config.usual_context, max(PAGE, room // position_bytes // PAGE * PAGE))


def remedy(config: ModelConfig, context: int, window: Window, by_budget: bool) -> str:
    """What helps, besides fewer tokens, against a text that is longer than a context."""
    if window.size:
        return "choose a larger --context" if context < LONGEST else "begin a new one"
    if context >= config.context:
        return f"add --window {max(1, config.context - SINKS)}: this is the model's own context"
    return f"choose a larger --{'kv-budget' if by_budget else 'context'}"


def cache_budget(texts: int, budget: int | None) -> int | None:
    """The most bytes of a cache for so many texts; of one alone, only what was asked for."""
    free = machine.memory_available()
    return free // 2 if texts > 1 and budget is None and free is not None else budget


def forced(activations: int | None, early_exit: Margin, long: bool) -> str:
    """What keys and values depend on besides the file, as saved sessions have it."""
    exits = "" if early_exit is None else f"early exit {early_exit}"
    rope = "long factors of rope" if long else ""
    return ", ".join(filter(None, (str(activations or ""), exits, rope)))


def check_known(texts: int, kv: str, activations: int | None) -> None:
    """Raise ContextError or FormatError for what no file can be opened with."""
    if texts < 1:
        raise ContextError(f"texts is {texts}; expected 1 or more")
    if kv not in CACHE_TYPES:
        raise FormatError(f"cache type {kv!r} is not known; choose {' or '.join(CACHE_TYPES)}")
    if activations not in (None, 8, 16):
        raise FormatError(f"activations of {activations} bits are not known; choose 8 or 16")


class Opened:
    """An opened model without text. Use it in a `with` block, or call `close`."""

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        context: int | None = None,
        isa: str | None = None,
        kv: str = CACHE,
        kv_budget: int | None = None,
        activations: int | None = None,
        mmap: bool = True,
        mlock: bool = False,
        experts_resident: int | None = None,
        keep: Iterable[str] = (),
        budget: int | None = None,
        early_exit: Margin = None,
        calibration: bool = True,
        window: int | None = None,
        sinks: int | None = None,
        texts: int = 1,
        backend: Backend | None = None,
    ) -> None:
        """Map the file and check it; weights are read when they are needed.

        `context` is in tokens (default: the model's own, or what half of the free memory holds;
        with longrope what the short factors are for: more takes the long ones, of all positions),
        `kv` the type of cached keys and values, "int8", "f16" or "f32", `kv_budget` the most bytes
        they may take (a context that does not fit is then an error when it is reached, and the
        default context is what fits). `activations` (8 or 16 bits) overrides what the file asks
        for, for dense matrices too: for measuring. Without `mmap` the file is read into memory of
        this process's own, in huge pages where the system has them; `mlock` keeps it in memory.
        Of a mixture of experts the `experts_resident` most used of each layer stay in memory, and
        the rest is read when it is used; answers are the same (docs/experts.md).
        `keep` names regions of layers that are locked in memory, `budget` is the most bytes of
        weights there: the rest is read again in each forward pass (chalot.load.residence).
        With a `window` queries see the last so many positions and the first `sinks` (4) alone, and
        a text may be longer than the model's context (`chalot.model.window` says what is computed).
        The cache has room for `texts` of the whole context, as far as memory goes.
        `early_exit` lets tokens skip layers, by a margin of logits or "auto"; it changes texts, and
        needs a calibration, which without `calibration` is not read (`chalot.load.reflexes`).
        `backend`: kernels that are open already, for their threads.
        Raises FormatError, ContextError, KernelError, LimitError, RegionError.
        """
        counts = {"threads": threads, "context": context, "kv_budget": kv_budget}
        counts |= {"window": window, "sinks": sinks, "experts_resident": experts_resident}
        check_types(path=(path, PATH), **{name: (n, MAY_COUNT) for name, n in counts.items()})
        check_types(texts=(texts, COUNT))
        check_known(texts, kv, activations)
        self.file = MyaiFile(Path(path).expanduser(), mmap)
        self.config = read_model_config(self.file)
        whole = mlock or budget is not None or early_exit is not None
        if whole and experts_resident is not None:
            raise LimitError(
                "--experts-resident does not go with --mlock, --budget or --early-exit; give one"
            )
        if mlock and budget is not None:
            raise LimitError("--mlock keeps the whole file in memory, --budget does not; give one")
        self.residence = Residence(self.file, self.config, keep, budget)
        if mlock:
            lock(self.file)
        elif mmap and self.residence.stream is None and experts_resident is None:
            read_ahead(self.file)
        shape = cache_shape(self.config, kv)
        self.window = Window.parse(window, sinks, self.config.context)
        self.config = self.window.of(self.config)
        self.kv, self.kv_budget = kv, kv_budget
        self.context = self._context(context, shape.position_bytes)
        by_budget = context is None and kv_budget is not None and not self.window.size
        self.cut = by_budget and self.context < self.config.context
        self.backend = backend or open_backend(isa, threads)
        seen = self.window.size + self.window.sinks or self.context
        frequencies = for_context(self.config, read_frequencies(self.file, self.config), seen)
        looked_at = self.residence.looked_at
        weights = read_weights(self.file, self.config, activations, looked_at)
        self.experts = ExpertsMemory(self.file, self.config, experts_resident)
        weights = self.experts.with_paging(weights)
        self.maker = Maker(self.config, weights, frequencies, shape, self.backend)
        streams = self.residence.stream is not None
        self.reflexes = Reflexes(self.file, self.maker, calibration, early_exit, streams)
        room = texts * self.window.positions(self.context, CHUNK) + CHUNK
        self.engine = Engine(
            self._runnable(kv),
            PageCache(shape, room, cache_budget(texts, kv_budget), self.window),
            self.config.vocabulary,
            self.context,
            self.backend.exp,
            self.experts.before_step,
            costs=read_costs(self.file, self.backend.name, self.backend.threads),
            remedy=remedy(self.config, self.context, self.window, self.cut),
        )
        self.kept = sessions.Kept(
            self.file.digest,
            forced(activations, early_exit, self.config.is_long(seen)),
            shape,
            self.window,
            self.context,
        )
        self.lock = threading.RLock()

    def _context(self, asked: int | None, position_bytes: int) -> int:
        """The most tokens of a text. Raises ContextError for more than there can be."""
        longest = LONGEST if self.window.size else self.config.context
        if asked is None and self.window.size:
            return longest
        if asked is None:
            return default_context(self.config, position_bytes, self.kv_budget)
        if 1 <= asked <= longest:
            return asked
        if self.window.size:
            raise ContextError(f"--context {asked}: a window has room for {longest}")
        raise ContextError(f"--context {asked}: this model was made for 1 to {longest}")

    def _runnable(self, kv: str) -> Runnable:
        """The model as one program; in pieces where not all of it stays in memory."""
        made = self.maker
        runnable: EarlyExit | Pieces | None = self.reflexes.exit
        if runnable is None and self.residence.stream is None:
            program = build(made.config, made.weights, made.inverse_frequency, kv)
            self.head_input = head_input(program)
            whole = self.backend.compile(program)
            self.experts.attach(whole, program, made.weights)
            return whole
        if runnable is None:
            runnable = Pieces(made, self.residence.borders)
            runnable.before = self.residence.before_piece(p.layers for p in runnable.pieces)
        self.head_input = runnable.head.head_input
        return runnable

    @property
    def reports(self) -> dict[str, Any]:
        """What memory, early exit and experts came to, where asked for: str says it too."""
        memory = self.residence.report() if self.residence.asked else None
        found: dict[str, Any] = {"residency": memory, "early_exit": self.reflexes.report()}
        found["experts"] = self.experts.report()
        return {name: report for name, report in found.items() if report is not None}

    def logits(self, ids: Iterable[int], last: int | None = None) -> NDArray[np.float32]:
        """(tokens, vocabulary) float32: what follows each token, or each of the `last` ones.

        Raises LimitError when that would not fit the memory that is free, ContextError when the
        ids are more than the context.
        """
        tokens = token_ids(ids)
        count = len(tokens) if last is None else min(last, len(tokens))
        need, free = count * self.config.vocabulary * 4, machine.memory_available()
        if free is not None and need > free:
            raise LimitError(
                f"logits of {count} tokens need {need:,} bytes, {free:,} are free; "
                "ask for fewer with last="
            )
        out = np.empty((count, self.config.vocabulary), np.float32)
        at = 0
        for part in self.logits_in_parts(tokens, CHUNK, len(tokens) - count):
            out[at : at + len(part)] = part
            at += len(part)
        return out

    def logits_in_parts(
        self, ids: Iterable[int], size: int = CHUNK, first: int = 0
    ) -> Iterator[NDArray[np.float32]]:
        """The logits of `ids[first:]`, (up to `size` tokens, vocabulary) float32 at a time.

        Raises ContextError when the ids are more than the context, or outside the vocabulary.
        """
        tokens = token_ids(ids)
        if any(not 0 <= i < self.config.vocabulary for i in tokens):
            raise ContextError(
                f"token ids must be 0 to {self.config.vocabulary - 1}, found {min(tokens)} to "
                f"{max(tokens)}; were they made with another tokenizer?"
            )
        sequence = Sequence(self.engine.cache)
        at = 0
        try:
            while at < len(tokens):
                wanted = "none" if at < first else "all"
                end = min(first, at + CHUNK) if at < first else min(at + size, len(tokens))
                with self.lock:
                    self.reflexes.set_margin()
                    got = self.engine.step([Work(sequence, tokens[at:end], wanted)])
                at = end
                if len(got):
                    yield got
        finally:
            with self.lock:
                sequence.close()

    def close(self) -> None:
        """Give back the cache and the file."""
        self.residence.close()
        keep_costs(self.engine.costs, self.file, self.backend.name, self.backend.threads)
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
