"""Answers of two models to the same prompts, side by side: how alike is what they write?

Greedy, so that differences are the models' own. ROUGE-L is the F-measure of the longest common
subsequence of words (Lin 2004), by rouge-score; BLEU (Papineni et al. 2002) that of the whole set,
by sacrebleu: both from the extra `eval`. They measure likeness to the base's text, not truth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chalot.errors import FormatError, UnsupportedError
from chalot.formats.documents import parse_json
from chalot.formats.files import read_text
from chalot.load import Model

MOST_PROMPTS = 10_000


@dataclass(frozen=True)
class Answer:
    """`first_difference` is the first new token that differs; None where none does."""

    prompt: str
    base: str
    model: str
    first_difference: int | None
    rouge_l: float


@dataclass(frozen=True)
class Answers:
    """All prompts. `exact` is the share of answers that are the same, token for token."""

    max_tokens: int
    exact: float
    rouge_l: float
    bleu: float
    answers: tuple[Answer, ...]


def read_prompts(path: Path) -> list[str]:
    """A prompt a line; or JSON lines (.jsonl) with "prompt". Raises FormatError."""
    prompts = []
    for n, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            found = parse_json(line.encode(), f"{path}: line {n}")
            prompt = found.get("prompt") if isinstance(found, dict) else None
            if not isinstance(prompt, str) or not prompt:
                raise FormatError(f'{path}: line {n}: expected an object with a "prompt"')
            prompts.append(prompt)
        else:
            prompts.append(line)
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise FormatError(f"{path}: found {len(prompts)} prompts, expected 1 to {MOST_PROMPTS:,}")
    return prompts


def greedy(model: Model, prompt: str, most: int) -> list[int]:
    """New ids, up to an end of text."""
    ends = model.tokenizer.eos_ids
    ids: list[int] = []
    with model.session(temperature=0) as session:
        session.prefill(model.tokenizer.encode(prompt))
        while len(ids) < most and len(session.tokens) < model.context:
            token = session.step()
            if token in ends:
                break
            ids.append(token)
    return ids


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two texts part; None where they are the same."""
    if list(a) == list(b):
        return None
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def scorers() -> tuple[Any, Any]:
    """ROUGE-L of two texts, BLEU of many. Raises UnsupportedError without the extra `eval`."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise UnsupportedError(
            f"comparing answers needs {error.name}; install it: pip install 'chalot[eval]'"
        ) from None
    return RougeScorer(["rougeL"]), corpus_bleu


def compare_answers(
    base: Model,
    model: Model,
    prompts: Sequence[str],
    max_tokens: int = 64,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Answers:
    """What both write after each prompt. Raises UnsupportedError without the extra `eval`."""
    scorer, corpus_bleu = scorers()
    out = []
    for done, prompt in enumerate(prompts, start=1):
        a, b = (greedy(m, prompt, max_tokens) for m in (base, model))
        texts = base.tokenizer.decode(a), model.tokenizer.decode(b)
        score = 1.0 if texts[0] == texts[1] else scorer.score(*texts)["rougeL"].fmeasure
        out.append(Answer(prompt, *texts, first_difference(a, b), float(score)))
        progress(done, len(prompts))
    bleu = corpus_bleu([a.model for a in out], [[a.base for a in out]]).score
    return Answers(
        max_tokens,
        sum(a.first_difference is None for a in out) / len(out),
        sum(a.rouge_l for a in out) / len(out),
        float(bleu),
        tuple(out),
    )
