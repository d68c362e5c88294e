"""How the tokens of one pass are shared among prompts, and what is counted of passes."""

from dataclasses import dataclass

from chalot.engine.text import Text


@dataclass
class SchedulerStats:
    """What was done since the scheduler was made, and how it stands."""

    waiting: int = 0
    running: int = 0
    pages: int = 0
    pages_used: int = 0  # those of the prefix cache included
    prefix_pages: int = 0
    prefix_hits: int = 0  # requests that found at least one page of their prompt
    prompt_tokens: int = 0  # of requests that were let in
    cached_tokens: int = 0  # of those, that were in the cache already
    read_tokens: int = 0  # in passes
    new_tokens: int = 0
    passes: int = 0
    pass_seconds: float = 0.0
    last_pass_seconds: float = 0.0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Due:
    """What a text reads in a pass: so many tokens, logits after the last, all, or none of them."""

    text: Text
    tokens: int
    wanted: str


def shares(prompts: list[Text], chunk: int, rows: int) -> dict[Text, int]:
    """Tokens of each prompt in a pass: half of the chunk to the oldest, the rest in equal parts.

    What one does not need, the others share. Prompts that are scored give a row of logits for each
    token, and there may be so many `rows`.
    """
    left = {t: t.unread for t in prompts}
    for text in prompts:
        if text.scoring:
            left[text] = min(left[text], max(1, rows))
            rows -= left[text]
    out = dict.fromkeys(prompts, 0)
    budget = chunk
    for text in prompts[:1]:
        out[text] = min(left[text], -(-budget // 2))
        budget -= out[text]
    while budget and (open_ := [t for t in prompts if out[t] < left[t]]):
        part = max(1, budget // len(open_))
        for text in open_[:budget]:
            more = min(part, left[text] - out[text])
            out[text] += more
            budget -= more
    return out
