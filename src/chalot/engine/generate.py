"""The step that everything shares, and a session on top of it. Ids in, ids out.

`Engine.step` runs any mix of work, chunks of prompts and single tokens of many sequences, through
one forward pass. A `Session` is one text: prefill it, then step token by token. With a drafter
(drafting.py) a pass takes drafted tokens along; those that it confirms wait to be asked for.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import replace as with_changes
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from chalot.engine.drafting import Drafter, most_wanted, verified
from chalot.engine.pacing import StepCosts
from chalot.engine.sampler import Exp, Sampling, choose, wanted
from chalot.errors import ContextError
from chalot.kernels.backend import Runnable
from chalot.kernels.program import Batch
from chalot.kernels.reference import best_of
from chalot.model.cache import PageCache, Sequence

Result = TypeVar("Result")
FEW = 512  # candidates that are chosen while the logits are at hand; more are sorted
CHUNK = 256  # tokens of one forward pass: what a prompt is cut into


@dataclass
class Stats:
    """What a piece of work took. Seconds are of the wall clock."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, that the cache held already
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    native_seconds: float = 0.0  # of decode_seconds, inside the forward pass
    seed: int | None = None
    passes: int = 0  # forward passes that decoded
    drafted: int = 0  # tokens that passes took along on trial
    accepted: int = 0  # of those, the ones that were right
    cost: float = 0.0  # of drafts and passes as they usually are, in passes of one token

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens read in a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens in a second."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def host_microseconds_per_token(self) -> float:
        """What batching and sampling cost outside the forward pass."""
        host = self.decode_seconds - self.native_seconds
        return host / self.new_tokens * 1e6 if self.new_tokens else 0.0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were right."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a decoding pass gave, on average."""
        return 1 + self.accepted / self.passes if self.passes else 1.0

    @property
    def speed_up(self) -> float:
        """Expected speed over one token a pass: what others do on the machine does not count."""
        return (self.passes + self.accepted) / self.cost if self.drafted else 1.0

    @property
    def drafting(self) -> str:
        """What drafting did, for people; "" for nothing."""
        if not self.drafted:
            return ""
        return (
            f" ({self.acceptance:.0%} of {self.drafted} drafted tokens kept, "
            f"{self.tokens_per_pass:.1f} tokens a pass, about {self.speed_up:.1f} x plain decoding)"
        )


@dataclass(frozen=True)
class Work:
    """Tokens to append to a sequence; logits wanted after the last of them, after all, or none."""

    sequence: Sequence
    tokens: list[int]
    wanted: str = "last"  # "last", "all", "none"


