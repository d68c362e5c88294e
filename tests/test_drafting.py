"""How much is drafted, what is kept of that between runs, draft models, and the command line."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import chalot
from chalot import cli
from chalot.engine.pacing import PAUSE, Pace, StepCosts
from chalot.errors import ChalotError, FormatError, TokenizerError
from chalot.load import Model, drafts
from checkpoints import write_checkpoint

# ---- pace


def paced(slope: float, belief: float = 0.5, most: int = 16) -> Pace:
    """Passes that cost `slope` of one for each token more."""
    return Pace(StepCosts(1.0, {n: 1 + slope * (n - 1) for n in range(2, most + 2)}), belief, most)


def test_nothing_is_drafted_before_a_plain_pass() -> None:
    pace = Pace(StepCosts(), 0.9)
    assert pace.length(16) == 0
    pace.costs.note(1, 0.01)
    assert pace.length(16) > 0


def test_the_limit_doubles_halves_and_comes_back() -> None:
    pace = paced(0.0, 0.9)
    lengths = []
    for kept in (8, 16, 16, 0, 0, 0, 4, 8):
        lengths.append(pace.length(16))
        pace.learn(lengths[-1], min(kept, lengths[-1]))
    assert lengths == [8, 16, 16, 16, 8, 4, 4, 9]  # with the token before, 5 and 10 in a pass
    assert pace.length(3) == 3


def test_what_never_pays_is_hardly_tried() -> None:
    """A pass of n tokens costs n passes: the pauses grow."""
    pace = paced(1.0)
    tried = 0
    for _ in range(5000):
        count = pace.length(16)
        tried += count > 0
        pace.learn(count, 0)
    assert 1 < tried < 5000 / PAUSE[1] + 10


@pytest.mark.parametrize("slope", [0.01, 0.06, 0.3, 0.85])
@pytest.mark.parametrize("right", [0.0, 0.1, 0.3, 0.6, 0.9, 0.99])
def test_drafting_costs_little_and_gains_what_it_can(slope: float, right: float) -> None:
    """Against plain decoding, in passes of one token; each token is right by chance."""
    rng = np.random.Generator(np.random.Philox(7))
    pace = paced(slope)
    tokens = spent = 0.0
    for _ in range(600):
        count = pace.length(16)
        kept = next((n for n in range(count) if rng.random() >= right), count)
        pace.learn(count, kept)
        tokens, spent = tokens + kept + 1, spent + pace.costs.of(count + 1)
    best = max(sum(right**n for n in range(k + 1)) / (1 + slope * k) for k in range(17))
    assert tokens / spent > 0.97
    assert tokens / spent > 0.75 * best


def test_the_time_that_drafting_takes_counts() -> None:
    pace = paced(0.01, 0.7)
    assert pace.length(16) == 8
    pace.learn(8, 6, seconds=8 * 2.0)  # each drafted token as long as two passes
    assert pace.length(16) == 0


def test_costs_between_those_that_are_known() -> None:
    costs = StepCosts(1.0, {4: 1.3, 8: 1.5})
    assert [costs.of(n) for n in (1, 4, 6, 8)] == pytest.approx([1, 1.3, 1.4, 1.5])
    assert costs.of(16) > 2 and 1 < StepCosts().of(2) < 1.1


def test_costs_are_of_the_last_passes_and_not_of_the_slowest() -> None:
    costs = StepCosts()
    costs.note(4, 1.0)  # nothing to compare with yet
    assert not costs.relative
    for _ in range(50):
        costs.note(1, 0.010)
        costs.note(4, 0.012)
    assert costs.one == pytest.approx(0.010) and costs.relative[4] == pytest.approx(1.2, rel=0.01)
    costs.note(1, 10.0)  # another process's work
    costs.note(4, 10.0)
    assert costs.one == pytest.approx(0.010) and costs.relative[4] == pytest.approx(1.2)
    for _ in range(9):
        costs.note(1, 0.020)  # a longer text
    assert costs.one == pytest.approx(0.020)


def test_a_first_pass_that_is_off_is_not_believed() -> None:
    costs = StepCosts(0.01)
    costs.note(2, 1.0)
    assert costs.of(2) < 1.1
    for _ in range(6):
        costs.note(2, 0.018)
    assert costs.of(2) == pytest.approx(1.8)


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(1e-6, 10)), max_size=60))
def test_costs_are_finite_and_at_least_one(passes: list[tuple[int, float]]) -> None:
    costs = StepCosts()
    for tokens, seconds in passes:
        costs.note(tokens, seconds)
    assert all(1 <= costs.of(n) < np.inf for n in range(1, 40))


# ---- what is kept


@pytest.fixture
def kept(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the bundled model's costs are kept."""
    monkeypatch.setenv("CHALOT_HOME", str(tmp_path / "home"))
    return drafts.costs_at(model.file, model.backend.name, model.backend.threads)


