"""The verb `load`: a `.myai` file becomes a `Model` that answers in text or in ids.

A model is used by one thread at a time; other threads wait. After a fork the child computes with
threads of its own, and shares the mapped file; sessions are not to be used on both sides.

    opened           the file mapped and checked, its program and cache; ids in, logits out
    residence        regions that stay in memory, a budget for all; experts_memory: of a mixture
    reflexes         what a calibration turns on; drafts: what drafting needs of files
    sessions         texts that are kept in files, and several answers to one prompt
    concurrent       many prompts at once
"""

import secrets
from collections.abc import AsyncGenerator, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chalot.engine.generate import Session, Stats
from chalot.engine.pacing import MOST
from chalot.engine.sampler import Sampling
from chalot.errors import ContextError, TokenizerError
from chalot.formats.documents import parse_json
from chalot.kernels.backend import byte_pairs
from chalot.load import sessions
from chalot.load.drafts import Draft, Drafters, check_same_ids
from chalot.load.opened import Opened
from chalot.typed import MAY_COUNT, check_types, listed, token_ids

if TYPE_CHECKING:
    from chalot.load.concurrent import Concurrent
    from chalot.text.tokenizer import Tokenizer

Messages = list[dict[str, str]]
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Model(Opened):
    """A loaded model. Use it in a `with` block, or call `close`."""

    def __init__(
        self,
        path: str | Path,
        *,
        draft: Draft = True,
        draft_tokens: int = MOST,
        **options: Any,
    ) -> None:
        """Options as for `chalot.load.opened.Opened`: threads, context, kv, window, ...

        Where it pays, answers are drafted (docs/decoding.md) from the text so far, and by a small
        model where `draft` is its file, at most `draft_tokens` a pass; False turns it off, and no
        answer depends on it. Raises as `Opened`, and TokenizerError for a draft model with other
        ids.
        """
        super().__init__(path, **options)
        self.last_stats = Stats()
        streams = self.residence.stream is not None
        self.shallow = None if draft is False or streams else self.reflexes.shallow(self.engine)
        self._tokenizer: Tokenizer | None = None
        self._talk: Session | None = None  # keeps what the last chat put in the cache
        self._talk_drafting: tuple[Draft, int] | None = None
        self.drafters = Drafters(self.engine, self._draft_model, draft, draft_tokens, self.shallow)

    # ---- text

    @property
    def tokenizer(self) -> "Tokenizer":
        """The model's tokenizer, opened on first use. Raises TokenizerError if there is none."""
        if self._tokenizer is None:
            if "tokenizer.json" not in self.file.manifest.documents:
                raise TokenizerError(
                    f"{self.file.path}: has no tokenizer; from Python it takes token ids"
                )
            from chalot.text.byte_pairs import TABLES
            from chalot.text.tokenizer import from_source

            self._tokenizer = from_source(self.file, self.file.document(TABLES), byte_pairs)
        return self._tokenizer

    def generation_defaults(self) -> dict[str, Any]:
        """Sampling options that the model's makers ask for (generation_config.json)."""
        self.file.check_length()  # every answer begins here: of a closed model there is none
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
        ids = self._ids(prompt, max_tokens)
        if session is not None:
            with self.lock:
                yield from self._go_on(session, ids, max_tokens, stop, options)
            return
        with self.session(**options) as session:
            yield from self._answer(session, ids, max_tokens, stop)

    def _ids(self, prompt: Any, max_tokens: int | None) -> list[int]:
        """A prompt's ids. Raises WrongTypeError for what is no prompt, or no number of tokens."""
        check_types(max_tokens=(max_tokens, MAY_COUNT))
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return token_ids(prompt, "prompt")

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

        ids = self._ids(prompt, max_tokens)
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
        return self._concurrent.generate(listed(prompts, "prompts", "prompts"), **options)

    def astream(self, prompt: str | Iterable[int], **options: Any) -> AsyncGenerator[str, None]:
        """`stream` for asyncio: `async for piece in model.astream(prompt)`.

        Streams of one time share forward passes; one that nobody iterates any more is cancelled.
        """
        return self._concurrent.stream(prompt, **options)

    @cached_property
    def _concurrent(self) -> "Concurrent":
        from chalot.load.concurrent import Concurrent

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
        check_types(max_tokens=(max_tokens, MAY_COUNT))
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
            session.note = sessions.restore(session, Path(path).expanduser(), self.kept)
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

    def close(self) -> None:
        """Give back cache, sessions and file."""
        if "_concurrent" in vars(self):
            self._concurrent.close()
        if self._talk is not None:
            self._talk.close()
            self._talk = None
        self.drafters.close()
        super().close()


def load(path: str | Path, **options: Any) -> Model:
    """Open a `.myai` file: `with chalot.load("x.myai") as model: ...`. Options as for `Model`."""
    return Model(path, **options)
