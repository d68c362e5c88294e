"""A comparison: figures that are eval's, a page that needs nothing else, bad input that ends."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import chalot.compare as verb
from chalot import cli
from chalot.charts import Point, scatter, strips
from chalot.compare import Form, named
from chalot.compare.page import markdown, page, parted
from chalot.demo import FOLDER
from chalot.errors import OutputError
from chalot.evaluate import Quality
from chalot.evaluate.report import evaluate
from chalot.plan import plan
from checkpoints import Weights, write_checkpoint

EVIL = '<img src=x onerror="1">&'
PROMPTS = ["import os", f"{EVIL} if x < 1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source, a text, and the report of three forms: a file, a plan and a scheme."""
    folder = tmp_path_factory.mktemp("compare")
    paths = {n: folder / n for n in ("source", "out", "text.txt", "prompts.txt", "p <&>.json")}
    write_checkpoint(paths["source"])
    paths["text.txt"].write_text((FOLDER / "heldout.txt").read_text("utf-8")[:3000], "utf-8")
    paths["prompts.txt"].write_text("\n".join(PROMPTS), "utf-8")
    paths["report"] = paths["out"] / "report.html"
    paths["file"] = folder / f"{'a' * 20}'<b>.myai"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHALOT_HOME", str(folder / "home"))
        patch.setattr(verb, "ROUNDS", 2)
        patch.setattr(verb, "PREFILL", 16)
        patch.setattr(verb, "DECODED", 4)
        plan(paths["source"], paths["p <&>.json"], method="ewq")
        words = ["convert", paths["source"], "-o", paths["file"], "--scheme", "nl4", "-q"]
        assert cli.main([str(w) for w in words]) == 0
        assert cli.main([str(w) for w in command(paths)]) == 0
    return paths


