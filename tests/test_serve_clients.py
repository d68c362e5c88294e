"""The clients that people have: openai, anthropic, lm-eval; and schemathesis."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import chalot
from chalot.load import Model
from conversations import TEMPLATES

for needed in ("starlette", "uvicorn", "llguidance", "prometheus_client"):
    pytest.importorskip(needed, reason="the extra `serve` is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # the clients' own are not ours

from chalot.serve.settings import Settings  # noqa: E402
from serving import Running, speaking  # noqa: E402

HELLO: list[Any] = [{"role": "user", "content": "What does zip() do?"}]
TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "of a place",
    "parameters": {
        "type": "object",
        "properties": {"place": {"enum": ["Oslo", "Rome"]}},
        "required": ["place"],
        "additionalProperties": False,
    },
}
KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def server(demo_file: Path) -> Iterator[Running]:
    with (
        chalot.load(demo_file) as model,
        speaking(model, TEMPLATES["qwen"]),
        Running(model, Settings(name="demo", slots=4, keys=(KEY,))) as running,
    ):
        yield running


@pytest.fixture
def openai(server: Running) -> Iterator[Any]:
    library = pytest.importorskip("openai", reason="needs the package openai")
    with library.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_openai_chat(openai: Any) -> None:
    options: Any = {"model": "demo", "messages": HELLO, "seed": 7, "max_tokens": 24}
    whole = openai.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason in ("stop", "length")
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = openai.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    more = openai.chat.completions.create(**{**options, "n": 2}, extra_body={"top_k": 5})
    assert len(more.choices) == 2


def test_openai_schema_and_tools(openai: Any) -> None:
    schema = {"name": "it", "schema": TOOL["parameters"], "strict": True}
    found = openai.chat.completions.create(
        model="demo",
        messages=HELLO,
        max_completion_tokens=200,
        seed=1,
        response_format={"type": "json_schema", "json_schema": schema},
    )
    assert json.loads(found.choices[0].message.content)["place"] in ("Oslo", "Rome")
    tools = [{"type": "function", "function": TOOL}]
    options: Any = {"model": "demo", "tools": tools, "max_tokens": 200, "seed": 1}
    found = openai.chat.completions.create(
        messages=HELLO, tool_choice="required", parallel_tool_calls=False, **options
    )
    message = found.choices[0].message
    assert found.choices[0].finish_reason == "tool_calls"
    assert json.loads(message.tool_calls[0].function.arguments)["place"] in ("Oslo", "Rome")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "3"}
    turns = [*HELLO, message.model_dump(), result]
    options["max_tokens"] = 3
    assert openai.chat.completions.create(messages=turns, **options).choices[0].message


def test_openai_completions_embeddings_models(openai: Any, server: Running) -> None:
    found = openai.completions.create(model="demo", prompt=["a", "b"], max_tokens=3, echo=True)
    assert [c.text[0] for c in found.choices] == ["a", "b"]
    vector = openai.embeddings.create(model="demo", input="a").data[0].embedding  # asks for base64
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-5)
    assert [m.id for m in openai.models.list()] == ["demo"]
    assert openai.models.retrieve("demo").id == "demo"


def test_openai_responses(openai: Any) -> None:
    options: Any = {"model": "demo", "input": "Hello", "max_output_tokens": 24, "temperature": 0}
    whole = openai.responses.create(**options)
    assert whole.output_text and whole.usage.output_tokens <= 24
    events = list(openai.responses.create(**options, stream=True))
    said = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert said == whole.output_text
    assert events[-1].type == "response.completed" or whole.status == "incomplete"
    with openai.responses.stream(**options) as stream:  # the library's own bookkeeping of events
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == said
    tools: Any = [{"type": "function", "strict": True, **TOOL}]
    called = openai.responses.create(
        model="demo",
        input="Hello",
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=200,
        temperature=0,
    )
    assert called.output[0].type == "function_call"
    result = {"type": "function_call_output", "call_id": called.output[0].call_id, "output": "3"}
    turns = [{"role": "user", "content": "Hello"}, *called.output, result]
    again = openai.responses.create(model="demo", input=turns, tools=tools, max_output_tokens=4)
    assert again.status in ("completed", "incomplete")


def test_openai_errors_are_typed(openai: Any, server: Running) -> None:
    import openai as library

    def asked(**changes: Any) -> Any:
        options: Any = {"model": "demo", "messages": HELLO, **changes}
        return openai.chat.completions.create(**options)

    with pytest.raises(library.BadRequestError, match="temperature"):
        asked(temperature=-3)
    with pytest.raises(library.NotFoundError, match="gpt"):
        asked(model="gpt-9")
    with pytest.raises(library.BadRequestError) as caught:
        asked(messages=[{"role": "user", "content": "x " * 3000}])
    assert caught.value.code == "context_length_exceeded"
    other = library.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0)
    with other, pytest.raises(library.AuthenticationError):
        other.models.list()


def test_anthropic(server: Running) -> None:
    library = pytest.importorskip("anthropic", reason="needs the package anthropic")
    options: Any = {"model": "demo", "max_tokens": 24, "messages": HELLO}
    options["extra_body"] = {"temperature": 0}
    with library.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
        whole = client.messages.create(system="Be brief.", **options)
        assert whole.content[0].text and whole.usage.output_tokens <= 24
        counted = client.messages.count_tokens(model="demo", system="Be brief.", messages=HELLO)
        assert counted.input_tokens == whole.usage.input_tokens
        with client.messages.stream(system="Be brief.", **options) as stream:
            assert "".join(stream.text_stream) == whole.content[0].text
            assert stream.get_final_message().stop_reason == whole.stop_reason
        tool = {"name": "weather", "input_schema": TOOL["parameters"]}
        options = {**options, "max_tokens": 200, "tools": [tool]}
        must: Any = {"type": "tool", "disable_parallel_tool_use": True}
        called = client.messages.create(tool_choice={**must, "name": "weather"}, **options)
        block = called.content[-1]
        assert called.stop_reason == "tool_use" and block.input["place"] in ("Oslo", "Rome")
        with client.messages.stream(tool_choice={**must, "type": "any"}, **options) as stream:
            assert stream.get_final_message().content[-1].type == "tool_use"
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "3"}
        turns = [
            *HELLO,
            {"role": "assistant", "content": called.content},
            {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
        ]
        assert client.messages.create(**{**options, "messages": turns, "max_tokens": 3}).id
        with pytest.raises(library.BadRequestError, match="max_tokens"):
            client.messages.create(**{**options, "max_tokens": 0})


def test_lm_eval_scores_are_those_of_the_process(server: Running, demo_file: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    pytest.importorskip("tenacity", reason="needs the package tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from chalot.evaluate.tasks import scores, split

    pairs = [
        ("import ", "os"),
        ("def f(self", "):\n    return"),
        ("x = 1\n" * 60, "x = 1"),
        ("for i in range(10)", ":\n"),
    ]
    through = LocalCompletionsAPI(
        base_url=server.url + "/v1/completions",
        model="demo",
        tokenizer_backend="remote",
        auth_token=KEY,
        max_length=1024,
        batch_size=2,
    )
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        found = through.loglikelihood(asked, disable_tqdm=True)
    with Model(demo_file) as model:
        expected = [scores(model, *split(model, *pair)) for pair in pairs]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-6)


def test_schemathesis_finds_nothing(server: Running, tmp_path: Path) -> None:
    """Requests made from the OpenAPI document, right and wrong ones, and what comes back."""
    pytest.importorskip("schemathesis", reason="needs the package schemathesis")
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance,response_headers_conformance,negative_data_rejection,"
        "unsupported_method,allow_header_conformance,ignored_auth"
    )
    command = [sys.executable, "-m", "schemathesis.cli", "run", server.url + "/openapi.json"]
    command += ["-H", f"Authorization: Bearer {KEY}", "--checks", checks, "--max-time", "25"]
    command += ["--seed", "1", "--max-examples", "12", "--phases", "examples,coverage,fuzzing"]
    command += ["--suppress-health-check", "all", "--request-timeout", "20"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert server.ask("/health").body["status"] == "ok"