def measured() -> StepCosts:
    return StepCosts(0.01, {2: 1.1, 5: 1.25}, {1: 100, 2: 5, 5: 5})


def test_costs_are_kept_and_read_again(model: Model, kept: Path) -> None:
    drafts.keep_costs(measured(), model.file, model.backend.name, model.backend.threads)
    assert json.loads(kept.read_text()) == {"2": 1.1, "5": 1.25}
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]
    with chalot.load(model.file.path) as again:
        assert again.engine.costs == StepCosts(None, {2: 1.1, 5: 1.25}, {})
    assert json.loads(kept.read_text()) == {"2": 1.1, "5": 1.25}  # nothing new was learnt


def test_a_model_that_has_drafted_keeps_its_costs(demo_file: Path, kept: Path) -> None:
    with chalot.load(demo_file) as model:
        for draft in (False, True):
            with model.session(temperature=0, draft=draft) as session:
                session.prefill([5, 6, 7, 8] * 8)
                for _ in range(40):
                    session.step()
    assert all(1 <= ratio <= 256 for ratio in json.loads(kept.read_text()).values())


def test_too_little_is_not_kept(model: Model, kept: Path) -> None:
    few = StepCosts(0.01, {2: 1.1}, {1: 3, 2: 1})
    for costs in (StepCosts(), few, StepCosts(0.01, {}, {1: 100})):
        drafts.keep_costs(costs, model.file, model.backend.name, model.backend.threads)
    assert not kept.exists()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[1]", b"null", b"\xff", b'{"2": "x"}', b'{"x": 1.5}', b'{"1": 1.5}'),
        *(b'{"2": 0.5}', b'{"2": -1}', b'{"2": 1e999}', b'{"99999999999999999999": 2}'),
        *(b'{"2": NaN}', b'{"257": 2}', b'{"2":1.5' + b" " * drafts.MOST_BYTES + b"}"),
        b'{"2": ' + b"[" * 5000,
    ],
)
def test_damaged_costs_are_measured_again(model: Model, kept: Path, content: bytes) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_bytes(content)
    with chalot.load(model.file.path) as again:
        assert again.engine.costs == StepCosts()
    drafts.keep_costs(measured(), model.file, model.backend.name, model.backend.threads)
    assert json.loads(kept.read_text()) == {"2": 1.1, "5": 1.25}


def test_no_place_for_costs_is_no_error(model: Model, kept: Path) -> None:
    home = kept.parent.parent
    home.write_text("a file where a folder should be")
    with chalot.load(model.file.path) as again:
        again.engine.costs = measured()
    kept.parent.parent.unlink()
    kept.mkdir(parents=True)
    with chalot.load(model.file.path) as again:
        again.engine.costs = measured()
    assert list(kept.parent.iterdir()) == [kept]