@dataclass
class Engine:
    """A compiled program with its cache. One thread at a time; `before_step` may raise."""

    runnable: Runnable
    cache: PageCache
    vocabulary: int
    context: int
    exp: Exp
    before_step: Callable[[], None] = field(default=lambda: None)
    native_seconds: float = 0.0  # spent in forward passes so far
    costs: StepCosts = field(default_factory=StepCosts)  # of decoding, by tokens in a pass
    remedy: str = "choose a larger --context"  # for a text that is too long

    def step(self, work: list[Work]) -> NDArray[np.float32]:
        """Logits (wanted tokens, vocabulary), in the order of the work.

        Raises ContextError if a sequence would outgrow the context.
        """
        return self._run(work, lambda batch: self.runnable.run(batch, self.cache.arena))

    def best(self, work: list[Work], count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and logits (wanted tokens, count) of the best, in order; -1 where not finite.

        Raises ContextError if a sequence would outgrow the context.
        """
        if count > FEW:
            return best_of(self.step(work), count)
        return self._run(work, lambda batch: self.runnable.best(batch, self.cache.arena, count))

    def _run(self, work: list[Work], call: Callable[[Batch], Result]) -> Result:
        self.before_step()
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        wanted: list[int] = []
        for row, w in enumerate(work):
            end = w.sequence.length + len(w.tokens)
            if end > self.context:
                raise ContextError(
                    f"the text needs {end} tokens, the context holds {self.context}; "
                    f"shorten it or {self.remedy}"
                )
            w.sequence.reserve(end)
            positions += range(w.sequence.length, end)
            tokens += w.tokens
            rows += [row] * len(w.tokens)
            if w.wanted == "all":
                wanted += range(len(tokens) - len(w.tokens), len(tokens))
            elif w.wanted == "last":
                wanted.append(len(tokens) - 1)
        batch = Batch(
            np.array(tokens, np.int32),
            np.array(positions, np.int32),
            np.array(rows, np.int32),
            self.cache.tables([w.sequence for w in work]),
            np.array(wanted, np.int32),
        )
        start = time.perf_counter()
        result = call(batch)
        self.native_seconds += time.perf_counter() - start
        for w in work:
            w.sequence.length += len(w.tokens)
        return result

    def candidates(
        self, work: list[Work], count: int
    ) -> Callable[[int], tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """Like `best`, row by row: where all are to be sorted, only rows that are asked for are."""
        if count > FEW:
            every = self.step(work)

            def row(n: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
                ids, logits = best_of(every[n : n + 1], count)
                return ids[0], logits[0]

            return row
        ids, logits = self.best(work, count)
        return lambda n: (ids[n], logits[n])

    def session(
        self, sampling: Sampling | None = None, drafter: Drafter | None = None
    ) -> "Session":
        """A new, empty text."""
        return Session(self, sampling or Sampling(temperature=0), drafter)


class Session:
    """One text in the cache: `prefill(ids)`, then `step()` gives one new token at a time.

    The cache may be ahead of `tokens` by what is confirmed already and not yet asked for.
    """

    def __init__(self, engine: Engine, sampling: Sampling, drafter: Drafter | None = None) -> None:
        self.engine = engine
        self.sampling = sampling
        self.drafter = drafter
        self.sequence = Sequence(engine.cache)
        self.tokens: list[int] = []
        self.start = 0  # where the answer begins: behind what was given last
        self.stats = Stats(seed=sampling.seed)
        # the candidates after the last token fed: ids and logits
        self.next: tuple[NDArray[np.int32], NDArray[np.float32]] | None = None
        self.confirmed: deque[int] = deque()  # what follows `tokens`, drawn with `drawn_by`
        self.drawn_by = sampling

    def prefill(self, ids: list[int]) -> None:
        """Read tokens. Raises ContextError, before any work, if they do not fit."""
        ids = [int(i) for i in ids]
        if not ids:
            return
        if any(not 0 <= i < self.engine.vocabulary for i in ids):
            raise ContextError(
                f"token ids must be 0 to {self.engine.vocabulary - 1}, found "
                f"{min(ids)} to {max(ids)}; were they made with another tokenizer?"
            )
        total = len(self.tokens) + len(ids)
        if total > self.engine.context:
            raise ContextError(
                f"the prompt needs {total} tokens, the context holds {self.engine.context}; "
                f"shorten it or {self.engine.remedy}"
            )
        start = time.perf_counter()
        self._forget()
        self.tokens += ids
        self.start = total
        self._feed()
        self.stats.prompt_tokens += len(ids)
        self.stats.prefill_seconds += time.perf_counter() - start

    def _feed(self) -> None:
        """Run what is not in the cache yet, a chunk at a time; keep what may come next."""
        count = wanted(self.tokens, self.sampling, self.engine.vocabulary, self.start)
        while self.sequence.length < len(self.tokens):
            done = self.sequence.length
            part = self.tokens[done : done + CHUNK]
            last = done + len(part) == len(self.tokens)
            ids, logits = self.engine.best(
                [Work(self.sequence, part, "last" if last else "none")], count
            )
            if last:
                self.next = ids[0], logits[0]

    def step(self, most: int | None = None) -> int:
        """The next token; the caller will take at most `most` in all, this one among them.

        Raises ContextError when nothing was read, or the context is full.
        """
        start, native = time.perf_counter(), self.engine.native_seconds
        if self.confirmed and self.drawn_by is not self.sampling:
            self._forget()
        if not self.confirmed:
            self._decode(most)
        token = self.confirmed.popleft()
        self.tokens.append(token)
        self.stats.new_tokens += 1
        self.stats.native_seconds += self.engine.native_seconds - native
        self.stats.decode_seconds += time.perf_counter() - start
        return token

    def _decode(self, most: int | None) -> None:
        """Draw the next token, and drafted ones behind it as far as they are right."""
        count = wanted(self.tokens, self.sampling, self.engine.vocabulary, self.start)
        unread = len(self.tokens) - self.sequence.length
        if unread <= 0 and (self.next is None or self.next[0].size < count):
            self.rewind(len(self.tokens))  # sampling has changed, or a step was interrupted
            unread = len(self.tokens) - self.sequence.length
        if unread == 1:
            found = self._verify(self._draft(most))
        else:
            self._feed()
            if self.next is None:
                raise ContextError(
                    "nothing was read yet; call prefill(ids) with at least one token"
                )
            before, exp = self.tokens, self.engine.exp
            found = [choose(*self.next, before, self.sampling, len(before), exp, self.start)]
        self.next = None
        self.confirmed.extend(found)
        self.drawn_by = self.sampling

    def _draft(self, most: int | None) -> list[int]:
        """What the drafter expects, as far as context, cache and caller have room for it."""
        if self.drafter is None:
            return []
        room = min(self.engine.context, self.sequence.room()) - len(self.tokens)
        room = min(room, CHUNK - 1, room if most is None else most - 1)
        if room <= 0:
            return []
        start = time.perf_counter()
        draft = self.drafter.propose(self, room)
        self.stats.cost += (time.perf_counter() - start) / (self.engine.costs.one or 1.0)
        return draft

    def _verify(self, draft: list[int]) -> list[int]:
        """Run the last token and the draft; the right ones of it, and the token behind them."""
        start, costs, stats = time.perf_counter(), self.engine.costs, self.stats
        part = [*self.tokens[-1:], *draft]
        count = most_wanted(self, draft, self.engine.vocabulary)
        candidates = self.engine.candidates([Work(self.sequence, part, "all")], count)
        found = verified(self, draft, candidates, self.engine.exp)
        self.sequence.truncate(len(self.tokens) + len(found) - 1)
        seconds = time.perf_counter() - start
        costs.note(len(part), seconds)
        stats.cost += costs.of(len(part))
        if draft and self.drafter is not None:
            self.drafter.learn(len(found) - 1)
        stats.passes += 1
        stats.drafted += len(draft)
        stats.accepted += len(found) - 1
        return found

    def _forget(self) -> None:
        """Drop tokens that are confirmed and not asked for, from the cache too."""
        self.confirmed.clear()
        self.sequence.truncate(len(self.tokens))

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; what the cache holds of them is kept."""
        self.confirmed.clear()
        del self.tokens[length:]
        self.start = min(self.start, length)
        self.sequence.truncate(max(length - 1, 0))  # the last one is read again for its logits
        self.next = None
        if self.drafter is not None:
            self.drafter.truncate(len(self.tokens))

    def fork(self, **changes: float) -> "Session":
        """A second text that begins as this one does, and shares its pages; it does not draft.

        `changes` are of its sampling: with another `choice` it has other random numbers.
        """
        other = self._new(with_changes(self.sampling, **changes))  # type: ignore[arg-type]
        other.tokens, other.start, other.next = list(self.tokens), self.start, self.next
        other.sequence = self.sequence.fork(len(self.tokens))
        return other

    def _new(self, sampling: Sampling) -> "Session":
        return Session(self.engine, sampling)

    def use(self, drafter: Drafter | None) -> None:
        """Draft by another drafter from here on."""
        if self.drafter is not None:
            self.drafter.close()
        self.drafter = drafter

    def with_sampling(self, **changes: float) -> None:
        """Change sampling options from here on."""
        self.sampling = with_changes(self.sampling, **changes)  # type: ignore[arg-type]

    def close(self) -> None:
        """Give the text's pages back to the cache."""
        self.confirmed.clear()
        self.sequence.close()
        self.tokens.clear()
        self.next = None
        if self.drafter is not None:
            self.drafter.close()


def step_all(sessions: list[Session]) -> list[int]:
    """One new token for each text of one engine, all in one forward pass: what `step` gives each.

    Raises ContextError where `step` would; none of them has changed then.
    """
    engine = sessions[0].engine
    start, native = time.perf_counter(), engine.native_seconds
    due = [s for s in sessions if not s.confirmed and len(s.tokens) - s.sequence.length == 1]
    if due:
        counts = [wanted(s.tokens, s.sampling, engine.vocabulary, s.start) for s in due]
        ids, logits = engine.best([Work(s.sequence, s.tokens[-1:]) for s in due], max(counts))
        for row, s in enumerate(due):
            s.next = ids[row], logits[row]
    took = time.perf_counter() - start, engine.native_seconds - native
    out = []
    for s in sessions:
        s.stats.decode_seconds += took[0] / len(sessions)
        s.stats.native_seconds += took[1] / len(sessions)
        out.append(s.step())
    return out
