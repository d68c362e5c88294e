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
