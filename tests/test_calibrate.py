"""What a model's first layers know: measured, chosen, kept beside it, refused if another's."""

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import chalot
from chalot import calibrated, cli
from chalot.calibrate import CalibrateReport, calibrate, picture, render
from chalot.calibrate.choose import best_draft, best_exits, left
from chalot.calibrate.clock import LENGTHS, Costs
from chalot.calibrate.depths import Head, Looked, look
from chalot.calibrate.probe import auroc, supervise
from chalot.calibrated import Calibration, Drafting, Supervisor, beside, is_simple
from chalot.errors import ContextError, FormatError, OutputError, UnsupportedError
from chalot.kernels.backend import open_backend
from chalot.load import Model
from chalot.model.transformer import build
from chalot.quant import codes
from chalot.quant.packing import numbers, take_rows, unpack
from chalot.quant.scheme import SCHEMES
from myai_files import checkpoint, random_file
from tiny import bell, config, matrix

HELD_OUT = Path(chalot.__file__).parent / "demo" / "model" / "heldout.txt"
TOKENS = 1024


@pytest.fixture(scope="module")
def report(demo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrateReport:
    """The bundled model, calibrated on little text."""
    path = tmp_path_factory.mktemp("calibrated") / "x.myai"
    shutil.copy(demo_file, path)
    return calibrate(path, HELD_OUT, tokens=TOKENS)


def forced(report: CalibrateReport, target: Path, **draft: object) -> Path:
    """A copy of the model whose calibration has drafting on, as given."""
    shutil.copy(report.model, target)
    with Model(target, draft=False, calibration=False) as model:
        both = calibrated.read(Path(report.path), model.config, model.file.digest)
    assert both is not None
    found, head = both
    on = msgspec.structs.replace(found.draft, on=True, **draft)
    with calibrated.new_calibration(beside(target)) as write:
        write(msgspec.structs.replace(found, draft=on), head)
    return target


# ---- measured


def test_a_depth_says_what_a_model_of_so_few_layers_says(demo_file: Path) -> None:
    with Model(demo_file, draft=False) as model:
        ids = model.tokenizer.encode(HELD_OUT.read_text()[:3000])[:300]
        windows = [ids[:256], ids[256:]]
        looked = look(model.maker, windows, {}, [2], lambda *_: None)
        for layers in (1, 4, 6):
            few = msgspec.structs.replace(model.config, layers=layers)
            made = build(few, model.maker.weights, model.maker.inverse_frequency, "int8")
            with Model(demo_file, draft=False) as other:
                other.engine.runnable = other.backend.compile(made)
                want = [other.logits(w).argmax(axis=1) for w in windows]
            at = looked.final if layers == 6 else looked.tops[model.config.vocabulary][layers - 1]
            assert np.array_equal(at, np.concatenate(want)), layers
        assert looked.states[2].shape == (300, model.config.hidden)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "bf16"])
def test_rows_of_a_matrix_have_their_own_codes(scheme: str) -> None:
    rng = np.random.Generator(np.random.Philox(3))
    whole = matrix(bell(rng, (70, 96), 0.5), scheme)
    rows = np.array([0, 1, 15, 16, 33, 69])
    few = take_rows(whole, rows)
    if not whole.scheme.is_coded:
        assert np.array_equal(numbers(few), numbers(whole)[rows])
        return
    both = [
        codes.dequantize(unpack(m.data, m.scheme, m.shape), m.tables)[: m.shape[0]]
        for m in (few, whole)
    ]
    assert np.array_equal(both[0], both[1][rows])
    backend = open_backend()
    x = bell(rng, (3, 96), 1.0)
    assert np.array_equal(backend.product(few, x, 1), backend.product(whole, x, 1)[:, rows])


def test_a_report_has_every_depth_and_its_reasons(report: CalibrateReport) -> None:
    found = report.found
    assert [d.layers for d in found.depths] == [1, 2, 3, 4, 5]
    assert found.depths[0].agreement < found.depths[-1].agreement < 1
    assert all(d.short_agreement <= 1 for d in found.depths)
    assert found.tokens == TOKENS
    assert found.draft.on == (found.draft.gain >= 1.05)
    assert {e.layers for e in found.exits} <= {2, 4}, "at borders of regions only"
    assert found.supervisor is None, "too few prompts"
    text, svg = render(report), picture(found)
    assert "drafting" in text
    assert "supervisor" in text
    assert svg.startswith("<svg")
    assert f"{100 * found.depths[2].agreement:.4g}" in svg


