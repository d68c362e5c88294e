"""What a request may hold, checked while it is parsed: OpenAI's chat and completions.

Fields that would change an answer and are not known here are errors, never ignored; those that
only name or file it (user, metadata, ...) are accepted without effect. The OpenAPI document is
made of these classes.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from chalot.serve.settings import MOST_CHOICES, MOST_STOP, MOST_STOPS, MOST_TOP

Count = Annotated[int, Meta(ge=0, le=1 << 24)]
Positive = Annotated[int, Meta(ge=1, le=1 << 24)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
Share = Annotated[float, Meta(ge=0, le=1)]
Heat = Annotated[float, Meta(ge=0, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Stop = Annotated[str, Meta(min_length=1, max_length=MOST_STOP)]
Stops = Stop | Annotated[list[Stop], Meta(max_length=MOST_STOPS)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Biases = Annotated[
    dict[Annotated[str, Meta(pattern=r"^[0-9]{1,10}$")], Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=1024),
]
Json = dict[str, Any]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # no effect: nothing is padded


class Options(Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stops | None = None
    seed: Seed | None = None
    temperature: Heat | None = None
    top_p: Share | None = None
    top_k: Count | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    repetition_window: Count | None = None
    logit_bias: Biases | None = None
    user: str | None = None  # from here on without effect
    metadata: Json | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class TextPart(Struct, tag_field="type", tag="text"):
    """A piece of a message."""

    text: str


class RefusalPart(Struct, tag_field="type", tag="refusal"):
    """What an assistant said instead of an answer."""

    refusal: str


class CalledFunction(Struct):
    """A name, and arguments as JSON in a string."""

    name: str
    arguments: str


class ToolCall(Struct):
    """What an assistant asked for."""

    function: CalledFunction
    id: str = ""
    type: Literal["function"] = "function"


class Message(Struct):
    """One turn. Other keys, which clients send back with an answer, have no effect."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | RefusalPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(Struct, forbid_unknown_fields=True):
    """What a tool is called, and a JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None  # arguments always follow the schema


class Tool(Struct, forbid_unknown_fields=True):
    """A function that the model may ask for."""

    function: Function
    type: Literal["function"]


class NamedFunction(Struct, forbid_unknown_fields=True):
    """The name of one."""

    name: Name


class NamedTool(Struct, forbid_unknown_fields=True):
    """The one tool that is to be called."""

    function: NamedFunction
    type: Literal["function"]


class Text(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """Any text."""


class JsonObject(Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """Any JSON object."""


class Schema(Struct, forbid_unknown_fields=True):
    """A JSON schema. Answers always follow it, whatever `strict` says."""

    name: Name
    schema: Json | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchema(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """JSON that a schema describes."""

    json_schema: Schema


class Regex(Struct, tag_field="type", tag="regex", forbid_unknown_fields=True):
    """Text that a regular expression matches as a whole (the syntax of Rust's regex)."""

    pattern: Annotated[str, Meta(max_length=100_000)]


class Grammar(Struct, tag_field="type", tag="grammar", forbid_unknown_fields=True):
    """Text of a grammar in llguidance's dialect of Lark."""

    grammar: Annotated[str, Meta(max_length=200_000)]


Format = Text | JsonObject | JsonSchema | Regex | Grammar


class ChatRequest(Options, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=10_000)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_TOP)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None  # handed to the chat template
    chat_template_kwargs: Json | None = None  # the same: enable_thinking, ...


class CompletionRequest(Options, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions"""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MOST_TOP)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=1)] | None = None
    suffix: Annotated[str, Meta(max_length=0)] | None = None
    response_format: Format | None = None


class EmbeddingRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/embeddings"""

    input: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None  # only the model's own
    user: str | None = None


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize: ids of a text, or of a conversation by the model's template.

    `content` is plain text, whatever marks are typed in it; in `prompt`, which vLLM's clients
    send, special tokens are read as such.
    """

    content: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special: bool = True  # the beginning of text, where the model has one
    add_special_tokens: bool = True  # the same, of `prompt`
    with_pieces: bool = False
    model: str | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize: the text of ids."""

    tokens: list[TokenId]
    model: str | None = None
