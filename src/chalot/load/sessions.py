"""Sessions kept in files, and several answers to one prompt.

A saved session goes on as if it had never ended: with the same bits, whatever the machine.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from chalot.engine.drafting import Drafter
from chalot.engine.generate import Engine, Session, Stats, step_all
from chalot.engine.sampler import Sampling, SamplingError
from chalot.errors import ContextError, FormatError
from chalot.formats.files import check_place, quoted
from chalot.formats.session_file import SessionFile, SessionHeader, write_session
from chalot.kernels.program import PAGE, CacheShape
from chalot.load.reflexes import Reflexes
from chalot.model.cache import cleared
from chalot.model.window import Window
from chalot.typed import token_ids


class Locked(Protocol):
    """What an open session asks of its model."""

    engine: Engine
    lock: Any  # used with `with`
    reflexes: Reflexes


class OpenSession(Session, AbstractContextManager["OpenSession"]):
    """A session that locks its model for each call and gives its pages back at the block's end."""

    def __init__(self, model: "Locked", sampling: Sampling, drafter: Drafter | None = None) -> None:
        super().__init__(model.engine, sampling, drafter)
        self.model = model
        self.margin: float | None = None  # of early exit, where a supervisor sets it
        self.note = b""  # what was kept with it in a file

    def prefill(self, ids: Iterable[int]) -> None:
        """See Session."""
        with self.model.lock:
            self.model.reflexes.set_margin(self.margin)
            super().prefill(token_ids(ids))
            self.margin = self.model.reflexes.margin_of_prompt()

    def step(self, most: int | None = None) -> int:
        """See Session."""
        with self.model.lock:
            self.model.reflexes.set_margin(self.margin)
            return super().step(most)

    def fork(self, **changes: float) -> "OpenSession":
        """See Session."""
        with self.model.lock:
            return cast(OpenSession, super().fork(**changes))

    def _new(self, sampling: Sampling) -> "OpenSession":
        made = OpenSession(self.model, sampling)
        made.margin = self.margin
        return made

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Kept:
    """What a session's pages belong to: they mean something with the same alone."""

    model: str  # digest of the file
    activations: str  # bits that were forced, or ""
    shape: CacheShape
    window: Window
    context: int  # most tokens; may differ

    def made_with(self) -> dict[str, str | int]:
        """As it stands in a file."""
        out: dict[str, str | int] = {"model": self.model, "activations": self.activations}
        out |= {f"cache {name}": value for name, value in asdict(self.shape).items()}
        return out | {"page": PAGE, "window": self.window.size, "sinks": self.window.sinks}


def check_cache(path: Path) -> None:
    """Raise OutputError where no session could be written: before work, not after it."""
    check_place(path)  # its kind is seen when it is read


