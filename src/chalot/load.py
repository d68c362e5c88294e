"""The verb `load`: a `.myai` file becomes a `Model` that answers in text or in ids.

A model is used by one thread at a time; other threads wait. After a fork the child computes with
threads of its own, and shares the mapped file; sessions are not to be used on both sides.
"""

import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from chalot import machine, sessions
from chalot.drafts import Draft, Drafters, check_same_ids, keep_costs, read_costs
from chalot.engine.early_exit import EarlyExit
from chalot.engine.generate import CHUNK, Engine, Session, Stats, Work
from chalot.engine.pacing import MOST
from chalot.engine.sampler import Sampling
from chalot.errors import ContextError, FormatError, LimitError, TokenizerError
from chalot.experts_memory import ExpertsMemory
from chalot.formats.documents import parse_json
from chalot.formats.myai import MyaiFile
from chalot.formats.residency import lock, read_ahead
from chalot.kernels.backend import Backend, Runnable, byte_pairs, open_backend
from chalot.kernels.program import CACHE, CACHE_TYPES, PAGE
from chalot.model.cache import PageCache, Sequence
from chalot.model.config import ModelConfig
from chalot.model.layers import model_tensors
from chalot.model.pieces import Maker, Pieces
from chalot.model.transformer import Weights, build, cache_shape, head_input
from chalot.model.window import LONGEST, Window
from chalot.reflexes import Margin, Reflexes
from chalot.residence import Residence
from chalot.typed import MAY_COUNT, PATH, check_types

if TYPE_CHECKING:
    from chalot.concurrent import Concurrent
    from chalot.text.tokenizer import Tokenizer

Messages = list[dict[str, str]]
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_model_config(file: MyaiFile) -> ModelConfig:
    """The configuration in a manifest. Raises FormatError where it contradicts a tensor."""
    try:
        config = msgspec.convert(file.manifest.config, ModelConfig)
    except msgspec.ValidationError as error:
        raise FormatError(f"{file.path}: configuration: {str(error)[:300]}") from None
    for spec in model_tensors(config):
        entry = file.manifest.tensors.get(spec.name)
        if entry is None or entry.shape != spec.shape:
            found = "nothing" if entry is None else f"shape {entry.shape}"
            raise FormatError(
                f"{file.path}: tensor {spec.name}: found {found}, expected shape {spec.shape}"
            )
    return config


def read_weights(
    file: MyaiFile,
    config: ModelConfig,
    activations: int | None,
    looked_at: Callable[[str], None] = lambda _: None,
) -> Weights:
    """All tensors as views of the file. `activations` forces their bits, of dense matrices too.

    `looked_at` is told each tensor's name when its numbers were checked.
    """
    matrices, vectors, planes = {}, {}, {}
    for spec in model_tensors(config):
        if spec.kind == "vector":
            vectors[spec.name] = file.vector(spec.name)
        else:
            matrices[spec.name] = file.matrix(spec.name)
            if activations is not None:
                planes[spec.name] = activations // 8
            elif matrices[spec.name].scheme.is_coded:
                planes[spec.name] = file.manifest.tensors[spec.name].activation // 8
        looked_at(spec.name)
    return Weights(matrices, vectors, planes)


