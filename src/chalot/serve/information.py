"""Routes that say something: models, health, metrics, tokens; and the one that cancels."""

from typing import Any

from starlette.responses import Response

from chalot import __version__
from chalot.serve.chat import shown
from chalot.serve.events import as_json
from chalot.serve.exchange import Exchange
from chalot.serve.faults import Fault
from chalot.serve.jobs import check_model, template_messages, template_tools
from chalot.serve.openapi import document
from chalot.serve.shapes import DetokenizeRequest, TokenizeRequest

CREATED = 1_700_000_000  # a model has no date of its own


def _model(exchange: Exchange) -> dict[str, Any]:
    facts = exchange.served.facts
    return {
        "id": facts.name,
        "object": "model",
        "created": CREATED,
        "owned_by": "chalot",
        "max_model_len": facts.context,
        "digest": facts.digest,
    }


async def models(exchange: Exchange) -> Any:
    """GET /v1/models"""
    return as_json({"object": "list", "data": [_model(exchange)]})


async def model(exchange: Exchange) -> Any:
    """GET /v1/models/{name}"""
    name = exchange.request.path_params["name"]
    if name != exchange.served.facts.name:
        raise Fault(f"found no model {name[:80]!r}", 404, code="model_not_found")
    return as_json(_model(exchange))


async def health(exchange: Exchange) -> Any:
    """GET /health: 503 where nothing can be computed any more."""
    served, facts = exchange.served, exchange.served.facts
    stats = served.scheduler.stats
    alive = served.alive
    state = {
        "status": "ok" if alive else "failed",
        "model": facts.name,
        "digest": facts.digest,
        "scheme": facts.scheme,
        "context": facts.context,
        "slots": served.settings.slots,
        "running": stats.running,
        "waiting": stats.waiting,
        "resident_bytes": served.resident_bytes,
        "file_bytes": facts.file_bytes,
        "bits_per_weight": facts.bits_per_weight,
        "kernels": served.model.backend.name,
        "threads": served.model.backend.threads,
        "version": __version__,
    }
    return as_json(state, 200 if alive else 503)


async def ready(exchange: Exchange) -> Any:
    """GET /ready: 503 while the server stops, or when it has failed."""
    able = exchange.served.alive and not exchange.server.draining
    return as_json({"ready": able}, 200 if able else 503)


async def metrics(exchange: Exchange) -> Any:
    """GET /metrics, for Prometheus."""
    text = exchange.metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def description(_: Exchange) -> Any:
    """GET /openapi.json"""
    return as_json(document())


async def cancel(exchange: Exchange) -> Any:
    """POST /v1/cancel/{id}: an answer's id, or the X-Request-Id that it was asked for with."""
    name = exchange.request.path_params["id"]
    answers = exchange.server.running.get((exchange.namespace, name))
    if answers is None:
        raise Fault(f"no answer with the id {name[:80]!r} is under way", 404, code="not_found")
    answers.cancel()
    return as_json({"id": name, "cancelled": True})


async def tokenize(exchange: Exchange) -> Any:
    """POST /tokenize"""
    body = await exchange.body(TokenizeRequest)
    if [body.content, body.prompt, body.messages].count(None) != 2:
        raise Fault("expected one of content, prompt and messages")
    check_model(exchange.served, body.model)
    tokenizer = exchange.served.tokenizer

    def encode() -> list[int]:
        if body.prompt is not None:
            return tokenizer.encode(body.prompt, specials=True, start=body.add_special_tokens)
        if body.content is None:
            tools = template_tools(body.tools) if body.tools else None
            return tokenizer.encode_chat(template_messages(body.messages or []), tools=tools)
        return tokenizer.encode(body.content, start=body.add_special)

    ids = await exchange.prepared(encode)
    out: dict[str, Any] = {"tokens": ids, "count": len(ids)}
    out["max_model_len"] = exchange.served.facts.context
    if body.with_pieces:
        out["pieces"] = [shown(tokenizer.piece(id_)) for id_ in ids]
    return as_json(out)


async def detokenize(exchange: Exchange) -> Any:
    """POST /detokenize"""
    body = await exchange.body(DetokenizeRequest)
    check_model(exchange.served, body.model)
    size = exchange.served.model.config.vocabulary
    wrong = [id_ for id_ in body.tokens if id_ >= size]
    if wrong:
        raise Fault(f"tokens: found {wrong[0]}, expected ids of 0 to {size - 1}", param="tokens")
    decode = exchange.served.tokenizer.decode
    text = await exchange.prepared(lambda: decode(body.tokens, False))
    return as_json({"content": text, "prompt": text})  # llama.cpp's name and vLLM's


async def tokenizer_info(exchange: Exchange) -> Any:
    """GET /tokenizer_info, which lm-eval asks for."""
    tokenizer = exchange.served.tokenizer
    by_id: dict[int | None, str] = {id_: t for t, id_ in tokenizer.special_tokens.items()}
    return as_json(
        {
            "bos_token": by_id.get(tokenizer.bos_id),
            "eos_token": by_id.get(min(tokenizer.eos_ids, default=-1)),
            "pad_token": by_id.get(tokenizer.pad_id),
            "vocabulary_size": tokenizer.vocabulary_size,
            "chat_template": tokenizer.chat_template().source
            if tokenizer.has_chat_template
            else None,
        }
    )