# ---- draft models


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models: with the bundled tokenizer, with padded rows, another tokenizer, and none."""
    folder = tmp_path_factory.mktemp("small")

    def swapped(path: Path) -> None:
        document = json.loads(path.read_text())
        words = document["model"]["vocab"]
        a, b = [word for word, n in words.items() if n in (3000, 3001)]
        words[a], words[b] = words[b], words[a]
        path.write_text(json.dumps(document))

    def shorter(path: Path) -> None:
        document = json.loads(path.read_text())
        document["added_tokens"] = document["added_tokens"][:-1]
        path.write_text(json.dumps(document))

    def spaced(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()), indent=3))

    changes = {"same": None, "spaced": spaced, "swapped": swapped, "shorter": shorter}
    files = {}
    for name in (*changes, "padded", "none", "none, other size"):
        size = {"padded": 4160, "none, other size": 4000}.get(name, 4096)
        source = write_checkpoint(folder / f"{name} source", seed=3, vocab_size=size)
        if changes.get(name):
            changes[name](source / "tokenizer.json")
        if name.startswith("none"):
            (source / "tokenizer.json").unlink()
            (source / "tokenizer_config.json").unlink()
        files[name] = folder / f"{name}.myai"
        chalot.convert(source, files[name], "int8")
    return files


@pytest.fixture(scope="module")
def large(demo_file: Path) -> Iterator[Model]:
    with chalot.load(demo_file, context=512) as model:
        yield model


@pytest.mark.parametrize("name", ["same", "spaced", "padded"])
def test_a_draft_model_with_the_same_ids(
    large: Model, small_files: dict[str, Path], name: str
) -> None:
    ask = {"max_tokens": 24, "seed": 1}
    plain = large.generate("def add", draft=False, **ask)
    assert large.generate("def add", draft=small_files[name], **ask) == plain


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("swapped", "as token 3000, expected .*; choose a draft model of the same family"),
        ("shorter", "found 4095 tokens, expected 4096"),
        ("none", "found 4096 ids without a tokenizer, expected a tokenizer"),
    ],
)
def test_a_draft_model_with_other_ids_is_refused(
    large: Model, demo_file: Path, small_files: dict[str, Path], name: str, error: str
) -> None:
    for _ in range(2):
        with pytest.raises(TokenizerError, match=error):
            large.generate("def", draft=small_files[name])
    with pytest.raises(TokenizerError, match=error):
        chalot.load(demo_file, draft=small_files[name])
    assert large.generate("def", seed=1, max_tokens=3)


def test_models_without_tokenizers_need_as_many_ids(small_files: dict[str, Path]) -> None:
    with chalot.load(small_files["none"], draft=small_files["none"]) as model:
        found = []
        for draft in (None, False):
            with model.session(temperature=0, draft=draft) as session:
                session.prefill([1, 2, 3])
                found.append([session.step() for _ in range(12)])
        assert found[0] == found[1]
        with pytest.raises(TokenizerError, match="found 4000 ids without .*, expected 4096 ids"):
            model.session(draft=small_files["none, other size"])


def test_what_is_no_model_cannot_draft(large: Model, tmp_path: Path) -> None:
    (tmp_path / "x.myai").write_bytes(b"x" * 300)
    with pytest.raises(FormatError):
        large.generate("def", draft=tmp_path / "x.myai")
    with pytest.raises(ChalotError, match="nowhere"):
        large.generate("def", draft=tmp_path / "nowhere.myai")


def test_a_draft_model_with_a_shorter_context(large: Model, tmp_path: Path) -> None:
    """Beyond it nothing is drafted by the model."""
    source = write_checkpoint(tmp_path / "source", max_position_embeddings=64)
    chalot.convert(source, tmp_path / "short.myai", "int8")
    ask = {"max_tokens": 60, "temperature": 0}
    prompt = large.tokenizer.encode("import os\nimport sys\n" * 5)
    plain = large.generate(prompt, draft=False, **ask)
    assert large.generate(prompt, draft=tmp_path / "short.myai", **ask) == plain


# ---- the command line


def test_the_options_change_nothing_but_the_stats(
    demo_file: Path, small_files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "import os\nimport sys\nimport os\n"
    run = ["run", str(demo_file), prompt, "--max-tokens", "40", "--seed", "1", "--json"]
    answers = []
    for more in ([], ["--no-draft"], ["--draft-tokens", "3"], ["--draft-tokens", "0"]):
        assert cli.main([*run, *more]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert cli.main([*run, "--draft", str(small_files["same"])]) == 0
    answers.append(json.loads(capsys.readouterr().out))
    assert len({a["text"] for a in answers}) == 1
    for answer, off in zip(answers, (False, True, False, True, False), strict=True):
        stats = answer["stats"]
        assert {"drafted", "accepted", "passes", "speed_up", "acceptance"} <= stats.keys()
        assert stats["tokens_per_pass"] == pytest.approx(1 + stats["accepted"] / stats["passes"])
        assert not (off and stats["drafted"])


def test_the_options_refuse(
    demo_file: Path, small_files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", str(demo_file), "def", "--max-tokens", "2"]
    for more, error in (
        (["--draft", str(small_files["swapped"])], "as token 3000"),
        (["--draft", "nowhere.myai"], "nowhere.myai"),
        (["--draft-tokens", "-1"], "draft_tokens is -1; expected 0 to 255"),
        (["--draft-tokens", "9999"], "draft_tokens is 9999"),
    ):
        assert cli.main([*run, *more]) == 1
        assert error in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main([*run, "--no-draft", "--draft", "x.myai"])
    assert ended.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_chat_says_what_drafting_did(large: Model, capsys: pytest.CaptureFixture[str]) -> None:
    from chalot.chat import Chat

    talk = Chat(large, None, {"seed": 1, "max_tokens": 60, "temperature": 0})
    talk.handle("Repeat: os os os os os os")
    talk.handle("/stats")
    stats, said = large.last_stats, capsys.readouterr().err
    assert ("drafted tokens kept" in said) == bool(stats.drafted)
    if stats.drafted:
        assert f"{stats.tokens_per_pass:.1f} tokens a pass" in said
