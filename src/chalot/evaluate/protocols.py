"""Ways of counting perplexity. Figures of one protocol are never to be compared with another's.

    chalot       disjoint windows of 512 tokens, every token but a window's first is scored
    llama.cpp    disjoint windows of 512, begun by the beginning-of-text token where the tokenizer
                 adds one; the second half of each is scored (llama.cpp, tools/perplexity)
    huggingface  disjoint windows of 2,048, every token but a window's first (the fixed-length
                 perplexity of transformers' documentation, stride = window, as GPTQ's papers do)

A window is never longer than the context; a shorter last one is left out, unless it is all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from chalot.errors import ContextError, FormatError


@dataclass(frozen=True)
class Protocol:
    """`scored` is the share of a window after which its tokens count."""

    name: str
    window: int
    scored: float = 0.0
    begins: bool = False  # each window's first token becomes the beginning of text
    asked: int = 0  # tokens of a window, where it had to be shorter

    def first(self, size: int) -> int:
        """The first position of a window whose next token is scored."""
        return int(size * self.scored)

    def __str__(self) -> str:
        part = "all but the first" if not self.scored else f"the last {1 - self.scored:.0%}"
        cut = f" and not {self.asked}, for want of context or text" if self.asked else ""
        return f"{self.name} (disjoint windows of {self.window} tokens{cut}, {part} scored)"

    def within(self, context: int, tokens: int) -> "Protocol":
        """As it is where a model, or a text, has no more."""
        size = min(self.window, context, tokens)
        return self if size == self.window else replace(self, window=size, asked=self.window)


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("chalot", 512),
        Protocol("llama.cpp", 512, 0.5, True),
        Protocol("huggingface", 2048),
    )
}
PROTOCOL = PROTOCOLS["chalot"]


def windows(ids: Sequence[int], size: int) -> Iterator[list[int]]:
    """Disjoint windows of a text, the short rest left out unless it is all there is."""
    if len(ids) < 2:
        raise ContextError(f"the text has {len(ids)} tokens; at least two are needed")
    if len(ids) < size:
        yield list(ids)
    for at in range(0, len(ids) - size + 1, size):
        yield list(ids[at : at + size])


def check_count(what: str, count: int | None) -> None:
    """Raise FormatError for a count below one."""
    if count is not None and count < 1:
        raise FormatError(f"{what} {count}; expected at least 1")


def check_protocol(name: str) -> None:
    """Raise FormatError for one that is not known."""
    if name not in PROTOCOLS:
        raise FormatError(f"protocol {name!r} is not known; choose {', '.join(PROTOCOLS)}")
