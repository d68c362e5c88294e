"""A request of any API as work: ids, sampling, stops, a grammar. Nothing here waits or computes.

Everything that can be wrong with a request is found here, before it takes a slot.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from chalot.engine.requests import Request
from chalot.engine.sampler import Sampling
from chalot.serve.faults import Fault
from chalot.serve.served import Served
from chalot.serve.settings import MOST_PROMPTS
from chalot.serve.shapes import (
    ChatRequest,
    CompletionRequest,
    Format,
    Message,
    NamedTool,
    RefusalPart,
    Stops,
    Text,
    Tool,
)
from chalot.serve.structured import GrammarMask, format_grammar
from chalot.serve.tools import Style, call_grammar, style_of

FINITE = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
SAMPLING = (*FINITE, "repetition_penalty", "repetition_window", "seed")


@dataclass(frozen=True)
class Job:
    """Answers to one or more prompts, `choices` to each. Answer i is of prompt i // choices."""

    requests: tuple[Request, ...]
    prompts: tuple[str | list[int], ...]  # as they were given
    choices: int
    stops: tuple[str, ...]
    seed: int
    style: Style | None = None  # how calls are written, where there are tools
    tool_names: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each once."""
        return sum(len(r.ids) for r in self.requests[:: self.choices])


def check_model(served: Served, name: str | None) -> None:
    """Raise Fault for a model that is not the served one."""
    if name not in (None, "", served.facts.name):
        raise Fault(
            f"model: found {name[:80]!r}, this server has {served.facts.name!r}; "
            "`chalot serve --name` changes it",
            404,
            param="model",
            code="model_not_found",
        )


def sampling_of(served: Served, options: Any) -> Sampling:
    """What was asked for, over the model's defaults, over chalot's. A seed is drawn if none is."""
    given = {n: v for n in SAMPLING if (v := getattr(options, n, None)) is not None}
    given.setdefault("seed", secrets.randbits(32))
    return Sampling(**{**served.defaults, **given})


def stops_of(stop: Stops | None) -> tuple[str, ...]:
    """Stop strings as a tuple."""
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def bias_of(served: Served, bias: Mapping[str, float] | None) -> dict[int, float]:
    """Ids and what is added to their logits."""
    out = {int(key): value for key, value in (bias or {}).items()}
    size = served.model.config.vocabulary
    if any(id_ >= size for id_ in out):
        raise Fault(
            f"logit_bias: found token {max(out)}, expected ids of 0 to {size - 1}",
            param="logit_bias",
        )
    return out


def fitting(served: Served, ids: list[int], most: int, param: str) -> list[int]:
    """The prompt, if the model can take it with one token more. Raises Fault, never cuts."""
    context, size = served.model.context, served.model.config.vocabulary
    if not ids:
        raise Fault(f"{param}: is empty; expected at least one token", param=param)
    if max(ids) >= size:
        raise Fault(
            f"{param}: found token {max(ids)}, expected ids of 0 to {size - 1}", param=param
        )
    if len(ids) + (most > 0) > context:
        at_most = context >= served.model.config.context
        remedy = "" if at_most else f", or restart the server: {served.model.engine.remedy}"
        raise Fault(
            f"{param}: found {len(ids)} tokens, this server's context holds {context} with one new "
            f"token at least; shorten the text{remedy}",
            param=param,
            code="context_length_exceeded",
        )
    return ids


def requests_for(
    served: Served,
    prompts: Sequence[list[int]],
    choices: int,
    template: Request,
    grammar: tuple[str, str] | None,
) -> tuple[Request, ...]:
    """Each choice of each prompt; `grammar` is one and the parameter that it came with."""
    first = None if grammar is None else served.structures().matcher(*grammar)
    out = []
    for ids in prompts:
        for choice in range(choices):
            sampling = replace(template.sampling, choice=choice)
            mask = None if first is None else GrammarMask(served.structures(), first.deep_copy())
            out.append(replace(template, ids=ids, sampling=sampling, mask=mask))
    return tuple(out)


def refuse_cuts(stops: tuple[str, ...], grammar: object) -> None:
    """Stop strings would cut structured output; then it would not be what was asked for."""
    if grammar and stops:
        raise Fault("stop: cannot be used with structured output or required tools", param="stop")


# ---- chat


def text_of(content: str | list[Any] | None) -> str | None:
    """A message's content as one text."""
    if content is None or isinstance(content, str):
        return content
    return "".join([p.refusal if isinstance(p, RefusalPart) else p.text for p in content])


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates want them.

    Raises Fault for a message without content, and for arguments that are not JSON.
    """
    out = []
    for number, message in enumerate(messages):
        if message.content is None and not (message.tool_calls or message.reasoning_content):
            where = f"messages[{number}].content"
            raise Fault(f"{where}: found none, expected text, or tool_calls", param=where)
        role = "system" if message.role == "developer" else message.role
        made: dict[str, Any] = {"role": role, "content": text_of(message.content) or ""}
        if message.name is not None:
            made["name"] = message.name
        if message.tool_call_id is not None:
            made["tool_call_id"] = message.tool_call_id
        if message.reasoning_content is not None:
            made["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": arguments_of(
                            call.function.arguments, f"messages[{number}].tool_calls"
                        ),
                    },
                }
                for call in message.tool_calls
            ]
        out.append(made)
    return out


def arguments_of(text: str, where: str) -> dict[str, Any]:
    """Arguments as templates want them. Raises Fault for what is no JSON object."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        raise Fault(
            f"{where}: found arguments {text[:60]!r}, expected a JSON object", param=where
        ) from None


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates want them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]


