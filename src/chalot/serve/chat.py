"""POST /v1/chat/completions (https://platform.openai.com/docs/api-reference/chat)."""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from chalot.serve.answers import Answers, Delta, Scored
from chalot.serve.events import DONE, as_json, event
from chalot.serve.exchange import Exchange
from chalot.serve.jobs import job_of_chat
from chalot.serve.shapes import ChatRequest, StreamOptions
from chalot.serve.tools import Call


def usage_of(answers: Answers) -> dict[str, Any]:
    """Tokens of prompt and answers."""
    given, new = answers.job.prompt_tokens, answers.new_tokens
    kept, lost = answers.drafts
    drafts = {"accepted_prediction_tokens": kept, "rejected_prediction_tokens": lost}
    return {
        "prompt_tokens": given,
        "completion_tokens": new,
        "total_tokens": given + new,
        "prompt_tokens_details": {"cached_tokens": answers.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0, **drafts},
    }


def shown(piece: bytes) -> str:
    """A token's text; bytes that are no whole character are replaced."""
    return piece.decode("utf-8", "replace")


def one_token(piece: bytes, logprob: float | None) -> dict[str, Any]:
    """A token as chat's logprobs have it."""
    return {"token": shown(piece), "logprob": logprob, "bytes": list(piece)}


def logprobs_of(tokens: Sequence[Scored]) -> dict[str, Any]:
    """Of some tokens."""
    content = [
        {**one_token(t.piece, t.logprob), "top_logprobs": [one_token(*one) for one in t.top]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


def call_of(call: Call) -> dict[str, Any]:
    """A tool call."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def head(exchange: Exchange, answers: Answers, kind: str, prefix: str) -> dict[str, Any]:
    """What every chunk and every whole answer begins with; `seed` is what brings it back."""
    return {
        "id": prefix + exchange.id,
        "object": kind,
        "created": int(time.time()),
        "model": exchange.served.facts.name,
        "system_fingerprint": exchange.served.facts.digest,
        "seed": answers.job.seed,
    }


def whole(index: int, deltas: Sequence[Delta], scored: bool) -> dict[str, Any]:
    """One choice."""
    text = "".join(d.text for d in deltas)
    calls = [call_of(c) for d in deltas for c in d.calls]
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"tool_calls": calls, "content": text or None}
    tokens = [t for d in deltas for t in d.tokens]
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs_of(tokens) if scored else None,
        "finish_reason": deltas[-1].finish,
    }


async def chunks(
    exchange: Exchange, answers: Answers, options: StreamOptions | None
) -> AsyncGenerator[bytes, None]:
    """The stream."""
    common = head(exchange, answers, "chat.completion.chunk", "chatcmpl-")
    counted = bool(options and options.include_usage)
    if counted:
        common["usage"] = None
    scored = answers.job.logprobs is not None

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return event({**common, "choices": [choice]})

    for index in range(len(answers.answers)):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    calls = [0] * len(answers.answers)
    async for index, delta in exchange.deltas(answers):
        said: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if delta.calls:
            first = calls[index]
            calls[index] += len(delta.calls)
            listed = [{"index": n, **call_of(c)} for n, c in enumerate(delta.calls, first)]
            said["tool_calls"] = listed
        more = {"logprobs": logprobs_of(delta.tokens)} if scored and delta.tokens else {}
        if said or more:
            yield chunk(index, said, **more)
        if delta.finish:
            yield chunk(index, {}, finish_reason=delta.finish)
    if counted:
        yield event({**common, "choices": [], "usage": usage_of(answers)})
    yield DONE


async def handle(exchange: Exchange) -> Any:
    """The route."""
    body = await exchange.body(ChatRequest)
    served, space = exchange.served, exchange.namespace
    answers = await exchange.begin(
        lambda: job_of_chat(served, body, space), "chatcmpl-" + exchange.id
    )
    if body.stream:
        return exchange.stream(chunks(exchange, answers, body.stream_options))
    found = await exchange.gathered(answers)
    scored = answers.job.logprobs is not None
    return as_json(
        {
            **head(exchange, answers, "chat.completion", "chatcmpl-"),
            "choices": [whole(i, deltas, scored) for i, deltas in enumerate(found)],
            "usage": usage_of(answers),
        }
    )
