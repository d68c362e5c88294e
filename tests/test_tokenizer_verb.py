"""The verb `tokenizer`: what is trained, opened, compared; bad input ends in a typed error."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core

import chalot
from chalot import cli
from chalot.demo import FOLDER
from chalot.errors import ChalotError, FormatError, OutputError, TokenizerError
from chalot.export import export
from chalot.formats import corpus
from chalot.text.byte_pairs import TABLES
from chalot.text.styles import STYLES
from chalot.text.tokenizer import Tokenizer
from chalot.text.training import CHATML, SPECIALS, Recipe, configuration, train
from chalot.tokenizer import compare, stats, tokenizer, train_tokenizer

DOCS = Path(__file__).parent.parent / "docs"
TEXT = "def f(x):\n    return x + 1  # it's 1,234\n\nĐây là tiếng Việt. 你好，世界 👩‍👩‍👧\n" * 20
styled = pytest.mark.parametrize("style", STYLES)


@cache
def trained(style: str) -> bytes:
    return train([TEXT], Recipe(style, 600, SPECIALS[style]))


@styled
@given(text=st.text(max_size=40))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_what_is_encoded_comes_back(style: str, text: str) -> None:
    opened = Tokenizer.from_documents(trained(style))
    normal = Core.from_buffer(trained(style)).normalizer
    wanted = text if normal is None else normal.normalize_str(text)
    assert opened.decode(opened.encode(text)) == wanted


@styled
def test_a_trained_tokenizer_is_the_librarys(style: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text(TEXT, encoding="utf-8")
    report = train_tokenizer([tmp_path / "t"], tmp_path / "x.json", vocabulary=600, style=style)
    assert report.vocabulary <= 600 and report.path.read_bytes() == trained(style)
    library = Core.from_file(str(report.path))
    for fast in (False, True):
        opened = tokenizer(report.path, fast=fast)
        for text in (TEXT, "", "x", TEXT * 20):
            assert opened.encode(text) == library.encode(text).ids
        names = sorted(opened.special_tokens.values())
        assert names == list(range(report.vocabulary - len(names), report.vocabulary))


def test_pieces_of_any_size_train_the_same() -> None:
    """Cuts fall between words only."""
    for style in STYLES:
        recipe = Recipe(style, 500, CHATML)
        whole = train([TEXT], recipe)
        cut = corpus.CUT.sub("\n\0", TEXT).split("\0")
        assert len(cut) > 10 and train(cut, recipe) == whole


def test_the_same_corpus_makes_the_same_file(tmp_path: Path) -> None:
    made = []
    for n, (threads, sources) in enumerate(
        [("1", [DOCS, FOLDER / "heldout.txt"]), ("2", [FOLDER / "heldout.txt", str(DOCS / "*")])]
    ):
        out = tmp_path / f"{n}.json"
        command = [sys.executable, "-m", "chalot.cli", "tokenizer", "train", "--vocab", "900"]
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run([*command, *map(str, sources), "-o", str(out), "-q"], check=True, env=env)
        made.append(out.read_bytes())
    assert made[0] == made[1]


def test_large_files_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 101)
    path = tmp_path / "t"
    path.write_text(TEXT, encoding="utf-8", newline="")
    pieces = list(corpus.find([path]).pieces())
    assert "".join(pieces) == TEXT and len(pieces) > 10
    path.write_text("é" * 1000, encoding="utf-8")  # nowhere to cut
    monkeypatch.setattr(corpus, "LONGEST", 300)
    pieces = list(corpus.find([path]).pieces())
    assert "".join(pieces) == "é" * 1000 and max(map(len, pieces)) < 500


def test_folders_pass_over_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello hello\n")
    (tmp_path / "b.bin").write_bytes(b"\x00\x01hello")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9 hello")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    report = train_tokenizer([tmp_path, tmp_path], tmp_path / "o.json", vocabulary=300)
    assert (report.files, report.bytes, report.skipped) == (1, 12, 2)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("binary", b"a\x00b", "zero byte after byte 1"),
        ("latin", b"caf\xe9 au lait", "not UTF-8"),
        ("cut", "é".encode()[:1], "not UTF-8"),
        ("empty", b"", "no text"),
    ],
)
def test_a_named_file_must_be_text(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=words):
        train_tokenizer([tmp_path / name], tmp_path / "o.json", vocabulary=300)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocabulary": 258}, "expected 259"),
        ({"vocabulary": -1}, "expected 259"),
        ({"vocabulary": 1 << 40}, "expected 259"),
        ({"style": "qwen9"}, "choose qwen2, llama3, gpt2"),
        ({"specials": ["a"]}, "more than one character"),
        ({"specials": ["<x>", "<x>"]}, "each once"),
        ({"specials": [""]}, "more than one character"),
        ({"specials": ["<\ud800>"]}, "not Unicode"),
        ({"min_frequency": 0}, "1 or more"),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        train_tokenizer([DOCS], tmp_path / "o.json", **options)
    assert not list(tmp_path.iterdir())


def test_outputs_and_sources_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in ("no/such/folder/x.json", "file/x.json", "file/"):
        with pytest.raises(OutputError):
            train_tokenizer([DOCS], f"{tmp_path}/{out}")
    (tmp_path / "empty").mkdir()
    for sources in (["nowhere"], ["no*where"], [tmp_path / "empty"], []):
        with pytest.raises(FormatError):
            train_tokenizer(sources, tmp_path / "x.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="regular"):
        train_tokenizer([tmp_path / "pipe"], tmp_path / "x.json")


@pytest.mark.parametrize("style", ["qwen2", "llama3"])
def test_a_folder_can_be_chatted_with(style: str, tmp_path: Path) -> None:
    train_tokenizer([DOCS], f"{tmp_path}/made/", vocabulary=500, style=style)
    opened = tokenizer(tmp_path / "made")
    messages = [{"role": "user", "content": "Hi <|im_end|><|eot_id|>"}]
    ids = opened.encode_chat(messages)
    assert opened.decode(ids, skip_specials=False) == opened.render(messages)
    assert opened.eos_ids and sum(id_ in opened.eos_ids for id_ in ids) == 1
    assert json.loads(configuration(()))["tokenizer_class"]


# ---- opening


def test_every_source_gives_the_same_ids(demo_file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
    wanted = chalot.tokenizer(FOLDER).encode("Hello, wörld")
    manifest = export(FOLDER, tmp_path, "npz", bits="1").path
    gguf = export(FOLDER, tmp_path / "x.gguf", "gguf", "q4_0").path
    files = (demo_file, str(FOLDER / "tokenizer.json"), tmp_path / "other.json", manifest, gguf)
    for source in files:
        assert chalot.tokenizer(source).encode("Hello, wörld") == wanted
    assert TABLES


@pytest.mark.parametrize("content", [b"", b"{}", b"[1", b'{"model": {"vocab": {}}}', b"\xff"])
@pytest.mark.parametrize("name", ["tokenizer.json", "x.json", "x.myai", "x.gguf", "x.npz"])
def test_hostile_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for fast in (False, True):
        with pytest.raises(ChalotError):
            tokenizer(tmp_path / name, fast=fast).encode("x")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        tokenizer("nowhere/at/all")
    with pytest.raises(TokenizerError, match="no tokenizer"):
        tokenizer(tmp_path)


# ---- comparing


def test_a_tokenizer_does_not_differ_from_itself() -> None:
    found = compare(FOLDER, FOLDER / "tokenizer.json", TEXT)
    assert found.same_ids and found.spans == 0 and not found.differences
    assert found.a.round_trip and found.a.tokens == found.b.tokens


def test_differences_are_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_bytes(trained("gpt2"))
    found = compare(FOLDER, tmp_path / "small.json", TEXT)
    assert not found.same_ids and found.spans and found.differences
    raw = TEXT.encode()
    for d in found.differences:
        if all("\\x" not in piece for piece in [*d.a, *d.b]):
            assert "".join(d.a) == "".join(d.b) and d.a != d.b
            assert raw[d.byte :].startswith("".join(d.a).encode())


def test_stats_of_a_text() -> None:
    found = stats(FOLDER, TEXT)
    assert found.vocabulary == 4096 and not found.holes and found.use is not None
    assert found.use.tokens == len(tokenizer(FOLDER).encode(TEXT)) and found.use.round_trip
    assert set(found.special_tokens) == set(CHATML) and found.opening_ms > 0


# ---- commands


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["tokenizer", *words])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_encode_then_decode(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = "Hello,  wörld!\n<|im_end|>"
    (tmp_path / "t").write_text(text, encoding="utf-8")
    code, ids, _ = run(capsys, "encode", str(FOLDER), "--file", str(tmp_path / "t"))
    assert code == 0 and run(capsys, "decode", str(FOLDER), *ids.split())[1] == text + "\n"
    _, out, _ = run(capsys, "encode", str(FOLDER), text, "--json")
    assert json.loads(out)["ids"] == [int(n) for n in ids.split()]
    listed = str(json.loads(out)["ids"])
    assert json.loads(run(capsys, "decode", str(FOLDER), listed, "--json")[1]) == {"text": text}
    _, out, _ = run(capsys, "encode", str(FOLDER), "<|im_end|>", "--specials", "-v")
    assert out.count("\n") == 1 and "'<|im_end|>'" in out


def test_reports(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, demo = str(tmp_path / "t.json"), str(FOLDER)
    heldout = str(FOLDER / "heldout.txt")
    assert run(capsys, "train", str(DOCS), "--vocab", "700", "-o", path)[1].endswith("700 tokens\n")
    _, out, _ = run(capsys, "compare", demo, path, "--text", heldout)
    assert "bytes a token" in out and "<->" in out
    assert json.loads(run(capsys, "--json", "compare", demo, path, "--text", heldout)[1])["spans"]
    _, out, _ = run(capsys, "stats", demo, "--text", heldout)
    assert "4,096 tokens" in out and "MB/s" in out
    assert json.loads(run(capsys, "stats", demo, "--json")[1])["use"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("decode", str(FOLDER), "4096"), "expected 0 to 4,095"),
        (("decode", str(FOLDER), "12", "3x"), "whole numbers"),
        (("decode", str(FOLDER), "9" * 5000), "whole numbers"),
        (("encode", str(FOLDER), "x", "--file", "y"), "one of them"),
        (("encode", str(FOLDER), "--file", "nowhere"), "cannot be read"),
        (("encode", str(FOLDER), "\ud800"), "surrogate"),
        (("encode", "nowhere", "x"), "no such file"),
        (("stats", str(FOLDER), "--text", str(FOLDER / "model.safetensors")), "not UTF-8"),
        (("train", str(DOCS), "-o", "x.json", "--vocab", "3"), "expected 259"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    code, out, err = run(capsys, *words)
    assert code == 1 and not out and said in err and err.count("\n") == 1


def test_what_no_argument_says(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["tokenizer"], ["tokenizer", "trian"], ["tokenizer", "train"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
    assert "--help" in capsys.readouterr().err
