"""The paged key/value cache: pages of 256 positions in one reserved region, handed out as needed.

Memory is reserved when the cache is made and taken by the system when a page is first written, so
a cache for a long context costs only what a conversation fills. Sequences with the same beginning
share its pages; one that goes on in a page that others read too takes a copy of it first.
"""

import mmap

import numpy as np
from numpy.typing import NDArray

from chalot.errors import ContextError
from chalot.kernels.program import PAGE, CacheShape


class Sequence:
    """One text's place in the cache: its pages, and how many positions they hold."""

    def __init__(self, cache: "PageCache") -> None:
        self.cache = cache
        self.pages: list[int] = []
        self.length = 0

    def reserve(self, positions: int) -> None:
        """Take pages for that many positions. Raises ContextError when the cache has none left."""
        last = self.length // PAGE
        if positions > self.length and self.length % PAGE:
            self.pages[last] = self.cache.own(self.pages[last])
        while len(self.pages) * PAGE < positions:
            self.pages.append(self.cache.take())

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

    def truncate(self, length: int) -> None:
        """Forget positions from `length` on, and give back pages that hold nothing else."""
        self.length = min(self.length, length)
        keep = -(-self.length // PAGE)
        for page in reversed(self.pages[keep:]):
            self.cache.release(page)
        del self.pages[keep:]

    def fork(self, length: int | None = None) -> "Sequence":
        """A second sequence that begins as this one does, for `length` positions (all), unread."""
        other = Sequence(self.cache)
        other.length = self.length if length is None else min(length, self.length)
        other.pages = self.pages[: -(-other.length // PAGE)]
        for page in other.pages:
            self.cache.share(page)
        return other

    def close(self) -> None:
        """Give back all pages."""
        self.truncate(0)


class PageCache:
    """Pages for sequences that share a model: for `positions`, in at most `budget` bytes.

    Raises ContextError where that is no page, or more than the system gives.
    """

    def __init__(self, shape: CacheShape, positions: int, budget: int | None = None) -> None:
        self.shape = shape
        self.count = -(-positions // PAGE)
        if budget is not None:
            self.count = min(self.count, budget // shape.page_bytes)
        if not self.count:
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
        copy, size = self.take(), self.shape.page_bytes
        self.arena[copy * size :][:size] = self.arena[page * size :][:size]
        self.release(page)
        return copy

    def tables(self, sequences: list[Sequence]) -> NDArray[np.int32]:
        """(sequences, most pages) int32: each sequence's pages, -1 where it has none."""
        width = max(len(s.pages) for s in sequences)
        out = np.full((len(sequences), width), -1, np.int32)
        for row, s in zip(out, sequences, strict=True):
            row[: len(s.pages)] = s.pages
        return out
