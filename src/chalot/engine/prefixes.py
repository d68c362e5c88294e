"""Full pages that were read before, found by what they hold: a hash chain over their tokens.

key(page n) = BLAKE2b(key(page n - 1), tokens of page n); the chain starts from the namespace, so
what one API key's prompts put here, another's never finds. Least recently used pages leave first,
and a page leaves before the one it goes on from; those that a live text uses stay.
"""

from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

from chalot.kernels.program import PAGE
from chalot.model.cache import PageCache


class PrefixCache:
    """Keys to pages, of which it holds each once more; at most `most` pages."""

    def __init__(self, cache: PageCache, most: int) -> None:
        self.cache = cache
        self.most = most
        self.pages: OrderedDict[bytes, int] = OrderedDict()  # least recently used first

    def extend(self, keys: list[bytes], tokens: list[int], namespace: bytes) -> None:
        """Add the keys of all full pages of `tokens` that are not in `keys` yet."""
        while (len(keys) + 1) * PAGE <= len(tokens):
            page = np.array(tokens[len(keys) * PAGE : (len(keys) + 1) * PAGE], "<i4")
            before = keys[-1] if keys else blake2b(namespace, digest_size=32).digest()
            keys.append(blake2b(before + page.tobytes(), digest_size=32).digest())

    def find(self, key: bytes) -> int | None:
        """The page of a key."""
        return self.pages.get(key)

    def touch(self, keys: Iterable[bytes]) -> None:
        """A chain, first page first, was used: its last page is the one to leave first."""
        for key in reversed(list(keys)):
            if key in self.pages:
                self.pages.move_to_end(key)

    def add(self, key: bytes, page: int) -> None:
        """Hold a full page, if there is room for one more and it is not here yet."""
        if key in self.pages or not self.most:
            return
        if len(self.pages) >= self.most and not self.evict():
            return
        self.cache.share(page)
        self.pages[key] = page

    def evict(self) -> bool:
        """Free the page that was used least recently, of those that nothing else holds."""
        for key, page in self.pages.items():
            if self.cache.users[page] == 1:
                del self.pages[key]
                self.cache.release(page)
                return True
        return False

    def evictable(self) -> int:
        """Pages that could be freed."""
        return sum(self.cache.users[page] == 1 for page in self.pages.values())

    def clear(self) -> None:
        """Let go of everything."""
        for page in self.pages.values():
            self.cache.release(page)
        self.pages.clear()