# ---- chosen


def looked(agree: np.ndarray, vocabulary: int = 100) -> Looked:
    """A text where the depths (depth, tokens) agree or not; the short head of 10 as the whole."""
    tokens = agree.shape[1]
    final = np.arange(tokens, dtype=np.int32) % 7
    tops = np.where(agree, final, 99).astype(np.int32)
    leads = np.where(agree, 3.0, 1.0).astype(np.float32)
    states = {2: np.zeros((tokens, 4), np.float32)}
    both = {vocabulary: tops, 10: tops}
    return Looked([tokens // 2, tokens - tokens // 2], final, both, {10: leads}, final, states)


COSTS = Costs({n: 1.0 + 0.05 * (n - 1) for n in LENGTHS}, {100: 0.4, 10: 0.02}, 0.1)
HEAD = Head(matrix(np.ones((10, 32), np.float32), "int8"), np.arange(10, dtype=np.int32))


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 60))
def test_runs_are_counted_within_windows(same: list[bool], border: int) -> None:
    border = min(border, len(same))
    text = looked(np.zeros((1, len(same)), bool))
    text.windows = [border, len(same) - border]
    found = text.runs(np.array(same))
    for i, run in enumerate(found):
        end = border if i < border else len(same)
        assert all(same[i : i + run])
        assert i + run == end or not same[i + run]


def test_drafting_is_on_where_it_pays() -> None:
    agree = np.zeros((5, 400), bool)
    draft, _ = best_draft(looked(agree), COSTS)
    assert not draft.on
    assert draft.gain < 1
    agree[1] = True  # two layers know it all
    agree[2:] = True
    draft, size = best_draft(looked(agree), COSTS)
    assert (draft.on, draft.layers, draft.short, size) == (True, 2, True, 10)
    tokens = 1 + np.minimum(np.r_[200:0:-1, 200:0:-1], draft.tokens).mean()
    assert draft.gain == pytest.approx(
        tokens / (draft.tokens * 0.22 + 1 + 0.05 * draft.tokens), rel=1e-6
    )


def test_exits_agree_where_they_are_calibrated() -> None:
    agree = np.zeros((5, 400), bool)
    agree[1, :100] = agree[3, :300] = True
    text = looked(agree)
    found = best_exits(text, COSTS, (2, 4), HEAD, 6)
    gone = left(text, tuple(e.layers for e in found), HEAD, found[0].margin)
    for e in found:
        assert e.leave == pytest.approx(gone[e.layers].mean())
        assert e.agree >= 0.99
    assert found[0].saves > 0


def test_leads_add_up_while_the_best_token_stays() -> None:
    text = looked(np.ones((5, 10), bool))
    assert not left(text, (2,), HEAD, 3.5)[2].any()
    assert left(text, (2, 4), HEAD, 3.5)[4].all()


# ---- supervised


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_auroc_is_the_chance_of_the_right_order(pairs: list[tuple[int, bool]]) -> None:
    yes = [s for s, t in pairs if t]
    no = [s for s, t in pairs if not t]
    found = auroc([s for s, _ in pairs], np.array([t for _, t in pairs]))
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in yes for b in no]
    assert found == pytest.approx(sum(wins) / len(wins) if wins else 0.5)


