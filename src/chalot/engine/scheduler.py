"""Many requests at once: every pass reads what each of them is due, and each gets its own bits.

A pass holds one token of every text that is being answered, and at most `chunk` tokens of prompts:
half for the oldest prompt, the rest in equal shares, so that a long one neither waits for ever nor
keeps short ones waiting. A request is let in when the cache has pages for its prompt. Where pages
run out, beginnings that are kept for later leave first, then the youngest text gives up its own;
it reads them again when there is room, and by the exactness contract goes on as if nothing was.
"""

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from chalot.engine.drafting import Drafter, TextDrafter
from chalot.engine.generate import CHUNK, FEW, Engine, Work
from chalot.engine.pacing import Costs
from chalot.engine.plan import Due, SchedulerStats, SharedCosts, check, no_pages, shares
from chalot.engine.prefixes import PrefixCache
from chalot.engine.requests import (
    NO_TOKEN,
    Mask,
    OutOfPages,
    PromptToken,
    QueueFull,
    Request,
    Step,
    Ticket,
)
from chalot.engine.sampler import SamplingError
from chalot.engine.text import Floats, Text, few_of
from chalot.errors import ChalotError
from chalot.kernels.program import PAGE

__all__ = [
    "NO_TOKEN",
    "Mask",
    "OutOfPages",
    "PromptToken",
    "QueueFull",
    "Request",
    "Scheduler",
    "SchedulerStats",
    "Step",
    "Ticket",
]
LOG = logging.getLogger("chalot.engine")
NO_ROWS = np.zeros((0, 0), np.float32)
NO_BEST = np.zeros((0, 0), np.int32), NO_ROWS
Ids = NDArray[np.int32]
ROWS_BYTES = 64 << 20  # of logits that one pass may give for log-probabilities of prompts


