"""What needs the extra `eval`: answers compared, tasks of lm-eval. CI runs it where that is."""

import json
from pathlib import Path

import pytest

from chalot.demo import FOLDER
from chalot.errors import FormatError
from chalot.load import Model

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's own warnings are not ours

QUESTIONS = [
    {"question": "import ", "choices": ["os", "zzqx"], "answer": 0},
    {"question": "def f(self", "choices": [":::=", "):"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
{rest}
"""
KINDS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]""",
    "whole": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]""",
}


def task(folder: Path, name: str) -> str:
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    file = folder / f"{name}.yaml"
    file.write_text(TASK.format(name=name, data=data, rest=KINDS[name]))
    return str(file)


@pytest.fixture
def model(demo_file: Path):
    with Model(demo_file) as opened:
        yield opened


def test_tasks_of_ones_own(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chalot.evaluate.tasks import rolling, run_tasks

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found = run_tasks(model, [task(tmp_path, name) for name in KINDS])
    assert found["choice"]["acc,none"] == 1
    texts = [q["question"] for q in QUESTIONS]
    bits = -sum(rolling(model, t) for t in texts) / sum(map(len, texts)) / 0.6931471805599453
    assert found["whole"]["bits_per_byte,none"] == pytest.approx(bits)
    with pytest.raises(FormatError, match="nosuch"):
        run_tasks(model, ["nosuch"])


def test_long_texts_are_scored_whole(demo_file: Path) -> None:
    from chalot.evaluate.tasks import rolling

    text = (FOLDER / "heldout.txt").read_text("utf-8")[:2000]
    with Model(demo_file, context=1024) as wide, Model(demo_file, context=300) as narrow:
        assert rolling(narrow, text) < rolling(wide, text) < 0  # less context, less likely


def test_answers_of_a_model_to_itself(model: Model) -> None:
    from chalot.evaluate.answers import compare_answers

    found = compare_answers(model, model, ["import ", "def f("], 8)
    assert found.exact == 1 and found.rouge_l == 1 and found.bleu == pytest.approx(100)
