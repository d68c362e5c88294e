"""POST /v1/completions (https://platform.openai.com/docs/api-reference/completions).

With echo and logprobs every token of the prompt has its log-probability, so that a model can be
measured through the server as it is in the process.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from chalot.serve.answers import Answers, Delta, Scored
from chalot.serve.chat import head, shown, usage_of
from chalot.serve.events import DONE, as_json, event
from chalot.serve.exchange import Exchange
from chalot.serve.jobs import job_of_completion
from chalot.serve.shapes import CompletionRequest, StreamOptions


def logprobs_of(tokens: Sequence[Scored], start: int) -> dict[str, Any]:
    """Of some tokens; the first begins at character `start` of the text.

    Where two candidates look the same, the likelier one is listed.
    """
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(shown(token.piece))
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        top: dict[str, float] = {}
        for piece, logprob in token.top:
            top.setdefault(shown(piece), logprob)
        tops.append(None if token.logprob is None else top)
    return {
        "tokens": [shown(t.piece) for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def choice(index: int, deltas: Sequence[Delta], scored: bool, start: int) -> dict[str, Any]:
    """One choice, or what a chunk adds to it."""
    tokens = [t for d in deltas for t in d.tokens]
    return {
        "index": index,
        "text": "".join(d.text for d in deltas),
        "logprobs": logprobs_of(tokens, start) if scored else None,
        "finish_reason": deltas[-1].finish,
    }


async def chunks(
    exchange: Exchange, answers: Answers, options: StreamOptions | None
) -> AsyncGenerator[bytes, None]:
    """The stream."""
    common = head(exchange, answers, "text_completion", "cmpl-")
    counted = bool(options and options.include_usage)
    if counted:
        common["usage"] = None
    scored = answers.job.logprobs is not None
    lengths = [0] * len(answers.answers)
    async for index, delta in exchange.deltas(answers):
        if delta.text or delta.tokens or delta.finish:
            made = choice(index, [delta], scored, lengths[index])
            lengths[index] += sum(len(shown(t.piece)) for t in delta.tokens)
            yield event({**common, "choices": [made]})
    if counted:
        yield event({**common, "choices": [], "usage": usage_of(answers)})
    yield DONE


async def handle(exchange: Exchange) -> Any:
    """The route."""
    body = await exchange.body(CompletionRequest)
    served, space = exchange.served, exchange.namespace
    answers = await exchange.begin(
        lambda: job_of_completion(served, body, space), "cmpl-" + exchange.id
    )
    if body.stream:
        return exchange.stream(chunks(exchange, answers, body.stream_options))
    found = await exchange.gathered(answers)
    scored = answers.job.logprobs is not None
    return as_json(
        {
            **head(exchange, answers, "text_completion", "cmpl-"),
            "choices": [choice(i, deltas, scored, 0) for i, deltas in enumerate(found)],
            "usage": usage_of(answers),
        }
    )