def test_a_supervisor_is_on_only_where_it_wins() -> None:
    rng = np.random.Generator(np.random.Philox(1))
    windows = [256] * 24
    states = rng.standard_normal((sum(windows), 8)).astype(np.float32)
    noise = supervise(states, rng.random(len(states)) < 0.5, windows)
    assert noise is not None
    assert not noise.on
    hidden = np.repeat(rng.standard_normal(len(states) // 24 + 1), 24)[: len(states)]
    ahead = np.roll(hidden, -1)  # of the token that ends a prompt: what follows it
    states[:, 3] = ahead
    told = supervise(states, hidden > 0, windows)
    assert told is not None
    assert told.auroc > 0.8
    assert told.on
    assert supervise(states[:512], hidden[:512] > 0, [256, 256]) is None


def test_a_prompt_is_judged_by_an_exact_sum() -> None:
    blank = Supervisor(0.9, 0.5, 0.5, 0.01, 50, True, (1.0, 1e-30, -1.0), 0.0)
    assert is_simple(blank, np.array([1e8, 1.0, 1e8], np.float32))
    assert not is_simple(blank, np.array([1e8, -1.0, 1e8], np.float32))


# ---- drafted


@pytest.mark.parametrize(("layers", "tokens", "short"), [(1, 3, True), (5, 4, False), (5, 1, True)])
def test_drafts_by_first_layers_change_no_text(
    layers: int, tokens: int, short: bool, report: CalibrateReport, tmp_path: Path
) -> None:
    path = forced(report, tmp_path / "x.myai", layers=layers, tokens=tokens, short=short)
    options = ({"temperature": 0}, {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.1})
    with chalot.load(path, draft=False) as plain, chalot.load(path) as drafting:
        assert plain.shallow is None
        assert drafting.shallow is not None
        for sampling in options:
            for prompt in ("Once upon a time", "def main(): "):
                want = plain.generate(prompt, max_tokens=24, **sampling)
                assert drafting.generate(prompt, max_tokens=24, **sampling) == want


def test_deep_drafts_are_kept(report: CalibrateReport, tmp_path: Path) -> None:
    path = forced(report, tmp_path / "x.myai", layers=5, tokens=4, short=False, kept=0.99)
    with chalot.load(path) as model:
        assert model.shallow is not None
        drafter = model.drafters.make(True, 16).drafters[1]  # type: ignore[union-attr]
        drafter.pace.length = lambda most: min(most, 4)
        with model.session(temperature=0) as session:
            session.drafter = drafter
            session.prefill(model.tokenizer.encode(HELD_OUT.read_text()[:600]))
            for _ in range(40):
                session.step()
            assert session.stats.drafted > session.stats.accepted > 5
            assert session.stats.passes < 40


# ---- kept, and refused


def test_a_calibration_is_read_as_it_was_written(report: CalibrateReport) -> None:
    with Model(report.model, draft=False) as model:
        both = calibrated.read(Path(report.path), model.config, model.file.digest)
    assert both is not None
    assert both[0] == report.found
    assert both[1].shape[0] == len(report.found.short.tokens)


def test_a_calibration_of_another_file_is_refused(
    report: CalibrateReport, demo_files: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.myai"
    shutil.copy(demo_files["int8"], other)
    shutil.copy(report.path, beside(other))
    with pytest.raises(FormatError, match="was made for another file"):
        Model(other, early_exit=3.0)
    with pytest.warns(RuntimeWarning, match="not used: .* was made for another file"):
        model = Model(other)
    assert model.shallow is None
    model.close()


def damaged(raw: bytes) -> dict[str, bytes]:
    """What may have become of a calibration."""
    return {
        "is no calibration": b"\0" * len(raw),
        "version 9": raw[:8] + b"\x09" + raw[9:],
        "is no calibration;": raw[:63],
        "wrong checksum": raw[:-1],
        "damaged": raw[:200] + bytes([raw[200] ^ 1]) + raw[201:],
        r"damaged \(": raw[:12] + b"\xff\xff\xff\x7f" + raw[16:],
    }


def test_a_damaged_calibration_is_refused(report: CalibrateReport, tmp_path: Path) -> None:
    raw, path = Path(report.path).read_bytes(), tmp_path / "y"
    with Model(report.model, draft=False) as model:
        for said, content in damaged(raw).items():
            path.write_bytes(content)
            with pytest.raises(FormatError, match=said):
                calibrated.read(path, model.config, model.file.digest)
        assert calibrated.read(tmp_path / "none", model.config, model.file.digest) is None
        with pytest.raises(FormatError, match="is no calibration"):
            calibrated.read(tmp_path, model.config, model.file.digest)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"draft": Drafting(9, 2, True, 0.5, 2.0, True)}, "drafts of 2 tokens by 9 layers of 6"),
        ({"draft": Drafting(2, 99, True, 0.5, 2.0, True)}, "drafts of 99 tokens"),
        ({"draft": Drafting(2, 2, True, 7.0, 2.0, True)}, "of which 7.0 are kept"),
        ({"exits": "twice"}, "exits behind layers"),
        ({"exits": "steep"}, "margins of exits"),
        ({"supervisor": Supervisor(0.9, 0.5, 0.5, 0.1, 9, True, (1.0,), 0.0)}, "of 1 numbers"),
        ({"short": "unsorted"}, "tokens of the short head"),
        ({"short": "beyond"}, "tokens of the short head"),
        ({"short": "fewer"}, "a short head of"),
        ({"short": "scheme"}, "short head of scheme"),
        ({"short": "planes"}, "without activations in codes"),
    ],
)
def test_a_calibration_that_contradicts_its_model_is_refused(
    change: dict[str, object], said: str, report: CalibrateReport, tmp_path: Path
) -> None:
    change = dict(change)
    found = report.found
    with Model(report.model, draft=False) as model:
        both = calibrated.read(Path(report.path), model.config, model.file.digest)
        assert both is not None
        short, exits = found.short, found.exits
        tokens = short.tokens
        of_short = {
            "unsorted": {"tokens": (tokens[1], tokens[0], *tokens[2:])},
            "beyond": {"tokens": (*tokens[:-1], 4096)},
            "fewer": {"tokens": tokens[:-32]},
            "scheme": {"scheme": "nl9"},
            "planes": {"planes": 0},
        }
        if isinstance(change.get("short"), str):
            change["short"] = msgspec.structs.replace(short, **of_short[str(change["short"])])
        if change.get("exits") == "twice":
            change["exits"] = exits * 2
        if change.get("exits") == "steep":
            change["exits"] = (msgspec.structs.replace(exits[0], margin=1e9),)
        with calibrated.new_calibration(tmp_path / "x") as write:
            write(msgspec.structs.replace(found, **change), both[1])
        with pytest.raises(FormatError, match=said):
            calibrated.read(tmp_path / "x", model.config, model.file.digest)


