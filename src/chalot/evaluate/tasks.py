"""EleutherAI's lm-eval on a chalot model: known tasks by name, or a task file of one's own.

The adapter gives lm-eval what its own do: log-likelihoods of continuations, of whole texts, and
greedy answers (https://github.com/EleutherAI/lm-evaluation-harness, docs/model_guide.md).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chalot.errors import ContextError, FormatError, UnsupportedError
from chalot.evaluate.quality import log_softmax
from chalot.load import Model

Progress = Callable[[int, int], None]


def scores(model: Model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood (nats) of ids after others, and whether each is the most likely one.

    A context that is too long loses its beginning. Raises ContextError for too long a continuation.
    """
    room = model.context + 1 - len(continuation)
    if room < 1:
        raise ContextError(
            f"a continuation of {len(continuation)} tokens leaves no room in a context of "
            f"{model.context}; {model.engine.remedy}"
        )
    ids = (context[-room:] + continuation)[:-1]
    total, greedy, at = 0.0, True, 0
    for logits in model.logits_in_parts(ids, 64, len(ids) - len(continuation)):
        truth = np.array(continuation[at : at + len(logits)])
        found = log_softmax(logits)
        total += float(found[np.arange(len(truth)), truth].sum())
        greedy = greedy and bool((found.argmax(axis=1) == truth).all())
        at += len(logits)
    return total, greedy


def split(model: Model, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both; spaces between them belong to the continuation, as in lm-eval's own adapters."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        return [start_of(model)], model.tokenizer.encode(continuation)
    before = model.tokenizer.encode(context)
    return before, model.tokenizer.encode(context + continuation)[len(before) :]


def start_of(model: Model) -> int:
    """The token that stands before a text: its beginning, or an end."""
    begin = model.tokenizer.bos_id
    if begin is not None:
        return begin
    return min(model.tokenizer.eos_ids, default=0)


def rolling(model: Model, text: str) -> float:
    """Log-likelihood of a whole text, in parts that each see what context there is room for."""
    ids = model.tokenizer.encode(text)
    total = 0.0
    for at in range(0, len(ids), model.context):
        part = ids[at : at + model.context]
        before = [start_of(model), *ids[:at]][-(model.context + 1 - len(part)) :]
        total += scores(model, before, part)[0]
    return total


def answer(model: Model, context: str, settings: dict[str, Any]) -> str:
    """A greedy answer, ended by any of `until`."""
    until = settings.get("until") or []
    most = int(settings.get("max_gen_toks", 256))
    ids = model.tokenizer.encode(context)[-(model.context - most) :]
    stop = [until] if isinstance(until, str) else list(until)
    return model.generate(ids, max_tokens=most, temperature=0, stop=stop)


def adapter(model: Model, progress: Progress) -> Any:
    """An `lm_eval.api.model.LM` around a model."""
    from lm_eval.api.model import LM

    class Chalot(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [scores(model, *split(model, *r.args)) for r in counted(requests, progress)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [rolling(model, r.args[0]) for r in counted(requests, progress)]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [answer(model, *r.args) for r in counted(requests, progress)]

    return Chalot()


def counted(requests: list[Any], progress: Progress) -> Iterator[Any]:
    """Each request; `progress` hears how many there were."""
    for n, request in enumerate(requests, start=1):
        yield request
        progress(n, len(requests))


def evaluator() -> tuple[Any, Any]:
    """What runs tasks, and what finds them. Raises UnsupportedError without the extra `eval`."""
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UnsupportedError(
            f"tasks need {error.name}; install it: pip install 'chalot[eval]'"
        ) from None
    return simple_evaluate, TaskManager


def run_tasks(
    model: Model,
    tasks: list[str],
    limit: int | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, dict[str, Any]]:
    """Task -> its metrics. A task is a name that lm-eval knows, or a .yaml file of one's own.

    Raises UnsupportedError without the extra `eval`, FormatError for a task that is not there.
    """
    simple_evaluate, manager_of = evaluator()
    files = [Path(t) for t in tasks if t.endswith((".yaml", ".yml"))]
    missing = [str(f) for f in files if not f.is_file()]
    manager = manager_of(include_path=sorted({str(f.resolve().parent) for f in files}) or None)
    names = [Path(t).stem if t.endswith((".yaml", ".yml")) else t for t in tasks]
    missing += [n for n in names if n not in manager.all_tasks]
    if missing:
        raise FormatError(
            f"task {missing[0]}: lm-eval has none of that name; expected one it knows, or a .yaml "
            "file whose `task:` is its own name"
        )
    found = simple_evaluate(
        adapter(model, progress),
        tasks=names,
        task_manager=manager,
        limit=limit,
        bootstrap_iters=1000,
        random_seed=0,
        log_samples=False,
    )
    return {
        name: {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "alias"}
        for name, row in found["results"].items()
    }
