"""Text of a growing sequence of tokens: whole characters, cut at stop strings."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chalot.text.tokenizer import Tokenizer


class _Stop:
    """One stop string and how much of it the text ends with (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._shorter = [0]  # for each beginning, the longest proper one that it ends with
        for letter in text[1:]:
            self._shorter.append(self._longest(self._shorter[-1], letter))

    def _longest(self, matched: int, letter: str) -> int:
        while matched and self.text[matched] != letter:
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == letter)

    def push(self, letter: str) -> bool:
        """Whether the text now ends with the whole stop string; after that, nothing may follow."""
        self.matched = self._longest(self.matched, letter)
        return self.matched == len(self.text)


class TextStream:
    """Push token ids, show what comes back.

    Concatenated, `push` and `flush` give what `tokenizer.decode` gives for all ids, cut at the
    stop string that is complete first (of several that end together, the longest). Text that may
    still become a stop string is held back. `stopped` is the stop string that was found, `None`
    before; then further ids give nothing.
    """

    def __init__(
        self, tokenizer: "Tokenizer", stop: Iterable[str] = (), *, skip_specials: bool = True
    ) -> None:
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(one, str) and one for one in stops):
            raise ValueError(
                f"found the stop strings {stops!r:.80}, expected texts that are not empty"
            )
        self.stopped: str | None = None
        self._text = tokenizer.incremental(skip_specials=skip_specials)
        self._stops = sorted((_Stop(one) for one in stops), key=lambda one: -len(one.text))
        self._held = ""

    def push(self, token: int) -> str:
        """Text that can be shown once this token is there, possibly none."""
        return "" if self.stopped is not None else self._shown(self._text.push(token))

    def flush(self) -> str:
        """What was held back, when no further tokens come."""
        if self.stopped is not None:
            return ""
        shown = self._shown(self._text.flush())
        held, self._held = self._held, ""
        return shown if self.stopped is not None else shown + held

    def _shown(self, text: str) -> str:
        if not self._stops:
            return text
        for position, letter in enumerate(text):
            found = [stop for stop in self._stops if stop.push(letter)]
            if found:
                self.stopped = found[0].text
                whole = self._held + text[: position + 1]
                self._held = ""
                return whole[: len(whole) - len(self.stopped)]
        whole = self._held + text
        keep = max(stop.matched for stop in self._stops)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]