def test_a_text_too_short_is_refused_and_leaves_nothing(demo_file: Path, tmp_path: Path) -> None:
    path, text = tmp_path / "x.myai", tmp_path / "short.txt"
    shutil.copy(demo_file, path)
    text.write_text("Too short. " * 20)
    with pytest.raises(ContextError, match="expected 512 or more"):
        calibrate(path, text)
    with pytest.raises(ContextError, match="--tokens of 256 or more"):
        calibrate(path, HELD_OUT, tokens=10)
    with pytest.raises(ContextError, match="of which 0 are looked at"):
        calibrate(path, HELD_OUT, tokens=-1)
    with pytest.raises(FormatError, match="cannot be read"):
        calibrate(path, tmp_path / "no.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["short.txt", "x.myai"]


def test_a_model_of_one_layer_has_nothing_shallower(tmp_path: Path) -> None:
    path = random_file(tmp_path / "x.myai", config(layers=1), "nl4")
    with pytest.raises(UnsupportedError, match="one layer"):
        calibrate(path, HELD_OUT)


def test_a_place_that_holds_something_else_is_not_overwritten(
    demo_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.myai"
    shutil.copy(demo_file, path)
    beside(path).write_text("mine")
    with pytest.raises(OutputError):
        calibrate(path, HELD_OUT, tokens=256)
    assert beside(path).read_text() == "mine"


def test_the_command_says_what_it_found(
    demo_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, svg = tmp_path / "x.myai", tmp_path / "x.svg"
    shutil.copy(demo_file, path)
    command = ["calibrate", str(path), "--text", str(HELD_OUT), "--tokens", "256"]
    assert cli.main([*command, "--json", "--plot", str(svg)]) == 0
    found = json.loads(capsys.readouterr().out)["found"]
    assert len(found["depths"]) == 5
    assert svg.read_text().startswith("<svg")
    assert cli.main([*command, "--plot", str(tmp_path / "x.png")]) == 1
    assert "is no .svg file" in capsys.readouterr().err
    assert cli.main(["run", str(path), "Once", "--max-tokens", "2", "-q"]) == 0
    raw = beside(path).read_bytes()
    beside(path).write_bytes(raw[:-5])
    assert cli.main(["run", str(path), "Once", "--max-tokens", "2", "--early-exit", "3"]) == 1
    assert "damaged (wrong checksum); make it again" in capsys.readouterr().err


def test_checkpoints_have_no_calibration(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        calibrate(checkpoint(tmp_path / "source"), HELD_OUT)


def test_calibrations_are_structs_without_other_fields(report: CalibrateReport) -> None:
    raw = msgspec.to_builtins(report.found)
    assert msgspec.convert(raw, Calibration) == report.found
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(raw | {"more": 1}, Calibration)
