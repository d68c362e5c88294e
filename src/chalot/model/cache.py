"""The paged key/value cache: pages of 256 positions in one reserved region, handed out as needed.

Memory is reserved when the cache is made and taken by the system when a page is first written, so
a cache for a long context costs only what a conversation fills. Sequences with the same beginning
share its pages; one that goes on in a page that others read too takes a copy of it first. Where
queries see a window only, pages that lie behind it are given back, and have the number -1.
"""

import mmap

import numpy as np
from numpy.typing import NDArray

from chalot.errors import ContextError
from chalot.kernels.program import PAGE, CacheShape
from chalot.model.window import REWIND, Window
from chalot.quant.scheme import PANEL


class Sequence:
    """One text's place in the cache: its pages, and how many positions they hold."""

    def __init__(self, cache: "PageCache") -> None:
        self.cache = cache
        self.pages: list[int] = []
        self.length = 0
        self.gone = cache.sink_pages  # pages before this one, sinks aside, were given back

    def reserve(self, positions: int) -> None:
        """Take pages for that many positions. Raises ContextError when the cache has none left."""
        self._leave_behind()
        last = self.length // PAGE
        if positions > self.length and self.length % PAGE:
            self.pages[last] = self.cache.own(self.pages[last])
        while len(self.pages) * PAGE < positions:
            self.pages.append(self.cache.take())

    def reserve_with_gap(self, positions: int, gone: int) -> None:
        """Take pages for an empty sequence that is to have been given back those before `gone`."""
        count = -(-positions // PAGE)
        for n in range(count):
            behind = self.cache.sink_pages <= n < gone
            self.pages.append(-1 if behind else self.cache.take())
        self.gone = max(self.cache.sink_pages, min(gone, count))

    def missing(self, positions: int) -> int:
        """How many pages `reserve` would take, a copy of one that is shared included."""
        shared = positions > self.length and self.length % PAGE
        copies = int(bool(shared) and self.cache.users[self.pages[self.length // PAGE]] > 1)
        return copies + max(0, -(-positions // PAGE) - len(self.pages))

    def take_over(self, page: int) -> None:
        """Go on with a full page that holds just what follows here; pages must be full so far."""
        self.truncate(self.length)  # a page reserved, and empty
        self.cache.share(page)
        self.pages.append(page)
        self.length += PAGE

    def room(self) -> int:
        """The positions that `reserve` would grant now."""
        free = len(self.cache.free)
        if self.length % PAGE and self.cache.users[self.pages[self.length // PAGE]] > 1:
            free -= 1  # a copy of the page in hand
        return (len(self.pages) + free) * PAGE if free >= 0 else self.length

    def _leave_behind(self) -> None:
        """Give back pages that no query will see, not even after going back by REWIND positions."""
        first = self.cache.window.first(self.length - REWIND) // PAGE
        for n in range(self.gone, min(first, len(self.pages))):
            self.cache.release(self.pages[n])
            self.pages[n] = -1
            self.gone = n + 1

    def truncate(self, length: int) -> None:
        """Forget positions from `length` on, and give back pages that hold nothing else.

        All positions are forgotten where queries at `length` would see pages that are gone.
        """
        if length < self.length and self.gone > self.cache.sink_pages:
            length = length if self.cache.window.first(length) // PAGE >= self.gone else 0
        self.length = min(self.length, length)
        keep = -(-self.length // PAGE)
        for page in reversed(self.pages[keep:]):
            if page >= 0:
                self.cache.release(page)
        del self.pages[keep:]
        self.gone = min(self.gone, max(keep, self.cache.sink_pages))

    def fork(self, length: int | None = None) -> "Sequence":
        """A second sequence that begins as this one does, for `length` positions (all), unread."""
        other = Sequence(self.cache)
        other.length, other.pages, other.gone = self.length, list(self.pages), self.gone
        for page in other.pages:
            if page >= 0:
                self.cache.share(page)
        other.truncate(self.length if length is None else length)
        return other

    def close(self) -> None:
        """Give back all pages."""
        self.truncate(0)


class PageCache:
    """Pages for sequences that share a model: for `positions`, in at most `budget` bytes.

    With a `window`, sequences give back what lies behind it. Raises ContextError where the budget
    is no page, or more than the system gives.
    """

    def __init__(
        self,
        shape: CacheShape,
        positions: int,
        budget: int | None = None,
        window: Window | None = None,
    ) -> None:
        self.shape = shape
        self.window = window or Window()
        self.sink_pages = -(-self.window.sinks // PAGE)
        self.count = -(-positions // PAGE)
        if budget is not None:
            self.count = min(self.count, budget // shape.page_bytes)
        if self.count < 1:
            raise ContextError(
                f"a cache of {budget} bytes holds nothing: {PAGE} positions of this model take "
                f"{shape.page_bytes}; --kv-budget {-(-shape.page_bytes // 1000)}kB would do"
            )
        size = self.count * shape.page_bytes
        try:
            self.region = mmap.mmap(-1, size)
        except (OSError, OverflowError, ValueError) as error:
            raise ContextError(
                f"a cache of {positions} positions needs {size} bytes, and the system refuses them "
                f"({error}); choose a smaller --context"
            ) from None
        if hasattr(mmap, "MADV_HUGEPAGE") and shape.page_bytes >= 1 << 20:
            self.region.madvise(mmap.MADV_HUGEPAGE)
        self.arena: NDArray[np.uint8] = np.frombuffer(self.region, np.uint8)
        self.free = list(range(self.count - 1, -1, -1))
        self.users = [0] * self.count  # sequences that hold a page

    def take(self) -> int:
        """A free page. Raises ContextError when there is none."""
        if not self.free:
            raise ContextError(
                f"all {self.count * PAGE} positions of the cache are in use; "
                "choose a larger --context or --kv-budget, --kv int8, or end a session"
            )
        page = self.free.pop()
        self.users[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more sequence holds the page."""
        self.users[page] += 1

    def release(self, page: int) -> None:
        """A sequence does not need the page any more; without any it is free."""
        self.users[page] -= 1
        if not self.users[page]:
            self.free.append(page)

    def own(self, page: int) -> int:
        """A page with the same content that nobody else holds, itself where that is so already.

        Raises ContextError when a copy is needed and the cache has no free page.
        """
        if self.users[page] == 1:
            return page
        copy = self.take()
        self.page(copy)[:] = self.page(page)
        self.release(page)
        return copy

    def page(self, number: int) -> NDArray[np.uint8]:
        """A page's bytes, in the arena."""
        size = self.shape.page_bytes
        return self.arena[number * size : (number + 1) * size]

    def tables(self, sequences: list[Sequence]) -> NDArray[np.int32]:
        """(sequences, most pages) int32: each sequence's pages, -1 where it has none."""
        width = max(len(s.pages) for s in sequences)
        out = np.full((len(sequences), width), -1, np.int32)
        for row, s in zip(out, sequences, strict=True):
            row[: len(s.pages)] = s.pages
        return out


def cleared(page: NDArray[np.uint8], shape: CacheShape, first: int) -> NDArray[np.uint8]:
    """A copy of a page with zeros in its positions from `first` on: what it held of other texts."""
    out = page.copy()
    heads = out.reshape(shape.layers, 2, shape.kv_heads, -1)
    if shape.kind != "int8":
        heads.reshape(*heads.shape[:3], PAGE, -1)[..., first:, :] = 0
        return out
    codes = heads[..., : PAGE * shape.stride]
    heads[..., PAGE * shape.stride :].reshape(*heads.shape[:3], PAGE, 4)[..., first:, :] = 0
    keys, values = codes[:, 0], codes[:, 1]
    for position in range(first, PAGE):
        panel, row, quad = position // PANEL, position % PANEL, position // 4
        of_keys = keys.reshape(shape.layers, shape.kv_heads, -1, shape.stride // 4, PANEL, 4)
        of_keys[:, :, panel, :, row] = 0
        tiles = values.reshape(shape.layers, shape.kv_heads, shape.stride // 16, -1, PANEL, 4)
        tiles[:, :, :, quad, :, position % 4] = 0
    return out
