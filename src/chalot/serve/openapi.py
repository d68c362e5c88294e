"""The OpenAPI document, made of the classes that requests are read with."""

from typing import Any

import msgspec

from chalot import __version__
from chalot.serve.messages import CountRequest, MessagesRequest
from chalot.serve.responses import ResponseRequest
from chalot.serve.shapes import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)

BODIES = {  # path -> what it takes, and what it is
    "/v1/chat/completions": (ChatRequest, "An answer to a conversation"),
    "/v1/completions": (CompletionRequest, "Text after a text"),
    "/v1/responses": (ResponseRequest, "An answer, in the shape of OpenAI's newer API"),
    "/v1/messages": (MessagesRequest, "An answer, in the shape of Anthropic's API"),
    "/v1/messages/count_tokens": (CountRequest, "Tokens of such a request"),
    "/v1/embeddings": (EmbeddingRequest, "Texts as vectors of length 1"),
    "/tokenize": (TokenizeRequest, "Token ids of a text or a conversation"),
    "/detokenize": (DetokenizeRequest, "The text of token ids"),
}
READS = {
    "/v1/models": "The model that is served",
    "/tokenizer_info": "The special tokens and the chat template",
    "/health": "How the server is, and what it serves",
    "/ready": "Whether requests are taken",
}
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
FAULTS = ("400", "401", "403", "404", "408", "413", "415", "429", "500", "503")
TEMPLATE = "#/components/schemas/{name}"
SCHEMAS = "#/components/schemas/"
ABOUT = {"message": {"type": "string"}, "type": {"type": "string"}}
ERRORS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type"],
                "properties": {
                    **ABOUT,
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _responses(good: dict[str, Any], *more: str) -> dict[str, Any]:
    bad = {"description": "What was found, expected, and what helps"}
    bad["content"] = _json({"$ref": SCHEMAS + "Error"})  # type: ignore[assignment]
    return {"200": good, **{status: bad for status in (*FAULTS, *more)}}


def _identifier(name: str) -> list[dict[str, Any]]:
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    shapes = [shape for shape, _ in BODIES.values()]
    made, components = msgspec.json.schema_components(shapes, ref_template=TEMPLATE)
    thing: dict[str, Any] = {"description": "Done", "content": _json({"type": "object"})}
    paths: dict[str, Any] = {}
    for (path, (_, text)), schema in zip(BODIES.items(), made, strict=True):
        content = _json({"type": "object"})
        if path in STREAMED:
            content["text/event-stream"] = {}
        body = {"required": True, "content": _json(schema)}
        good = {"description": text, "content": content}
        paths[path] = {
            "post": {"summary": text, "requestBody": body, "responses": _responses(good)}
        }
    for path, text in READS.items():
        paths[path] = {"get": {"summary": text, "responses": _responses(thing)}}
    words = {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {}}}}
    paths["/metrics"] = {"get": {"summary": "Counts", "responses": _responses(words)}}
    paths["/v1/models/{name}"] = {
        "get": {
            "summary": "One model",
            "parameters": _identifier("name"),
            "responses": _responses(thing),
        }
    }
    paths["/v1/cancel/{id}"] = {
        "post": {
            "summary": "End an answer that is under way",
            "parameters": _identifier("id"),
            "responses": _responses(thing),
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "chalot", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**components, **ERRORS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