def save(session: Session, path: Path, kept: Kept, note: bytes = b"") -> None:
    """Write a session's tokens and pages, whole or not at all. Raises OutputError."""
    sequence, cache = session.sequence, session.engine.cache
    length = min(sequence.length, len(session.tokens))  # the cache may be ahead
    numbers = [n for n in sequence.pages[: -(-length // PAGE)] if n >= 0]
    header = SessionHeader(
        made_with=kept.made_with(),
        tokens=len(session.tokens),
        start=session.start,
        length=length,
        gone=sequence.gone,
        pages=len(numbers),
        page_bytes=cache.shape.page_bytes,
        note=len(note),
        sampling=asdict(session.sampling),
    )

    def pages() -> Iterator[NDArray[np.uint8]]:
        for i, n in enumerate(numbers):
            last = i == len(numbers) - 1 and length % PAGE
            yield cleared(cache.page(n), cache.shape, length % PAGE) if last else cache.page(n)

    write_session(path, header, note, np.array(session.tokens, np.int32), pages())


def restore(session: Session, path: Path, kept: Kept) -> bytes:
    """Fill an empty session from a file; the note that was kept with it.

    Raises FormatError for a damaged file, or one made with another model, cache type or window;
    ContextError where the cache has no room for it.
    """
    with SessionFile(path) as file:
        header = file.header
        _check(path, header, kept)
        sequence, cache = session.sequence, session.engine.cache
        try:
            sampling = Sampling(**header.sampling)  # type: ignore[arg-type]
        except (SamplingError, TypeError) as error:
            raise FormatError(f"{path}: {quoted(str(error), 200)}; damaged? remove it") from None
        try:
            sequence.reserve_with_gap(header.length, header.gone)
            numbers = [n for n in sequence.pages if n >= 0]
            if len(numbers) != header.pages:
                raise FormatError(
                    f"{path}: found {header.pages} pages, expected {len(numbers)} for "
                    f"{header.length} positions; damaged? remove it"
                )
            tokens, note = file.read(cache.page(n) for n in numbers)
            if tokens.size and not 0 <= tokens.min() <= tokens.max() < session.engine.vocabulary:
                raise FormatError(f"{path}: has tokens outside the vocabulary; remove it")
        except BaseException:
            sequence.close()
            raise
        sequence.length = header.length
    session.tokens, session.start = tokens.tolist(), header.start
    session.sampling = sampling
    session.stats = Stats(seed=sampling.seed, cached_tokens=header.length)
    return note


def _check(path: Path, header: SessionHeader, kept: Kept) -> None:
    expected = kept.made_with()
    for name in {**expected, **header.made_with}:
        found, here = header.made_with.get(name), expected.get(name)
        if found != here:
            raise FormatError(
                f"{path}: was made with {quoted(name)} {quoted(str(found))}, expected {here!r}; "
                "open the model as it was then, or choose another name"
            )
    if (
        header.page_bytes != kept.shape.page_bytes
        or max(header.length, header.start) > header.tokens
    ):
        raise FormatError(f"{path}: its sizes contradict each other; damaged? remove it")
    window, sink_pages = kept.window, -(-kept.window.sinks // PAGE)
    fits = header.gone == sink_pages or (
        sink_pages <= header.gone <= window.first(header.length - 1) // PAGE and window.size
    )
    if not fits:
        raise FormatError(f"{path}: {header.gone} pages are gone that are seen; remove it")
    if header.tokens > kept.context:
        raise ContextError(
            f"{path}: holds {header.tokens} tokens, the context {kept.context}; "
            "choose a larger --context"
        )


class Text(Protocol):
    """Tokens in, text out (`text.stream.TextStream`)."""

    @property
    def stopped(self) -> str | None: ...

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


def answers(first: Session, texts: Sequence[Text], ends: Collection[int], most: int) -> list[str]:
    """An answer for each of `texts`, to what `first` has read; all decoded together.

    The first is `first`'s own choice, each of the others the choice behind the one before it.
    """
    choice = first.sampling.choice
    going = {i: first.fork(choice=choice + i) if i else first for i in range(len(texts))}
    pieces: list[list[str]] = [[] for _ in texts]
    try:
        for _ in range(most):
            rows = list(going)
            for i, token in zip(rows, step_all([going[i] for i in rows]), strict=True):
                if token not in ends:
                    pieces[i].append(texts[i].push(token))
                if token in ends or texts[i].stopped is not None:
                    _end(first, going.pop(i))
            if not going:
                break
    finally:
        for session in going.values():
            _end(first, session)
    for text, out in zip(texts, pieces, strict=True):
        if text.stopped is None:
            out.append(text.flush())
    return ["".join(out) for out in pieces]


def _end(first: Session, session: Session) -> None:
    """Give back a session's pages; what it took counts with the first one's."""
    if session is not first:
        first.stats.new_tokens += session.stats.new_tokens
        first.stats.decode_seconds += session.stats.decode_seconds
        first.stats.native_seconds += session.stats.native_seconds
        session.close()


def stops(stop: Iterable[str]) -> tuple[str, ...]:
    """Texts to end before. Raises SamplingError for an empty one."""
    found = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(found):
        raise SamplingError("a stop string is empty; expected a text to end before")
    return found


def room(left: int, max_tokens: int | None) -> int:
    """How many tokens an answer may have, of those `left`. Raises SamplingError."""
    if max_tokens is not None and max_tokens < 0:
        raise SamplingError(f"max_tokens is {max_tokens}; expected 0 or more")
    return max(left, 0) if max_tokens is None else min(max_tokens, max(left, 0))
