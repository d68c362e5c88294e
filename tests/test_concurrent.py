"""Many prompts on one model: batches, asynchronous streams, and the examples."""

import asyncio
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import chalot
from chalot.engine.sampler import SamplingError
from chalot.errors import ContextError
from chalot.load import Model

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPTS = [f"def f{'x' * i}(a, b):" for i in range(12)]


def test_a_batch_is_each_prompt_alone(model: Model) -> None:
    options = {"max_tokens": 12, "seed": 5, "presence_penalty": 0.5}
    prompts = [*PROMPTS, model.tokenizer.encode("import")]
    alone = [model.generate(p, **options) for p in prompts]
    assert model.generate_batch(prompts, **options) == alone
    stop = alone[0][3:6]
    cut = [model.generate(p, stop=[stop], **options) for p in prompts]
    assert model.generate_batch(iter(prompts), stop=stop, **options) == cut != alone
    assert model.generate_batch([]) == []


def test_without_a_seed_each_prompt_draws_its_own(model: Model) -> None:
    found = model.generate_batch(["The"] * 6, max_tokens=12, temperature=1.5, top_k=0)
    assert len(set(found)) > 1


def test_the_context_is_the_end_of_a_batch_too(demo_file: Path) -> None:
    with chalot.load(demo_file, context=30) as small:
        prompts = [[1] * 20, [2] * 30, [3] * 29]
        alone = [small.generate(p, seed=1) for p in prompts]
        assert small.generate_batch(prompts, seed=1) == alone
        assert small.generate_batch(["a"], max_tokens=0) == [""]


def test_the_first_error_ends_a_batch(model: Model) -> None:
    with pytest.raises(ContextError, match="token ids"):
        model.generate_batch(["The", [10**6]], max_tokens=5)
    with pytest.raises(SamplingError, match="stop string"):
        model.generate_batch(["The"], stop=[""])
    with pytest.raises(SamplingError, match="max_tokens"):
        model.generate_batch(["The"], max_tokens=-1)
    with pytest.raises(SamplingError, match="temperature"):
        model.generate_batch(["The"], temperature=-1)
    scheduler = model._concurrent.worker().scheduler
    model._concurrent.worker().call(lambda: None).result(20)
    model.generate_batch(["The"], max_tokens=1)
    assert scheduler.stats.running == scheduler.stats.waiting == 0


def test_streams_share_passes_and_say_what_they_say_alone(model: Model) -> None:
    async def one(n: int) -> str:
        return "".join([p async for p in model.astream(PROMPTS[n], max_tokens=10, seed=n)])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(one(n) for n in range(8)))

    alone = [model.generate(PROMPTS[n], max_tokens=10, seed=n) for n in range(8)]
    assert asyncio.run(all_of_them()) == alone
    assert model._concurrent.worker().scheduler.stats.passes < 8 * 10


def test_a_stream_that_is_left_is_cancelled(model: Model) -> None:
    async def leave() -> None:
        stream = model.astream("The", max_tokens=900, temperature=1.5, seed=1)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(leave())
    worker = model._concurrent.worker()
    for _ in range(2):  # the cancelled one has left when a second function has run behind it
        worker.call(lambda: None).result(20)
    model.generate_batch(["The"], max_tokens=1)
    assert worker.scheduler.stats.cancelled == 1 and worker.scheduler.stats.running == 0


def test_an_error_reaches_the_stream(model: Model) -> None:
    async def ask() -> None:
        async for _ in model.astream([10**6]):
            pass

    with pytest.raises(ContextError, match="token ids"):
        asyncio.run(ask())


def test_closing_a_model_ends_its_thread(demo_file: Path) -> None:
    before = threading.active_count()
    with chalot.load(demo_file) as model:
        model.generate_batch(["The"], max_tokens=2)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_examples_run(name: str, demo_file: Path) -> None:
    """As a user runs them, on the bundled model."""
    command = [sys.executable, str(EXAMPLES / name), str(demo_file), "def add(a, b):", "import "]
    one_prompt = name in ("stream.py", "choices.py")
    run = subprocess.run(command[: 4 if one_prompt else 5], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() and "Traceback" not in run.stderr


def test_every_example_says_how_it_is_run() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert f"python examples/{path.name} MODEL.myai" in path.read_text("utf-8")
        assert runpy.run_path(str(path), run_name="read")["__doc__"]