class Scheduler:
    """Requests in, steps out. `submit` and `cancel` from any thread, `run_once` in one at a time.

    At most `slots` requests run, and `queue` more wait. The engine's cache is the scheduler's own.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        slots: int,
        chunk: int = CHUNK,
        queue: int = 256,
        prefix_pages: int | None = None,
        drafter: Callable[[Costs], Drafter] | None = TextDrafter,
    ) -> None:
        if min(slots, chunk) < 1 or queue < 0:
            raise SamplingError(f"found {slots} slots, chunk {chunk}, queue {queue}; expected more")
        self.engine = engine
        self.slots, self.chunk, self.queue = slots, chunk, queue
        cache = engine.cache
        self.prefixes = PrefixCache(cache, cache.count if prefix_pages is None else prefix_pages)
        self.running: list[Text] = []  # oldest first
        self.waiting: deque[Text] = deque()
        self.new_drafter = drafter
        self.costs = copy.deepcopy(engine.costs)  # passes of several texts are measured apart
        self.drafting = SharedCosts(self.costs)
        self.lock = threading.Lock()  # over `waiting`; the rest is the running thread's
        self.woken: Callable[[], None] = lambda: None  # called when there is something to do
        self._stats = SchedulerStats(pages=cache.count)

    # ---- from any thread

    def submit(
        self,
        request: Request,
        on_step: Callable[[Step], None] | None = None,
        on_error: Callable[[ChalotError], None] | None = None,
    ) -> Ticket:
        """Put a request in the queue.

        Raises QueueFull, ContextError for a prompt that does not fit or has other ids than the
        model, OutOfPages for one that the whole cache cannot hold, SamplingError.
        """
        check(request, self.engine)
        steps: SimpleQueue[Step | ChalotError] = SimpleQueue()
        ticket = Ticket(request, on_step or steps.put, on_error or steps.put, steps)
        drafter = None if self.new_drafter is None else self.new_drafter(self.drafting)
        text = Text(ticket, self.engine.cache, self.engine.context, drafter)
        with self.lock:
            if len(self.waiting) >= self.queue + max(0, self.slots - len(self.running)):
                raise QueueFull(
                    f"{len(self.waiting)} requests wait already, and no more may; try again later"
                )
            self.waiting.append(text)
        self.woken()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request before the next pass; it gets a step that is finished: "cancelled"."""
        ticket.cancelled = True
        self.woken()

    @property
    def stats(self) -> SchedulerStats:
        """A copy of the counts as they are now."""
        cache, s = self.engine.cache, self._stats
        return SchedulerStats(
            **{
                **vars(s),
                "waiting": len(self.waiting),
                "running": len(self.running),
                "pages_used": cache.count - len(cache.free),
                "prefix_pages": len(self.prefixes.pages),
            }
        )

    # ---- from the thread that runs

    def run_once(self) -> bool:
        """One forward pass over all that is due; False: there was nothing to do."""
        busy = self._drop_cancelled()
        self._admit()
        due = [d for d in self._plan() if self._make_room(d)]
        due = [d for d in due if d.text in self.running]  # a later one may have taken its pages
        if not due:
            return busy or bool(self.running or self.waiting)
        start = time.perf_counter()
        try:
            self._pass(due)
        except ChalotError as error:  # of the pass, so of all that were in it
            for d in due:
                self._fail(d.text, error)
        took = time.perf_counter() - start
        self._stats.passes += 1
        self._stats.pass_seconds += took
        self._stats.last_pass_seconds = took
        return True

    def _drop_cancelled(self) -> bool:
        with self.lock:
            gone = [t for t in self.waiting if t.ticket.cancelled]
            for text in gone:
                self.waiting.remove(text)
        gone += [t for t in self.running if t.ticket.cancelled]
        for text in gone:
            self._stats.cancelled += 1
            self._leave(text)
            self._tell(text, Step(NO_TOKEN, finished="cancelled"))
        return bool(gone)

    def _admit(self) -> None:
        """Let waiting requests in, in their order, while there are slots and pages."""
        while len(self.running) < self.slots:
            with self.lock:
                if not self.waiting:
                    return
                text = self.waiting[0]
            self._reuse(text)
            need = text.sequence.missing(len(text.tokens) + 1)
            promised = 1 + sum(t.sequence.missing(len(t.tokens) + 1) for t in self.running)
            room = len(self.engine.cache.free) - promised
            if self.running and need > room and need > room + self.prefixes.evictable():
                self._give_back(text)
                return
            with self.lock:
                self.waiting.popleft()
            self.running.append(text)
            if not text.let_in:
                text.let_in = True
                self._stats.prompt_tokens += text.start

    def _reuse(self, text: Text) -> None:
        """Take over full pages that were read before; the last token is always left to read."""
        at = text.sequence.length
        if at % PAGE or text.scoring:
            return
        self.prefixes.extend(text.keys, text.tokens, text.request.namespace)
        for n in range(at // PAGE, (len(text.tokens) - 1) // PAGE):
            page = self.prefixes.find(text.keys[n])
            if page is None:
                break
            text.sequence.take_over(page)
            text.kept = n + 1
            text.found += PAGE
        self.prefixes.touch(text.keys[: text.sequence.length // PAGE])

    def _plan(self) -> list[Due]:
        """What each text reads in the next pass, oldest first."""
        prompts = []
        claimed: set[bytes] = set()  # pages that an older text is about to read
        for text in self.running:
            if text.unread <= 1:
                continue
            self._reuse(text)
            n = text.sequence.length // PAGE
            if n < len(text.keys) and not text.scoring and self.prefixes.most:
                finds = text.sequence.length % PAGE == 0 and text.unread > PAGE
                if finds and text.keys[n] in claimed:
                    continue  # soon it need not be read
                claimed.add(text.keys[n])
            prompts.append(text)
        parts = shares(prompts, self.chunk, ROWS_BYTES // 4 // self.engine.vocabulary)
        out = []
        for text in self.running:
            tokens = parts.get(text, 0) if text.unread > 1 else 1
            if tokens:
                wanted = "last" if tokens == text.unread else "none"
                out.append(Due(text, tokens, "all" if text.scoring else wanted))
        return out

    def _make_room(self, due: Due) -> bool:
        """Pages for what a text reads; others' if need be. False: it has to wait, or has failed."""
        text, cache = due.text, self.engine.cache
        if text not in self.running:  # gave up its pages to an older one
            return False
        end = text.sequence.length + due.tokens
        while text.sequence.missing(end) > len(cache.free):
            if self.prefixes.evict():
                continue
            youngest = self.running[-1]
            if youngest is text and len(self.running) == 1:
                self._fail(text, OutOfPages(no_pages(end, cache.count)))
                return False
            self._preempt(youngest)
            if youngest is text:
                return False
        text.sequence.reserve(end)
        return True

    def _preempt(self, text: Text) -> None:
        """Take a text's pages; it is the first to be let in again."""
        self.running.remove(text)
        self._give_back(text)
        with self.lock:
            self.waiting.appendleft(text)
        self._stats.preemptions += 1

    def _give_back(self, text: Text) -> None:
        text.sequence.close()
        text.kept = text.found = 0

    def _pass(self, due: list[Due]) -> None:
        engine, start = self.engine, time.perf_counter()
        self._draft(due)
        work = [
            Work(
                d.text.sequence,
                d.text.tokens[d.text.sequence.length :][: d.tokens] + d.draft,
                d.wanted,
            )
            for d in due
        ]
        ending = [d for d in due if d.wanted != "none"]
        counts = {d.text: d.text.count(engine.vocabulary, d.draft) for d in ending}
        few = max(counts.values(), default=1)
        whole = few > FEW or any(d.text.needs_row() or d.text.scoring for d in ending)
        rows = engine.step(work) if whole else NO_ROWS
        best_ids, best_logits = NO_BEST if whole else engine.best(work, few)
        tokens = sum(d.tokens + len(d.draft) for d in due)
        self._stats.read_tokens += tokens
        at = 0
        for d in due:
            here = slice(at, at + d.rows)
            at += d.rows
            self._end(d, rows[here], best_ids[here], best_logits[here], counts.get(d.text, 0))
        if all(d.tokens == 1 for d in due):  # nothing but decoding
            self.costs.note(tokens, time.perf_counter() - start)

    def _draft(self, due: list[Due]) -> None:
        """Let texts that are being answered draft, as far as it pays beside the others."""
        if self.new_drafter is None:
            return
        self.drafting.texts = len(due)
        if any(d.tokens > 1 for d in due) or not self.drafting.pays():
            return  # (beside a prompt every token costs its full price)
        for d in due:
            d.draft = d.text.propose()
            d.wanted = "all" if d.draft else d.wanted
            self._stats.drafted += len(d.draft)
            d.text.ticket.drafted += len(d.draft)

    def _end(self, due: Due, rows: Floats, best_ids: Ids, best_logits: Floats, count: int) -> None:
        """Take what a pass has given one of its texts, and tell."""
        text, exp = due.text, self.engine.exp
        try:
            if text.scoring:
                text.score(rows, exp)
            self._keep(text)
            if due.wanted == "none" or text.unread > 0:
                return
            if len(text.tokens) == text.start:  # before the first step
                text.ticket.cached_tokens = text.found
            if not text.request.max_tokens:
                steps = [text.nothing_more()]
            elif text.needs_row():
                steps = [text.from_row(rows[-1], exp)]
            else:
                rows = rows if due.draft else rows[-1:]
                steps = text.from_best(
                    due.draft,
                    lambda n: (
                        few_of(rows[n], count) if len(rows) else (best_ids[n], best_logits[n])
                    ),
                    exp,
                )
        except ChalotError as error:
            self._fail(text, error)
            return
        self._stats.accepted += len(steps) - 1
        text.ticket.accepted += len(steps) - 1
        for step in steps:
            self._count(text, step)
            if step.finished:
                self._stats.finished += 1
                self._leave(text)
            if not self._tell(text, step):
                return

    def _count(self, text: Text, step: Step) -> None:
        self._stats.new_tokens += step.token != NO_TOKEN
        if len(text.tokens) - text.start <= 1:  # the first step
            self._stats.cached_tokens += text.ticket.cached_tokens
            self._stats.prefix_hits += text.ticket.cached_tokens > 0

    def _keep(self, text: Text) -> None:
        """Offer the pages that a text has filled to others that begin alike."""
        full = min(text.sequence.length, len(text.tokens)) // PAGE  # a draft is not known yet
        if full > text.kept:
            self.prefixes.extend(text.keys, text.tokens, text.request.namespace)
            for n in range(text.kept, full):
                self.prefixes.add(text.keys[n], text.sequence.pages[n])
            self.prefixes.touch(text.keys[:full])
            text.kept = full

    def _leave(self, text: Text) -> None:
        """Free a text's slot and pages."""
        if text in self.running:
            self.running.remove(text)
        self._give_back(text)
        text.ticket.done = True
        if text.drafter is not None:
            text.drafter.close()

    def _tell(self, text: Text, step: Step) -> bool:
        """Whether whoever asked could be told; if not, the request ends alone."""
        try:
            text.ticket.on_step(step)
        except Exception as error:
            LOG.error("a request's on_step failed, and is cancelled: %r", error)
            if not text.ticket.done:
                self._stats.cancelled += 1
                self._leave(text)
            return False
        return True

    def _fail(self, text: Text, error: ChalotError) -> None:
        self._stats.failed += 1
        self._leave(text)
        text.ticket.on_error(error)

    def fail_all(self, error: ChalotError) -> None:
        """End all requests with an error."""
        with self.lock:
            texts = [*self.waiting, *self.running]
            self.waiting.clear()
        for text in texts:
            self._fail(text, error)

    def close(self) -> None:
        """End all requests, and give back what the prefix cache holds."""
        for text in [*self.waiting, *self.running]:
            text.ticket.cancelled = True
        self._drop_cancelled()
        self.prefixes.clear()
