"""POST /v1/responses (https://platform.openai.com/docs/api-reference/responses).

Nothing is stored: a conversation is sent whole each time, and `previous_response_id` is refused.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from chalot.serve.answers import Answers, Delta
from chalot.serve.chat import logprobs_of
from chalot.serve.events import as_json, event
from chalot.serve.exchange import Exchange
from chalot.serve.faults import Fault
from chalot.serve.jobs import Job, Talk, arguments_of, chat_job, check_model, sampling_of
from chalot.serve.served import Served
from chalot.serve.settings import MOST_TOP
from chalot.serve.shapes import (
    Count,
    Format,
    Function,
    Grammar,
    Heat,
    Json,
    JsonObject,
    JsonSchema,
    Name,
    Positive,
    Regex,
    Schema,
    Seed,
    Share,
    Text,
    Tool,
)
from chalot.serve.tools import Call


class InputText(Struct, tag_field="type", tag="input_text"):
    """A piece of what was asked."""

    text: str


class OutputText(Struct, tag_field="type", tag="output_text"):
    """A piece of what was answered."""

    text: str


class InputMessage(Struct, tag_field="type", tag="message"):
    """A turn."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText]


class FunctionCall(Struct, tag_field="type", tag="function_call"):
    """What the model asked for."""

    call_id: str
    name: str
    arguments: str


class FunctionOutput(Struct, tag_field="type", tag="function_call_output"):
    """What a function gave back."""

    call_id: str
    output: str


