"""A streaming window: text without end, a cache that stays. Xiao et al., arXiv 2309.17453.

A query sees the last `window` positions, its own included, and the first `sinks` ones, to which
attention's weight goes that finds nothing better. Keys keep the angle of their own position; for
the sinks a query is turned as if it stood at position sinks + window - 1, so that distances are
those within the cache, as in the paper, and never larger than sinks + window - 1. Until the window
has left the sinks behind nothing differs from attention to everything, to the last bit.

A layer whose own window is smaller keeps it, without sinks. What lies before the window is not
remembered, but for what layers above have gathered from it: each sees a window further back.
"""

from dataclasses import dataclass

import msgspec

from chalot.errors import ContextError
from chalot.kernels.program import PAGE
from chalot.model.config import ModelConfig

LONGEST = 1 << 20  # positions: beyond, angles leave what sines are made for
REWIND = PAGE  # positions behind the window that are kept, so that a text may go back a little
SINKS = 4


@dataclass(frozen=True)
class Window:
    """`size` positions and `sinks`; a size of 0 is no window: a query sees all."""

    size: int = 0
    sinks: int = 0

    @classmethod
    def parse(cls, size: int | None, sinks: int | None, context: int) -> "Window":
        """What was asked for, of a model with that context. Raises ContextError if it is none."""
        if size is None:
            if sinks is not None:
                raise ContextError(f"--sinks {sinks}: only with a window; add --window {PAGE}")
            return cls()
        sinks = SINKS if sinks is None else sinks
        if size < 1:
            raise ContextError(f"--window {size}: expected 1 position or more")
        if not 0 <= sinks <= PAGE or sinks >= size:
            raise ContextError(
                f"--sinks {sinks}: expected 0 to {min(PAGE, size - 1)}, fewer than --window {size}"
            )
        if size + sinks > context:
            raise ContextError(
                f"--window {size} and --sinks {sinks} are more than the {context} positions that "
                f"the model was made for; choose --window {context - sinks} at most"
            )
        return cls(size, sinks)

    def of(self, config: ModelConfig) -> ModelConfig:
        """The model with this window in each layer that has no smaller one of its own."""
        if not self.size:
            return config
        own = [config.window(i) for i in range(config.layers)]
        ours = [not 0 < window < self.size for window in own]
        windows = [self.size if mine else window for mine, window in zip(ours, own, strict=True)]
        sinks = [self.sinks if mine else 0 for mine in ours]
        return msgspec.structs.replace(config, windows=tuple(windows), sinks=tuple(sinks))

    def first(self, position: int) -> int:
        """The first position that a query sees, sinks aside."""
        return max(0, position + 1 - self.size) if self.size else 0

    def positions(self, context: int, tokens: int) -> int:
        """Positions of the cache that a text of a whole context needs, read `tokens` at a time."""
        if not self.size:
            return context
        return min(
            context, self.size + tokens + REWIND + 3 * PAGE
        )  # sinks; pages begun at both ends