@dataclass(frozen=True)
class Talk:
    """A conversation to go on with: what the three chat APIs have in common."""

    messages: list[dict[str, Any]]
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"  # "none", "auto", "required", or "=" and a tool's name
    parallel: bool = True
    format: Format | None = None
    max_tokens: int | None = None
    choices: int = 1
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    bias: Mapping[int, float] | None = None
    template: Mapping[str, Any] | None = None


def chat_job(served: Served, talk: Talk, sampling: Sampling, namespace: bytes) -> Job:
    """The job of a conversation. Raises Fault, TokenizerError where the template refuses."""
    tokenizer, style, grammar = served.tokenizer, None, None
    offered, tools = talk.tools, talk.tools if talk.tool_choice != "none" else ()
    if tools:
        style = style_of(tokenizer.chat_template(True).source)
        grammar = _tool_grammar(served, talk, style)
    elif talk.tool_choice not in ("auto", "none"):
        raise Fault("tool_choice: asks for a tool, and there are none", param="tool_choice")
    if talk.format is not None and not isinstance(talk.format, Text):
        if tools:
            raise Fault(
                "response_format: cannot be held beside tools; leave one of them out, or set "
                'tool_choice to "none"',
                param="response_format",
            )
        made = format_grammar(talk.format)
        grammar = None if made is None else (made, "response_format")
    refuse_cuts(talk.stops, grammar)
    listed = template_tools(offered) if offered else None
    ids = tokenizer.encode_chat(talk.messages, tools=listed, **(talk.template or {}))
    most = talk.max_tokens if talk.max_tokens is not None else served.model.context
    fitting(served, ids, most, "messages")
    template = Request(
        ids,
        sampling,
        most,
        served.ends,
        talk.logprobs,
        namespace=namespace,
        bias=talk.bias or {},
    )
    requests = requests_for(served, [ids], talk.choices, template, grammar)
    names = tuple(tool.function.name for tool in tools)
    return Job(
        requests,
        (ids,),
        talk.choices,
        talk.stops,
        sampling.seed,
        style,
        names,
        talk.logprobs,
    )


def _tool_grammar(served: Served, talk: Talk, style: Style) -> tuple[str, str]:
    tools, must = talk.tools, talk.tool_choice != "auto"
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise Fault("tools: two have the same name", param="tools")
    if talk.tool_choice.startswith("="):
        name = talk.tool_choice[1:]
        tools = tuple(tool for tool in tools if tool.function.name == name)
        if not tools:
            raise Fault(f"tool_choice: no tool is named {name!r}", param="tool_choice")
    many = talk.parallel and not talk.tool_choice.startswith("=")
    specials = served.tokenizer.special_tokens
    return call_grammar(style, tools, specials, must=must, many=many), "tools"


def job_of_chat(served: Served, body: ChatRequest, namespace: bytes) -> Job:
    """POST /v1/chat/completions as a job."""
    check_model(served, body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise Fault("top_logprobs: needs logprobs to be true", param="top_logprobs")
    template = dict(body.chat_template_kwargs or {})
    taken = {"messages", "tools", "add_generation_prompt", "documents"} & template.keys()
    if taken:
        where = "chat_template_kwargs"
        raise Fault(f"{where}: {min(taken)} is given by other fields", param=where)
    if body.reasoning_effort is not None:
        template["reasoning_effort"] = body.reasoning_effort
    choice = body.tool_choice or "auto"
    talk = Talk(
        template_messages(body.messages),
        tuple(body.tools or ()),
        f"={choice.function.name}" if isinstance(choice, NamedTool) else choice,
        body.parallel_tool_calls is not False,
        body.response_format,
        body.max_completion_tokens or body.max_tokens,
        body.n or 1,
        stops_of(body.stop),
        (body.top_logprobs or 0) if body.logprobs else None,
        bias_of(served, body.logit_bias),
        template,
    )
    return chat_job(served, talk, sampling_of(served, body), namespace)


# ---- completions


def prompts_of(given: str | Sequence[Any], param: str) -> tuple[str | list[int], ...]:
    """One text or its ids, or a list of such. Raises Fault for a mixture."""
    if isinstance(given, str):
        return (given,)
    if all(isinstance(one, int) for one in given):
        return (list(given),)
    if not all(isinstance(one, (str, list)) for one in given):
        raise Fault(
            f"{param}: found ids beside texts, expected a text, ids, or a list of them",
            param=param,
        )
    if len(given) > MOST_PROMPTS:
        raise Fault(f"{param}: found {len(given)}, expected at most {MOST_PROMPTS}", param=param)
    return tuple(given)


def encoded(served: Served, prompt: str | list[int]) -> list[int]:
    """Ids of a prompt, with a beginning of text where the model has one."""
    return served.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)


def job_of_completion(served: Served, body: CompletionRequest, namespace: bytes) -> Job:
    """POST /v1/completions as a job."""
    check_model(served, body.model)
    prompts = prompts_of(body.prompt, "prompt")
    choices = body.n or 1
    most = 16 if body.max_tokens is None else body.max_tokens
    if not most and not body.echo:
        raise Fault("max_tokens: is 0, which needs echo", param="max_tokens")
    made = format_grammar(body.response_format)
    stops = stops_of(body.stop)
    refuse_cuts(stops, made)
    ids = [fitting(served, encoded(served, p), most, "prompt") for p in prompts]
    sampling = sampling_of(served, body)
    scored = body.logprobs is not None
    template = Request(
        [],
        sampling,
        most,
        served.ends,
        body.logprobs,
        prompt_logprobs=scored and bool(body.echo),
        namespace=namespace,
        bias=bias_of(served, body.logit_bias),
    )
    grammar = None if made is None else (made, "response_format")
    requests = requests_for(served, ids, choices, template, grammar)
    return Job(
        requests,
        prompts,
        choices,
        stops,
        sampling.seed,
        logprobs=body.logprobs,
        echo=bool(body.echo),
    )
