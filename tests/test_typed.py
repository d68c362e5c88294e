"""Wrong Python types end in one typed error, which is a TypeError too, before anything is made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chalot
from chalot.demo import FOLDER
from chalot.plan import plan

CALLS: list[tuple[Callable[..., Any], dict[str, object], str]] = [
    (chalot.convert, {"source": 5, "out": "x"}, "source: found int, expected a str or a path"),
    (chalot.convert, {"source": b"x", "out": "x"}, "source: found bytes"),
    (chalot.convert, {"source": FOLDER, "out": None}, "out: found NoneType"),
    (chalot.convert, {"source": FOLDER, "out": "x", "scheme": 4}, "scheme: found int"),
    (chalot.convert, {"source": FOLDER, "out": "x", "threads": "2"}, "threads: found str"),
    (chalot.convert, {"source": FOLDER, "out": "x", "threads": 2.5}, "threads: found float"),
    (chalot.convert, {"source": FOLDER, "out": "x", "plan": 3}, "plan: found int"),
    (chalot.convert, {"source": FOLDER, "out": "x", "refine": "gptq"}, "refine: found str"),
    (chalot.export, {"source": FOLDER, "out": "x.gguf", "type": 4}, "type: found int"),
    (chalot.export, {"source": FOLDER, "out": "x", "to": "npz", "bits": 4}, "bits: found int"),
    (chalot.load, {"path": 5}, "path: found int"),
    (chalot.load, {"path": "x.myai", "context": "3"}, "context: found str"),
    (chalot.load, {"path": "x.myai", "kv_budget": "3MB"}, "kv_budget: found str"),
    (chalot.describe, {"source": 3}, "source: found int"),
    (chalot.describe, {"source": FOLDER, "scheme": 4}, "scheme: found int"),
    (chalot.describe, {"source": FOLDER, "context": 4.0}, "context: found float"),
    (chalot.tokenizer, {"model": None}, "model: found NoneType"),
    (plan, {"source": FOLDER, "out": "x", "text": 3}, "text: found int"),
]


@pytest.mark.parametrize(("call", "given", "said"), CALLS)
def test_a_wrong_type_is_a_typed_error(
    call: Callable[..., Any],
    given: dict[str, object],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(chalot.ChalotError) as caught:
        call(**given)
    assert isinstance(caught.value, TypeError) and said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_schemes_are_named(tmp_path: Path) -> None:
    with pytest.raises(chalot.ChalotError, match="nl4"):
        chalot.Scheme.parse(4)  # type: ignore[arg-type]


def test_whole_numbers_of_numpy_are_whole_numbers(demo_file: Path) -> None:
    with chalot.load(demo_file, context=np.int64(9)) as model:
        assert model.context == 9
    assert chalot.describe(demo_file).memory(np.int32(9)).context == 9


def test_a_closed_model_says_so(demo_file: Path) -> None:
    model = chalot.load(demo_file)
    with model.session() as left_open:
        model.generate("a", max_tokens=1)
        left_open.prefill([1])
        model.close()
        uses: list[Callable[[], object]] = [
            lambda: model.generate("a"),
            lambda: model.generate_batch(["a"]),
            lambda: model.chat([{"role": "user", "content": "a"}]),
            lambda: model.logits([1]),
            lambda: left_open.prefill([1]),
            model.session,
        ]
        for use in uses:
            with pytest.raises(chalot.ChalotError, match="the model is closed; load it again"):
                use()
    model.close()


def test_wrong_types_of_a_model_are_typed_errors(demo_file: Path) -> None:
    with chalot.load(demo_file) as model:
        uses: list[tuple[Callable[..., Any], Any, dict[str, Any], str]] = [
            (model.generate_batch, "def f(", {}, "prompts: found str, expected a list of prompts"),
            (model.generate_batch, [None], {}, "prompt: found NoneType"),
            (model.generate_batch, ["a"], {"max_tokens": 4.5}, "max_tokens: found float"),
            (model.generate, None, {}, "prompt: found NoneType, expected a list of token ids, or"),
            (model.generate, [1.5], {}, "prompt: found float in it, expected token ids"),
            (model.generate, "a", {"max_tokens": 4.5}, "max_tokens: found float"),
            (model.generate, "a", {"draft": 5}, "draft: found int"),
            (model.chat, [{"role": "user", "content": "a"}], {"max_tokens": 4.5}, "max_tokens"),
            (model.logits, [1.5], {}, "ids: found float in it"),
            (model.logits, "abc", {}, "ids: found str, expected a list of token ids"),
        ]
        for call, given, options, said in uses:
            with pytest.raises(chalot.ChalotError) as caught:
                call(given, **options)
            assert isinstance(caught.value, TypeError) and said in str(caught.value)
        assert model.logits(np.array([1, 2])).shape[0] == 2


@pytest.mark.parametrize("options", [{"kv_budget": -1}, {"texts": 0}, {"texts": -1}])
def test_a_cache_of_nothing_is_refused(demo_file: Path, options: dict[str, int]) -> None:
    with pytest.raises(chalot.ChalotError, match="holds nothing|texts is"):
        chalot.load(demo_file, **options)
