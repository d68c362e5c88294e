"""The verb `serve`: one model for many clients over HTTP, by the protocols they speak already.

    settings      what the operator chose, and the limits
    faults        errors as clients get them
    shapes        what a request of OpenAI's two older APIs may hold
    jobs          a request of any API as work for the scheduler: ids, sampling, stops, grammar
    answers       steps of the scheduler become text, scored tokens and tool calls
    tools         how model families write tool calls
    structured    grammars: masks that keep an answer to a schema
    served        the model, its scheduler and the thread that computes (engine/worker.py)
    chat, completions, responses, messages, embeddings, information      the routes
    exchange      one HTTP request and its answer; events: a streamed one
    guard         hosts, keys, sizes; connection: deadlines
    inside        a request through all of it, without a network
    openapi, metrics, app

Needs the extra `serve` (starlette, uvicorn, llguidance, prometheus_client).
"""
