"""Measuring: protocols count what they say, figures equal formulas, runs resume, bad input ends."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chalot import cli
from chalot.demo import FOLDER
from chalot.errors import ChalotError, ContextError, FormatError, KernelError
from chalot.evaluate import PROTOCOLS, compare, log_softmax, report
from chalot.evaluate.answers import first_difference, read_prompts
from chalot.formats.scratch import scratch

VOCABULARY = 37


class Written:
    """A model of given logits: those of a token follow from the token and its place."""

    context = 512

    def __init__(self, seed: int, ties: float = 1.0) -> None:
        self.table = np.random.default_rng(seed).standard_normal((VOCABULARY, VOCABULARY))
        self.scale, self.asked = ties, 0

    def logits(self, ids: list[int]) -> np.ndarray:
        self.asked += 1
        return (self.table[ids] * self.scale).astype(np.float32)


def text(tokens: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(5).integers(0, VOCABULARY, tokens)]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_figures_equal_the_formulas(name: str) -> None:
    protocol, base, other = PROTOCOLS[name], Written(1), Written(2)
    ids, size = text(1300), min(PROTOCOLS[name].window, 512)
    found = compare(base, [other], ids, protocol=protocol, begin=3)
    losses, divergences, same = [], [], 0
    for at in range(0, 1300 - size + 1, size):
        window = ids[at : at + size]
        if protocol.begins:
            window = [3, *window[1:]]
        p, q = (log_softmax(m.logits(window)) for m in (base, other))
        for i in range(int(size * protocol.scored), size - 1):
            losses.append(-p[i, window[i + 1]])
            divergences.append(np.sum(np.exp(p[i]) * (p[i] - q[i])))
            same += int(p[i].argmax() == q[i].argmax())
    assert found[0].tokens == found[1].tokens == len(losses)
    assert found[0].loss == pytest.approx(np.mean(losses))
    assert found[1].kl == pytest.approx(np.mean(divergences))
    assert found[1].kl_99 == pytest.approx(np.quantile(divergences, 0.99))
    assert found[1].same_top == pytest.approx(same / len(losses))


def test_a_report_says_the_window_that_was() -> None:
    way = PROTOCOLS["huggingface"]
    assert way.within(4096, 9000) == way and "of 2048 tokens," in str(way)
    assert "of 1024 tokens and not 2048," in str(way.within(1024, 9000))
    assert "of 10 tokens and not 512," in str(PROTOCOLS["chalot"].within(1024, 10))


def test_the_loss_above_the_base_is_paired() -> None:
    ids, size = text(512 * 4), 512
    base, other = compare(Written(1), [Written(2)], ids)
    each = [
        compare(Written(1), [Written(2)], ids[at : at + size]) for at in range(0, len(ids), size)
    ]
    more = [o.loss - b.loss for b, o in each]
    assert base.excess is None and other.excess == pytest.approx(np.mean(more))
    assert other.excess_error == pytest.approx(np.std(more, ddof=1) / 2)


def test_a_model_costs_nothing_against_itself() -> None:
    found = compare(Written(1), [Written(1)], text(1100))
    assert found[1].kl == 0 and found[1].same_top == 1 and found[0].loss == found[1].loss


def test_an_interrupted_run_goes_on() -> None:
    ids, kept = text(2100), []

    class Stops(Exception):
        pass

    def stop_after_two(window: list) -> None:
        kept.append(window)
        if len(kept) == 2:
            raise Stops

    with pytest.raises(Stops):
        compare(Written(1), [Written(2)], ids, keep=stop_after_two)
    again = Written(1)
    resumed = compare(again, [Written(2)], ids, done=kept)
    assert resumed == compare(Written(1), [Written(2)], ids) and again.asked == 2


def test_what_is_kept_survives_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHALOT_HOME", str(tmp_path))
    kept: list = []
    compare(Written(1), [Written(2)], text(1100), keep=kept.append)
    unfinished = report.Unfinished("key")
    for window in kept:
        unfinished.keep(window)
    with unfinished.path.open("ab") as file:
        file.write(b'[3, [{"losses": [1.')  # killed in the middle of a line
    assert report.Unfinished("key").read(2) == kept
    assert report.Unfinished("key").read(3) == []
    unfinished.drop()
    assert report.Unfinished("key").read(2) == []


def test_two_at_once_are_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHALOT_HOME", str(tmp_path))
    kept: list = []
    compare(Written(1), [Written(2)], text(1100), keep=kept.append)
    one, two = report.Unfinished("key"), report.Unfinished("key")
    for window in kept:
        one.keep(window)
        two.keep(window)
    assert report.Unfinished("key").read(2) == kept[:1]


@pytest.mark.parametrize(("tokens", "protocol"), [(0, "chalot"), (1, "chalot"), (2, "llama.cpp")])
def test_too_short_a_text(tokens: int, protocol: str) -> None:
    with pytest.raises(ContextError):
        compare(Written(1), [], text(tokens), protocol=PROTOCOLS[protocol])


def test_logits_that_are_no_numbers() -> None:
    broken = Written(1)
    broken.table[3] = np.nan
    with pytest.raises(KernelError, match="NaN"):
        compare(broken, [], text(600))


def test_first_difference() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1 and first_difference([1], [1, 3]) == 1


def test_prompts(tmp_path: Path) -> None:
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a"}\n\n{"prompt": "b", "more": 1}\n')
    assert read_prompts(lines) == ["a", "b"]
    for wrong in ('{"prompt": 1}', "[]", "{", ""):
        lines.write_text(wrong)
        with pytest.raises(ChalotError):
            read_prompts(lines)


def test_eval_against_the_source(
    demo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("CHALOT_HOME", str(tmp_path))
    words = FOLDER / "heldout.txt"
    command = ["eval", str(demo_file), "--against", str(FOLDER), "--text", str(words)]
    assert cli.main([*command, "--tokens", "1100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["text"]
    assert found["quality"]["tokens"] == 2 * 511
    assert 0.005 < found["quality"]["kl"] < 0.06 and found["quality"]["same_top"] > 0.85
    assert found["base"]["perplexity"] < found["quality"]["perplexity"] < 40
    assert list((tmp_path / "eval").iterdir()) == []  # neither the base nor what was kept


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text", "nowhere.txt"], "cannot be read"),
        (["--text", str(FOLDER / "model.safetensors")], "not UTF-8"),
        (["--text", str(FOLDER / "heldout.txt"), "--protocol", "mine"], "chalot, llama.cpp"),
        (["--text", str(FOLDER / "heldout.txt"), "--tokens", "1"], "at least two"),
        (["--text", str(FOLDER / "heldout.txt"), "--tokens", "-9"], "--tokens -9; expected"),
        (["--text", "."], "cannot be read"),
        ([], "--text FILE"),
        (["--generate", "p.txt"], "--against"),
        (["--generate", "p.txt", "--against", str(FOLDER)], "cannot be read"),
        (["--generate", "p.txt", "--max-tokens", "0"], "--max-tokens 0; expected"),
        (["--tasks", "mine", "--limit", "-1"], "--limit -1; expected"),
    ],
)
def test_bad_input_ends_in_one_line(
    demo_file: Path, options: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["eval", str(demo_file), *options]) == 1
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text", "t", "--limit", "3"], "--limit, which is of use with --tasks"),
        (["--text", "t", "--max-tokens", "3"], "--max-tokens"),
        (["--tasks", "t", "--protocol", "chalot"], "--protocol"),
        (["--tasks", "t", "--against", "s"], "--against"),
        (["--text", ""], "--text: found an empty text"),
    ],
)
def test_what_would_be_ignored_is_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", "nowhere.myai", *options])
    assert caught.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [["--generate", "p.txt", "--against", str(FOLDER)], ["--tasks", "t"]]
)
def test_a_missing_extra_is_said_before_anything_is_measured(
    demo_file: Path,
    tmp_path: Path,
    option: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("import os\n")
    for name in ("rouge_score", "rouge_score.rouge_scorer", "lm_eval", "lm_eval.evaluator"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(report, "evaluate", lambda *_, **__: pytest.fail("measured"))
    assert cli.main(["eval", str(demo_file), "--text", str(FOLDER / "heldout.txt"), *option]) == 1
    assert "pip install 'chalot[eval]'" in capsys.readouterr().err


def test_another_models_text_is_refused(demo_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for path in FOLDER.iterdir():
        if path.suffix in {".json", ".safetensors"}:
            content = path.read_bytes()
            if path.name == "tokenizer.json":
                document = json.loads(content)
                document["model"]["merges"] = document["model"]["merges"][:2000]
                content = json.dumps(document).encode()
            (folder / path.name).write_bytes(content)
    with pytest.raises(FormatError, match="other tokens"):
        report.evaluate(demo_file, FOLDER / "heldout.txt", against=folder, tokens=600)


HELD = """
import sys, time
from pathlib import Path
from chalot.formats.scratch import scratch
with scratch(Path(sys.argv[1]), "base-") as made:
    (made / "base.myai").write_bytes(b"much")
    print(made.name, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path) -> None:
    def start() -> tuple[subprocess.Popen[str], Path]:
        words = [sys.executable, "-c", HELD, str(tmp_path)]
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        return child, tmp_path / child.stdout.readline().strip()

    killed, left = start()
    killed.kill()
    killed.communicate()
    (tmp_path / "base-file").write_text("no folder: not of our making")
    assert (left / "base.myai").exists()
    running, used = start()
    with scratch(tmp_path, "base-") as mine:
        assert not left.exists() and (used / "base.myai").exists() and mine.is_dir()
    running.communicate()  # ends its input
    assert [p.name for p in tmp_path.iterdir()] == ["base-file"]