def default_context(config: ModelConfig, position_bytes: int, budget: int | None) -> int:
    """The model's own context, or what fits the budget, or half of the memory that is free."""
    free = machine.memory_available()
    room = budget if budget is not None else None if free is None else free // 2
    if room is None:
        return config.context
    return min(config.context, max(PAGE, room // position_bytes // PAGE * PAGE))


def cache_budget(texts: int, budget: int | None) -> int | None:
    """The most bytes of a cache for so many texts; of one alone, only what was asked for."""
    free = machine.memory_available()
    return free // 2 if texts > 1 and budget is None and free is not None else budget


def forced(activations: int | None, early_exit: Margin) -> str:
    """What keys and values depend on besides the file, as saved sessions have it."""
    exits = "" if early_exit is None else f"early exit {early_exit}"
    return ", ".join(filter(None, (str(activations or ""), exits)))


class Model:
    """A loaded model. Use it in a `with` block, or call `close`."""

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
        draft: Draft = True,
        draft_tokens: int = MOST,
        backend: Backend | None = None,
    ) -> None:
        """Map the file and check it; weights are read when they are needed.

        `context` is in tokens (default: the model's own, or what half of the free memory holds),
        `kv` the type of cached keys and values, "int8", "f16" or "f32", `kv_budget` the most bytes
        they may take (a context that does not fit is then an error when it is reached, and the
        default context is what fits). `activations` (8 or 16 bits) overrides what the file asks
        for, for dense matrices too: for measuring. Without `mmap` the file is read into memory of
        this process's own, in huge pages where the system has them; `mlock` keeps it in memory.
        Of a mixture of experts the `experts_resident` most used of each layer stay in memory, and
        the rest is read when it is used; answers are the same (docs/experts.md).
        `keep` names regions of layers that are locked in memory, `budget` is the most bytes of
        weights there: the rest is read again in each forward pass (chalot.residence).
        With a `window` queries see the last so many positions and the first `sinks` (4) alone, and
        a text may be longer than the model's context (`chalot.model.window` says what is computed).
        The cache has room for `texts` of the whole context, as far as memory goes.
        Where it pays, answers are drafted (docs/decoding.md) from the text so far, and by a small
        model where `draft` is its file, at most `draft_tokens` a pass; False turns it off, and no
        answer depends on it. `backend`: kernels that are open already, for their threads.
        `early_exit` lets tokens skip layers, by a margin of logits or "auto"; it changes texts, and
        needs a calibration, which without `calibration` is not read (chalot.reflexes).
        Raises FormatError, ContextError, KernelError, LimitError, RegionError, TokenizerError for
        a draft model with other ids.
        """
        counts = {"threads": threads, "context": context, "kv_budget": kv_budget}
        counts |= {"window": window, "sinks": sinks, "experts_resident": experts_resident}
        check_types(path=(path, PATH), **{name: (n, MAY_COUNT) for name, n in counts.items()})
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
        if kv not in CACHE_TYPES:
            raise FormatError(f"cache type {kv!r} is not known; choose {' or '.join(CACHE_TYPES)}")
        if activations not in (None, 8, 16):
            raise FormatError(f"activations of {activations} bits are not known; choose 8 or 16")
        shape = cache_shape(self.config, kv)
        self.window = Window.parse(window, sinks, self.config.context)
        self.config = self.window.of(self.config)
        longest = LONGEST if self.window.size else self.config.context
        if context is None and not self.window.size:
            context = default_context(self.config, shape.position_bytes, kv_budget)
        self.context = longest if context is None else context
        self.kv, self.kv_budget = kv, kv_budget
        if not 1 <= self.context <= longest:
            if self.window.size:
                raise ContextError(f"--context {self.context}: a window has room for {longest}")
            raise ContextError(
                f"--context {self.context}: this model was made for 1 to {self.config.context}"
            )
        self.backend = backend or open_backend(isa, threads)
        frequencies = self.file.constant("rope.inverse_frequency", "<f4", self.config.head_dim // 2)
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
        )
        self.kept = sessions.Kept(
            self.file.digest, forced(activations, early_exit), shape, self.window, self.context
        )
        self.last_stats = Stats()
        self.lock = threading.RLock()
        self.shallow = None if draft is False or streams else self.reflexes.shallow(self.engine)
        self._tokenizer: Tokenizer | None = None
        self._talk: Session | None = None  # keeps what the last chat put in the cache
        self._talk_drafting: tuple[Draft, int] | None = None
        self.drafters = Drafters(self.engine, self._draft_model, draft, draft_tokens, self.shallow)

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

    # ---- text

    @property
    def tokenizer(self) -> "Tokenizer":
        """The model's tokenizer, opened on first use. Raises TokenizerError if there is none."""
        if self._tokenizer is None:
            if "tokenizer.json" not in self.file.manifest.documents:
                raise TokenizerError(
                    f"{self.file.path}: has no tokenizer; give token ids instead of text"
                )
            from chalot.text.byte_pairs import TABLES
            from chalot.text.tokenizer import from_source

            self._tokenizer = from_source(self.file, self.file.document(TABLES), byte_pairs)
        return self._tokenizer

    def generation_defaults(self) -> dict[str, Any]:
        """Sampling options that the model's makers ask for (generation_config.json)."""
        raw = self.file.document("generation_config.json")
        found = parse_json(raw, f"{self.file.path}: generation_config.json") if raw else {}
        if not isinstance(found, dict):
            return {}
        out = {k: found[k] for k in SAMPLING_KEYS if isinstance(found.get(k), (int, float))}
        if found.get("do_sample") is False:
            out["temperature"] = 0.0
        return out

    def sampling(self, **options: Any) -> Sampling:
        """Options over the model's own defaults over chalot's; a seed is drawn if none is given."""
        given = {k: v for k, v in options.items() if v is not None}
        given.setdefault("seed", secrets.randbits(32))
        return Sampling(**{**self.generation_defaults(), **given})

    def stream(
        self,
        prompt: str | Iterable[int],
        *,
        max_tokens: int | None = None,
        stop: Iterable[str] = (),
        session: Session | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Text as it is generated, whole characters at a time.

        Options: temperature, top_k, top_p, min_p, repetition_penalty, repetition_window, seed,
        choice; draft and draft_tokens as for the model. Ends at an end-of-text token, a stop
        string, `max_tokens`, or the context's end. With a `session`, what it holds of the prompt
        is not read again, and it goes on from there.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if session is not None:
            with self.lock:
                yield from self._go_on(session, ids, max_tokens, stop, options)
            return
        with self.session(**options) as session:
            yield from self._answer(session, ids, max_tokens, stop)

    def _go_on(
        self,
        session: Session,
        ids: list[int],
        max_tokens: int | None,
        stop: Iterable[str],
        options: dict[str, Any],
    ) -> Iterator[str]:
        """The answer to `ids`, of which a session may hold the beginning."""
        session.sampling = self.sampling(**options)
        same = 0
        for a, b in zip(session.tokens, ids[:-1], strict=False):
            if a != b:
                break
            same += 1
        session.rewind(same)
        session.stats = Stats(seed=session.sampling.seed, cached_tokens=session.sequence.length)
        yield from self._answer(session, ids[same:], max_tokens, stop)

    def answers(
        self,
        prompt: str | Iterable[int],
        count: int,
        *,
        max_tokens: int | None = None,
        stop: Iterable[str] = (),
        **options: Any,
    ) -> list[str]:
        """That many answers to one prompt, which is read once: `choice` and the ones behind it.

        Each is what `generate` gives for its choice. Raises ContextError where the cache has no
        room for all: open the model with `texts=count`.
        """
        from chalot.text.stream import TextStream

        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if count < 1:
            raise ContextError(f"{count} answers asked for; expected 1 or more")
        with self.lock, self.session(**options | {"draft": False}) as session:
            self.last_stats = session.stats
            most = sessions.room(self.context - len(ids), max_tokens)
            session.prefill(ids)
            texts = [TextStream(self.tokenizer, sessions.stops(stop)) for _ in range(count)]
            return sessions.answers(session, texts, self.tokenizer.eos_ids, most)

    def _answer(
        self, session: Session, ids: list[int], max_tokens: int | None, stop: Iterable[str]
    ) -> Iterator[str]:
        from chalot.text.stream import TextStream

        text = TextStream(self.tokenizer, sessions.stops(stop))
        most = sessions.room(self.context - len(session.tokens) - len(ids), max_tokens)
        self.last_stats = session.stats
        ends = self.tokenizer.eos_ids
        session.prefill(ids)
        for left in range(most, 0, -1):
            token = session.step(left)
            if token in ends:
                break
            piece = text.push(token)
            if piece:
                yield piece
            if text.stopped:
                return
        last = text.flush()
        if last:
            yield last

    def generate(self, prompt: str | Iterable[int], **options: Any) -> str:
        """The whole answer; options as for `stream`."""
        return "".join(self.stream(prompt, **options))

    def generate_batch(self, prompts: Iterable[str | Iterable[int]], **options: Any) -> list[str]:
        """The answers to many prompts, computed together: each is what `generate` gives.

        Options as for `stream`; without a seed each prompt draws its own. The cache for it takes
        memory of its own. The first error ends all answers.
        """
        return self._concurrent.generate(list(prompts), **options)

    def astream(self, prompt: str | Iterable[int], **options: Any) -> AsyncGenerator[str, None]:
        """`stream` for asyncio: `async for piece in model.astream(prompt)`.

        Streams of one time share forward passes; one that nobody iterates any more is cancelled.
        """
        return self._concurrent.stream(prompt, **options)

    @cached_property
    def _concurrent(self) -> "Concurrent":
        from chalot.concurrent import Concurrent

        return Concurrent(self)

    def stream_chat(
        self,
        messages: Messages,
        *,
        max_tokens: int | None = None,
        stop: Iterable[str] = (),
        draft: Draft | None = None,
        draft_tokens: int | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """The answer to a conversation by the model's own template; what the cache holds is reused.

        Raises TokenizerError for a model without a chat template.
        """
        ids = self.tokenizer.encode_chat(messages)
        with self.lock:
            session = self.talk()
            drafting = self.drafters.chosen(draft, draft_tokens)
            if drafting != self._talk_drafting:
                session.use(self.drafters.make(*drafting))
                self._talk_drafting = drafting
            yield from self._go_on(session, ids, max_tokens, stop, options)

    def talk(self) -> Session:
        """The session in which `stream_chat` keeps what the last conversation put in the cache."""
        if self._talk is None:
            self._talk, self._talk_drafting = sessions.OpenSession(self, self.sampling()), None
        return self._talk

    def chat(self, messages: Messages, **options: Any) -> str:
        """The whole answer to a conversation; options as for `stream`."""
        return "".join(self.stream_chat(messages, **options))

    # ---- ids

    def session(
        self, *, draft: Draft | None = None, draft_tokens: int | None = None, **options: Any
    ) -> sessions.OpenSession:
        """A text of one's own: `prefill(ids)`, then `step()`. Options as for `stream`."""
        drafter = self.drafters.make(*self.drafters.chosen(draft, draft_tokens))
        return sessions.OpenSession(self, self.sampling(**options), drafter)

    def _draft_model(self, path: Path) -> "Model":
        """A small model with the same ids, on the same threads. Raises TokenizerError."""
        kv = self.engine.cache.shape.kind
        small = Model(path, kv=kv, draft=False, backend=self.backend)
        check_same_ids(self, small)
        return small

    def save_session(self, session: Session, path: str | Path, note: bytes = b"") -> None:
        """Write a text's tokens, keys and values to a file, whole or not at all.

        `note` is kept with it. Raises OutputError.
        """
        with self.lock:
            sessions.save(session, Path(path).expanduser(), self.kept, note)

    def load_session(self, path: str | Path, **options: Any) -> sessions.OpenSession:
        """A saved text, which goes on with the same bits; options are those saved, unless given.

        Raises FormatError for a damaged file, or one of another model, cache type or window.
        """
        session = self.session(**{n: options.pop(n, None) for n in ("draft", "draft_tokens")})
        with self.lock:
            sessions.restore(session, Path(path).expanduser(), self.kept)
        session.with_sampling(**options)
        return session

    def save_talk(self, path: str | Path, note: bytes = b"") -> None:
        """Like `save_session`, of what the last `stream_chat` left."""
        self.save_session(self.talk(), path, note)

    def load_talk(self, path: str | Path) -> bytes:
        """Like `load_session`, for the next `stream_chat`; the note that was kept with it."""
        with self.lock:
            if self._talk is not None:
                self._talk.close()
                self._talk = None
            return sessions.restore(self.talk(), Path(path).expanduser(), self.kept)

    def logits(self, ids: Iterable[int], last: int | None = None) -> NDArray[np.float32]:
        """(tokens, vocabulary) float32: what follows each token, or each of the `last` ones.

        Raises LimitError when that would not fit the memory that is free, ContextError when the
        ids are more than the context.
        """
        tokens = [int(i) for i in ids]
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
        tokens = [int(i) for i in ids]
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
        """Give back cache, sessions and file."""
        if "_concurrent" in vars(self):
            self._concurrent.close()
        if self._talk is not None:
            self._talk.close()
            self._talk = None
        self.drafters.close()
        self.residence.close()
        keep_costs(self.engine.costs, self.file, self.backend.name, self.backend.threads)
        self.file.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(path: str | Path, **options: Any) -> Model:
    """Open a `.myai` file: `with chalot.load("x.myai") as model: ...`. Options as for `Model`."""
    return Model(path, **options)