class FlatTool(Struct, forbid_unknown_fields=True):
    """A function that the model may ask for."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class FlatSchema(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """JSON that a schema describes."""

    name: Name
    schema: Json
    description: str | None = None
    strict: bool | None = None


class TextSettings(Struct, forbid_unknown_fields=True):
    """The form of the text."""

    format: Text | JsonObject | FlatSchema | Regex | Grammar | None = None


class NamedChoice(Struct, forbid_unknown_fields=True):
    """The one function that is to be called."""

    type: Literal["function"]
    name: Name


class ResponseRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/responses"""

    input: str | Annotated[list[Json], Meta(min_length=1, max_length=10_000)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    temperature: Heat | None = None
    top_p: Share | None = None
    top_k: Count | None = None
    min_p: Share | None = None
    seed: Seed | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_TOP)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    stream: bool | None = None
    text: TextSettings | None = None
    tools: Annotated[list[FlatTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None  # a text that is too long is an error
    background: bool | None = None  # only false: nothing is stored
    previous_response_id: None = None
    store: bool | None = None  # from here on without effect: nothing is stored
    metadata: Json | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


def _turn(number: int, item: Json) -> dict[str, Any]:
    """An item of the input as a message of a chat template. Raises Fault."""
    where = f"input[{number}]"
    try:
        found = msgspec.convert(
            {"type": "message", **item}, InputMessage | FunctionCall | FunctionOutput
        )
    except msgspec.ValidationError as error:
        raise Fault(f"{where}: {str(error)[:300]}", param=where) from None
    if isinstance(found, FunctionOutput):
        return {"role": "tool", "content": found.output, "tool_call_id": found.call_id}
    if isinstance(found, FunctionCall):
        function = {"name": found.name, "arguments": arguments_of(found.arguments, where)}
        call = {"id": found.call_id, "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    parts = found.content
    text = parts if isinstance(parts, str) else "".join(p.text for p in parts)
    return {"role": "system" if found.role == "developer" else found.role, "content": text}


def _messages(body: ResponseRequest) -> list[dict[str, Any]]:
    """The conversation; calls that follow each other are one turn."""
    turns: list[dict[str, Any]] = []
    if isinstance(body.input, str):
        turns = [{"role": "user", "content": body.input}]
    else:
        for number, item in enumerate(body.input):
            turn = _turn(number, item)
            before = turns[-1] if turns else {}
            if "tool_calls" in turn and before.get("role") == "assistant":
                before.setdefault("tool_calls", []).extend(turn["tool_calls"])
            else:
                turns.append(turn)
    if body.instructions is not None:
        turns.insert(0, {"role": "system", "content": body.instructions})
    return turns


def _format(settings: TextSettings | None) -> Format | None:
    found = settings.format if settings else None
    if isinstance(found, FlatSchema):
        return JsonSchema(Schema(found.name, found.schema))
    return found


def job_of(served: Served, body: ResponseRequest, namespace: bytes) -> Job:
    """The request as a job."""
    check_model(served, body.model)
    if body.background:
        raise Fault("background: nothing is stored here; expected false", param="background")
    choice = body.tool_choice or "auto"
    scored = body.top_logprobs is not None or bool(body.include)
    talk = Talk(
        _messages(body),
        tuple(
            Tool(Function(t.name, t.description, t.parameters), t.type) for t in body.tools or ()
        ),
        f"={choice.name}" if isinstance(choice, NamedChoice) else choice,
        body.parallel_tool_calls is not False,
        _format(body.text),
        body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if scored else None,
    )
    return chat_job(served, talk, sampling_of(served, body), namespace)


def usage_of(answers: Answers) -> dict[str, Any]:
    """Tokens of prompt and answer."""
    given, new = answers.job.prompt_tokens, answers.new_tokens
    return {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": answers.cached_tokens},
        "output_tokens": new,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": given + new,
    }


def text_id(exchange: Exchange, index: int) -> str:
    """Of the text item at a place of the output."""
    return f"msg_{exchange.id}" + (f"_{index}" if index else "")


def text_item(
    exchange: Exchange, index: int, deltas: Sequence[Delta], status: str
) -> dict[str, Any]:
    """What was said, up to a call or the end."""
    part = {
        "type": "output_text",
        "text": "".join(d.text for d in deltas),
        "annotations": [],
        "logprobs": logprobs_of([t for d in deltas for t in d.tokens])["content"],
    }
    return {
        "id": text_id(exchange, index),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [part] if deltas else [],
    }


def call_item(call: Call) -> dict[str, Any]:
    """What is to be called."""
    return {
        "id": "fc_" + call.id,
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def items(exchange: Exchange, deltas: Sequence[Delta], status: str) -> list[dict[str, Any]]:
    """The output: texts and calls as they came; an empty text where there is nothing else."""
    out: list[dict[str, Any]] = []
    said: list[Delta] = []
    for delta in deltas:
        if delta.text or (delta.tokens and said):
            said.append(delta)
        if said and (delta.calls or delta.finish):
            out.append(text_item(exchange, len(out), said, status))
            said = []
        out += map(call_item, delta.calls)
    return out or [text_item(exchange, 0, deltas[-1:], status)]


def response(
    exchange: Exchange, body: ResponseRequest, answers: Answers, deltas: Sequence[Delta]
) -> dict[str, Any]:
    """The whole object; without an end among the deltas it is in progress."""
    finish = deltas[-1].finish if deltas else None
    status = {None: "in_progress", "length": "incomplete", "cancelled": "cancelled"}.get(
        finish, "completed"
    )
    sampling = answers.job.requests[0].sampling
    asked = msgspec.to_builtins(body)
    return {
        "id": "resp_" + exchange.id,
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if finish == "length" else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": exchange.served.facts.name,
        "output": items(exchange, deltas, status) if finish else [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": asked["text"]["format"] or {"type": "text"}}
        if body.text
        else {"format": {"type": "text"}},
        "tool_choice": asked["tool_choice"] or "auto",
        "tools": asked["tools"] or [],
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": usage_of(answers) if finish else None,
        "user": body.user,
        "metadata": body.metadata or {},
        "system_fingerprint": exchange.served.facts.digest,
        "seed": answers.job.seed,
    }


class Events:
    """The stream's events, numbered."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange, self.number, self.item = exchange, -1, 0
        self.said: list[Delta] = []  # of the text item that is open

    def make(self, kind: str, **fields: Any) -> bytes:
        """One event."""
        self.number += 1
        return event({"type": kind, "sequence_number": self.number, **fields}, kind)

    def _place(self) -> dict[str, Any]:
        return {
            "item_id": text_id(self.exchange, self.item),
            "output_index": self.item,
            "content_index": 0,
        }

    def text(self, delta: Delta) -> list[bytes]:
        """More of a text item, which is opened at its first text."""
        out, part = [], {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        if not self.said:
            item = text_item(self.exchange, self.item, [], "in_progress")
            out.append(self.make("response.output_item.added", output_index=self.item, item=item))
            out.append(self.make("response.content_part.added", **self._place(), part=part))
        self.said.append(delta)
        more = {"delta": delta.text, "logprobs": logprobs_of(delta.tokens)["content"]}
        return [*out, self.make("response.output_text.delta", **self._place(), **more)]

    def close(self, status: str) -> list[bytes]:
        """The end of the text item, if one is open."""
        if not self.said:
            return []
        item = text_item(self.exchange, self.item, self.said, status)
        part, place = item["content"][0], self._place()
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        out = [
            self.make("response.output_text.done", **place, **done),
            self.make("response.content_part.done", **place, part=part),
            self.make("response.output_item.done", output_index=self.item, item=item),
        ]
        self.item, self.said = self.item + 1, []
        return out

    def call(self, call: Call) -> list[bytes]:
        """A whole call."""
        item, at = call_item(call), {"output_index": self.item}
        empty = {**item, "arguments": "", "status": "in_progress"}
        place = {**at, "item_id": item["id"]}
        self.item += 1
        kind = "response.function_call_arguments"
        return [
            self.make("response.output_item.added", **at, item=empty),
            self.make(f"{kind}.delta", **place, delta=call.arguments),
            self.make(f"{kind}.done", **place, arguments=call.arguments, name=call.name),
            self.make("response.output_item.done", **at, item=item),
        ]


async def chunks(
    exchange: Exchange, body: ResponseRequest, answers: Answers
) -> AsyncGenerator[bytes, None]:
    """The stream."""
    events, deltas = Events(exchange), list[Delta]()
    begun = response(exchange, body, answers, [])
    yield events.make("response.created", response=begun)
    yield events.make("response.in_progress", response=begun)
    async for _, delta in exchange.deltas(answers):
        deltas.append(delta)
        ended = delta.finish is not None
        nothing = ended and not any(d.text or d.calls for d in deltas)
        made = events.text(delta) if delta.text or nothing or (delta.tokens and events.said) else []
        if delta.calls or ended:
            made += events.close("incomplete" if delta.finish == "length" else "completed")
        for call in delta.calls:
            made += events.call(call)
        for one in made:
            yield one
    found = response(exchange, body, answers, deltas)
    kind = "incomplete" if found["status"] == "incomplete" else "completed"
    yield events.make(f"response.{kind}", response=found)


async def handle(exchange: Exchange) -> Any:
    """The route."""
    body = await exchange.body(ResponseRequest)
    served, space = exchange.served, exchange.namespace
    answers = await exchange.begin(lambda: job_of(served, body, space), "resp_" + exchange.id)
    if body.stream:
        return exchange.stream(chunks(exchange, body, answers))
    (deltas,) = await exchange.gathered(answers)
    return as_json(response(exchange, body, answers, deltas))
