"""POST /v1/embeddings: the mean of the last hidden state over a text's tokens, of length 1.

The hidden state is what the head is multiplied with, after the final norm. Read chunk by chunk
between the passes of the scheduler, in pages of its own, one text at a time; the same numbers on
every machine.
"""

import asyncio
import base64
import math
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.engine.generate import CHUNK
from chalot.serve.events import as_json, while_connected
from chalot.serve.exchange import Exchange
from chalot.serve.faults import Fault
from chalot.serve.jobs import check_model, encoded, fitting, prompts_of
from chalot.serve.served import Served
from chalot.serve.shapes import EmbeddingRequest


def normalised(total: NDArray[np.float64]) -> NDArray[np.float32]:
    """A sum of hidden states with length 1; squares are summed without error."""
    length = math.sqrt(math.fsum((total * total).tolist()))
    return (total / length if length else total).astype(np.float32)


async def embedded(served: Served, ids: list[int]) -> NDArray[np.float32]:
    """(hidden,): one text's."""
    total = np.zeros(served.model.config.hidden, np.float64)
    sequence = served.open_text()
    try:
        for at in range(0, len(ids), CHUNK):
            part = ids[at : at + CHUNK]
            work = served.worker.call(partial(served.hidden, sequence, part))
            for row in await asyncio.shield(asyncio.wrap_future(work)):  # in one order of sums
                total += row
    finally:
        served.worker.call(sequence.close)
    return normalised(total)


def as_asked(vector: NDArray[np.float32], form: str | None) -> Any:
    """Numbers, or their bytes in base64, little-endian."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


async def handle(exchange: Exchange) -> Any:
    """The route."""
    body = await exchange.body(EmbeddingRequest)
    served = exchange.served
    check_model(served, body.model)
    width = served.model.config.hidden
    if body.dimensions not in (None, width):
        raise Fault(
            f"dimensions: found {body.dimensions}, this model has {width}", param="dimensions"
        )
    prompts = prompts_of(body.input, "input")
    texts = await exchange.prepared(
        lambda: [fitting(served, encoded(served, p), 0, "input") for p in prompts]
    )

    async def all_of_them() -> list[NDArray[np.float32]]:
        found = []
        for ids in texts:
            async with exchange.server.embedding:
                found.append(await embedded(served, ids))
        return found

    work = asyncio.ensure_future(all_of_them())
    vectors = await while_connected(exchange.request.receive, work)
    tokens = sum(map(len, texts))
    data = [
        {"object": "embedding", "index": i, "embedding": as_asked(v, body.encoding_format)}
        for i, v in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return as_json({"object": "list", "data": data, "model": served.facts.name, "usage": usage})
