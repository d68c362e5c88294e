"""POST /v1/messages: Anthropic's API (https://docs.anthropic.com/en/api/messages).

A conversation in its shape becomes one in OpenAI's, and the answer goes back in its own.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from chalot.serve.answers import Answers, Delta
from chalot.serve.events import as_json, event
from chalot.serve.exchange import Exchange
from chalot.serve.faults import Fault
from chalot.serve.jobs import Job, Talk, chat_job, check_model, sampling_of, template_tools
from chalot.serve.served import Served
from chalot.serve.settings import MOST_STOPS
from chalot.serve.shapes import Count, Function, Json, Name, Positive, Share, Stop, Tool

ENDS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class TextBlock(Struct, tag_field="type", tag="text"):
    """Text."""

    text: str


class ToolUse(Struct, tag_field="type", tag="tool_use"):
    """What the model asked for."""

    id: str
    name: str
    input: Json


class ToolResult(Struct, tag_field="type", tag="tool_result"):
    """What a tool gave back."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


class Turn(Struct):
    """One turn."""

    role: Literal["user", "assistant"]
    content: str | list[TextBlock | ToolUse | ToolResult]


class AnthropicTool(Struct, forbid_unknown_fields=True):
    """A tool, and a JSON schema of its input."""

    name: Name
    input_schema: Json
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: Json | None = None  # no effect: beginnings are always kept
    strict: bool | None = None


class ToolChoice(Struct, forbid_unknown_fields=True):
    """Whether tools are to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class CountRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages/count_tokens"""

    messages: Annotated[list[Turn], Meta(min_length=1, max_length=10_000)]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None


class MessagesRequest(CountRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages"""

    max_tokens: Positive
    stop_sequences: Annotated[list[Stop], Meta(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    temperature: Share | None = None
    top_p: Share | None = None
    top_k: Count | None = None
    metadata: Json | None = None  # without effect
    service_tier: str | None = None


def _joined(content: str | Sequence[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "".join(b.text for b in content or ())


def _turn(turn: Turn) -> list[dict[str, Any]]:
    """A turn as messages of a chat template: results of tools are turns of their own."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    out: list[dict[str, Any]] = []
    text, calls = "", []
    for block in turn.content:
        if isinstance(block, TextBlock):
            text += block.text
        elif isinstance(block, ToolUse):
            function = {"name": block.name, "arguments": block.input}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            said = {"role": "tool", "content": _joined(block.content)}
            out.append({**said, "tool_call_id": block.tool_use_id})
    if calls:
        out.append({"role": "assistant", "content": text, "tool_calls": calls})
    elif text or not out:
        out.append({"role": turn.role, "content": text})
    return out


def talk_of(body: CountRequest) -> Talk:
    """The conversation, without limits."""
    messages = [m for turn in body.messages for m in _turn(turn)]
    if body.system is not None:
        messages.insert(0, {"role": "system", "content": _joined(body.system)})
    choice = body.tool_choice or ToolChoice("auto")
    if choice.type == "tool" and choice.name is None:
        raise Fault("tool_choice: a tool needs its name", param="tool_choice")
    named = {"any": "required", "tool": f"={choice.name}"}
    return Talk(
        messages,
        tuple(
            Tool(Function(t.name, t.description, t.input_schema), "function")
            for t in body.tools or ()
        ),
        named.get(choice.type, choice.type),
        not choice.disable_parallel_tool_use,
    )


def job_of(served: Served, body: MessagesRequest, namespace: bytes) -> Job:
    """The request as a job."""
    check_model(served, body.model)
    stops = tuple(body.stop_sequences or ())
    talk = replace(talk_of(body), max_tokens=body.max_tokens, stops=stops)
    return chat_job(served, talk, sampling_of(served, body), namespace)


def usage_of(answers: Answers) -> dict[str, int]:
    """Tokens; those that were in the cache are counted apart."""
    cached = answers.cached_tokens
    return {
        "input_tokens": answers.job.prompt_tokens - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": answers.new_tokens,
    }


def end_of(delta: Delta) -> dict[str, Any]:
    """Why it ended."""
    if delta.stopped is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": delta.stopped}
    reason = ENDS.get(delta.finish or "", delta.finish)
    return {"stop_reason": reason, "stop_sequence": None}


def head(exchange: Exchange) -> dict[str, Any]:
    """What a message begins with."""
    return {
        "id": "msg_" + exchange.id,
        "type": "message",
        "role": "assistant",
        "model": exchange.served.facts.name,
    }


def whole(deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    """The blocks of an answer."""
    text = "".join(d.text for d in deltas)
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    for call in (c for d in deltas for c in d.calls):
        given = msgspec.json.decode(call.arguments)
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
    return blocks


async def chunks(exchange: Exchange, answers: Answers) -> AsyncGenerator[bytes, None]:
    """The stream: blocks one after the other."""

    def send(kind: str, **fields: Any) -> bytes:
        return event({"type": kind, **fields}, kind)

    empty = {"stop_reason": None, "stop_sequence": None}
    first = {**head(exchange), "content": [], **empty, "usage": usage_of(answers)}
    yield send("message_start", message=first)
    index, open_ = 0, False
    async for _, delta in exchange.deltas(answers):
        if delta.text:
            if not open_:
                block = {"type": "text", "text": ""}
                yield send("content_block_start", index=index, content_block=block)
                open_ = True
            said = {"type": "text_delta", "text": delta.text}
            yield send("content_block_delta", index=index, delta=said)
        for call in delta.calls:
            if open_:
                yield send("content_block_stop", index=index)
                index, open_ = index + 1, False
            asked = {"id": call.id, "name": call.name, "input": dict[str, Any]()}
            begun = {"type": "tool_use", **asked}
            yield send("content_block_start", index=index, content_block=begun)
            said = {"type": "input_json_delta", "partial_json": call.arguments}
            yield send("content_block_delta", index=index, delta=said)
            yield send("content_block_stop", index=index)
            index += 1
        if delta.finish:
            if open_:
                yield send("content_block_stop", index=index)
            yield send("message_delta", delta=end_of(delta), usage=usage_of(answers))
    yield send("message_stop")


async def count(exchange: Exchange) -> Any:
    """POST /v1/messages/count_tokens: those of the prompt."""
    body = await exchange.body(CountRequest)
    served = exchange.served
    check_model(served, body.model)
    talk = talk_of(body)
    tools = template_tools(talk.tools) if talk.tools else None
    encode = served.tokenizer.encode_chat
    ids = await exchange.prepared(lambda: encode(talk.messages, tools=tools))
    return as_json({"input_tokens": len(ids)})


async def handle(exchange: Exchange) -> Any:
    """The route."""
    body = await exchange.body(MessagesRequest)
    served, space = exchange.served, exchange.namespace
    answers = await exchange.begin(lambda: job_of(served, body, space), "msg_" + exchange.id)
    if body.stream:
        return exchange.stream(chunks(exchange, answers))
    (deltas,) = await exchange.gathered(answers)
    return as_json(
        {
            **head(exchange),
            "content": whole(deltas),
            **end_of(deltas[-1]),
            "usage": usage_of(answers),
        }
    )