def command(paths: dict[str, Path], **changes: object) -> list[object]:
    """The words of `chalot compare`; a change of None leaves an option out."""
    options = {
        "text": paths["text.txt"],
        "prompts": paths["prompts.txt"],
        "schemes": "int8",
        "tokens": 600,
        "max-tokens": 4,
        "out": paths["report"],
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    files = [paths["file"], paths["p <&>.json"]]
    given = [(f"--{name}", value) for name, value in options.items() if value is not None]
    return ["compare", paths["source"], *files, *(w for pair in given for w in pair), "-q"]


@pytest.fixture
def report(made: dict[str, Path]) -> dict:
    return json.loads((made["out"] / "report.json").read_text("utf-8"))


def test_the_report_has_what_eval_says(
    made: dict[str, Path], report: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHALOT_HOME", str(tmp_path))
    names = [f["name"] for f in report["forms"]]
    assert names == ["source", made["file"].stem, "p <&>", "int8"]
    alone = evaluate(made["file"], made["text.txt"], against=made["source"], tokens=600)
    form = report["forms"][1]
    assert form["quality"]["kl"] == alone.quality.kl and form["bytes"] == alone.bytes
    assert form["quality"]["perplexity"] == alone.quality.perplexity
    assert report["forms"][0]["quality"]["loss"] == alone.base.loss
    excess = alone.quality.loss - alone.base.loss
    assert form["quality"]["excess"] == pytest.approx(excess) != 0
    assert report["forms"][0]["file"] == str(made["source"])


def test_every_form_is_measured(made: dict[str, Path], report: dict) -> None:
    for n, form in enumerate(report["forms"]):
        assert len(form["prefill_tokens_per_second"]) == 2 and form["peak_bytes"] > 1e7
        assert all(speed > 0 for speed in form["decode_tokens_per_second"])
        assert [p["prompt"] for p in form["prompts"]] == PROMPTS
        assert all(p["new_tokens"] == 4 and p["tokens_per_second"] > 0 for p in form["prompts"])
        assert len(form["layers"]) == (3 if n else 0) and all(v >= 0 for v in form["layers"])
    sizes = {f["name"]: f["bits_per_weight"] for f in report["forms"]}
    assert sizes["source"] > 31 and sizes["int8"] < sizes["p <&>"] < 16
    kept = {p.name for p in made["out"].iterdir()}
    assert {"source-int8.myai", "source-p <&>.myai", "report.md", "report.html"} <= kept
    assert not [name for name in kept if "partial" in name]


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_needs_nothing_else(made: dict[str, Path]) -> None:
    text = made["report"].read_text("utf-8")
    found = Page(text)
    assert not {"script", "link", "iframe", "img", "object", "form", "b"} & {
        t for t, _ in found.tags
    }
    for _, attributes in found.tags:
        assert not {"src", "href", "action", "background"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    outside = set(re.findall(r"https?://[^\"'\s<]+", text)) - {"http://www.w3.org/2000/svg"}
    assert outside == set() and "@import" not in text and "url(" not in text
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        found.tags
    )


def test_names_and_prompts_are_only_text(made: dict[str, Path]) -> None:
    found = Page(made["report"].read_text("utf-8"))
    for name in (made["file"].stem, "p <&>", *PROMPTS):
        assert name in found.words
    assert "onerror" not in str(found.tags)


def test_numbers_are_text_that_can_be_selected(made: dict[str, Path], report: dict) -> None:
    found = Page(made["report"].read_text("utf-8"))
    assert "user-select" not in made["report"].read_text("utf-8")
    for form in report["forms"]:
        assert f"{form['bytes']:,}" in found.words
        assert f"{form['quality']['perplexity']:.3f}" in found.words
        for value in form["layers"]:
            assert f"{value:.3g}" in found.words


def test_markdown_is_a_table(made: dict[str, Path], report: dict) -> None:
    lines = (made["out"] / "report.md").read_text("utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(report["forms"]) and len({r.count("|") for r in rows}) == 1
    assert "600" not in rows and report["protocol"] in lines[-1]


def test_names_stay_in_their_cell() -> None:
    quality = Quality(9, 1.0, 0.1, 0.2, 0.01, 0.1, 0.5, 0.9, 0.1, 0.01)
    forms = (Form("source", "f", 1, 16.0, quality), Form("a|b\n<i>c", "f", 1, 4.0, quality))
    found = verb.Comparison("s", "t", 9, "p", "k", 1, "v", forms)
    rows = [line for line in markdown(found).splitlines() if line.startswith("|")]
    assert len(rows) == 4 and rows[-1].startswith("| a\\|b &lt;i&gt;c | 1 | 4.00 |")
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_errors_and_ranges_stand_below_their_number() -> None:
    assert parted("24.040 +- 1.070") == ("24.040", "\u00b1 1.070")
    assert parted("1,234 (1,100-1,300)") == ("1,234", "(1,100-1,300)")
    assert parted("512 MB") == ("512 MB", "") and parted("-") == ("-", "")


def test_no_two_forms_of_one_name() -> None:
    files = [Path("a/x.myai"), Path("b/x.myai"), Path("int8.myai"), Path("source.json")]
    found = named(files, ["int8"])
    assert list(found) == ["x", "x (2)", "int8 (2)", "source (2)", "int8"]
    assert list(found.values()) == [*files, None]


def test_a_form_that_would_replace_an_input_is_refused(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "convert", lambda *_, **__: pytest.fail("converted"))
    mine = tmp_path / "source-int8.myai"
    mine.write_bytes(made["file"].read_bytes())
    forms = named([mine], ["int8"])
    with pytest.raises(OutputError, match="is one of the models to compare.*--folder"):
        verb.make(made["source"], forms, tmp_path, 1, lambda *_: None)
    assert mine.read_bytes() == made["file"].read_bytes()


def test_two_plans_of_one_stem_are_two_files(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(verb, "convert", lambda _, out, **__: written.append(out))
    forms = named([tmp_path / "a" / "p.json", tmp_path / "b" / "p.json"], [])
    found = verb.make(made["source"], forms, tmp_path, 1, lambda *_: None)
    assert list(found) == ["p", "p (2)"] and written == list(found.values())
    assert len({path.name for path in written}) == 2


def test_pictures_of_strange_numbers() -> None:
    for points in ([], [Point("a", 1, 0)], [Point("a", 1, 1), Point("b" * 99, 1, 1, 0.1)]):
        assert "nan" not in scatter(points, "x", "y").lower()
    drawn = strips({EVIL: [0.0, float("nan"), 1e-300, 1.0]}, EVIL)
    assert drawn.count("<rect") == 4 and "<img" not in drawn


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": "nowhere.txt"}, "cannot be read"),
        ({"text": "EMPTY"}, "has 0 tokens"),
        ({"text": "TINY"}, "has 1 tokens"),
        ({"text": "BYTES"}, "not UTF-8"),
        ({"tokens": 0}, "--tokens 0"),
        ({"tokens": -3}, "--tokens -3"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"prompts": "nowhere.txt"}, "cannot be read"),
        ({"prompts": "EMPTY"}, "found 0 prompts"),
        ({"out": "report.pdf"}, "ends in .html"),
        ({"out": "TINY/report.html"}, "cannot be made"),
        ({"schemes": "nl4,nosuch"}, "nosuch"),
    ],
)
def test_bad_input_ends_in_one_line(
    made: dict[str, Path],
    tmp_path: Path,
    changes: dict[str, object],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHALOT_HOME", str(tmp_path / "home"))
    Path("EMPTY").write_text("")
    Path("TINY").write_text("a")
    Path("BYTES").write_bytes(b"\xff\xfe\x00")
    assert cli.main([str(w) for w in command(made, **{"out": "o/r.html", **changes})]) == 1
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert not list(tmp_path.glob("**/r.*")) and not list(tmp_path.glob("**/base-*"))


def test_what_is_no_form_of_the_source(
    made: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def other(weights: Weights) -> None:
        weights["embedding"][0, 0] = 9

    monkeypatch.setenv("CHALOT_HOME", str(tmp_path / "home"))
    deeper = write_checkpoint(tmp_path / "deeper", num_hidden_layers=2)
    changed = write_checkpoint(tmp_path / "changed", other)
    words = ["--text", made["text.txt"], "-o", tmp_path / "r.html", "-q"]
    for source, file, said in (
        (deeper, made["file"], "its layers is 3, the source's 2"),
        (changed, made["p <&>.json"], "the plan was made for"),
        (changed, tmp_path / "nowhere.myai", "nowhere.myai"),
        (changed, made["text.txt"], "text.txt"),
        (changed, None, "nothing to compare"),
    ):
        files = [] if file is None else [file]
        assert cli.main([str(w) for w in ("compare", source, *files, *words)]) == 1
        shown = capsys.readouterr().err
        assert said in shown and shown.count("\n") == 1
    assert not list(tmp_path.glob("r.*"))


def test_a_source_in_codes_has_no_layers_to_put_back(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHALOT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(verb, "ROUNDS", 1)
    monkeypatch.setattr(verb, "peak_memory", lambda *_: None)
    out = tmp_path / "r.html"
    words = ["--text", made["text.txt"], "--tokens", 100, "-o", out, "-q", "--schemes", "nl2"]
    assert cli.main([str(w) for w in ("compare", made["file"], *words)]) == 0
    assert "Where the loss is" not in out.read_text("utf-8")


def test_an_interrupted_run_leaves_no_page(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("CHALOT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(verb, "in_turn", stop)
    assert cli.main([str(w) for w in command(made, out=tmp_path / "r.html")]) == 130
    assert not list(tmp_path.glob("r.*")) and list((tmp_path / "home" / "eval").iterdir()) == []


def test_a_page_is_of_measured_forms() -> None:
    with pytest.raises(verb.FormatError, match="was not measured"):
        page(verb.Comparison("s", "t", 1, "p", "k", 1, "v", (Form("a", "f", 1, 1.0),)))
