"""Files of our own replace their kind only, and verbs that write one ask first."""

from pathlib import Path

import numpy as np
import pytest

from chalot import cli
from chalot.errors import FormatError, OutputError
from chalot.formats import files
from chalot.formats.files import read_text, whole_file

OTHERS = {"weights": b"\x08\0\0\0\0\0\0\0{}", "text": b"words", "short": b"\x93"}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_files_of_another_kind_stay(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "there"
    path.write_bytes(content)
    with pytest.raises(OutputError, match="of another kind"), whole_file(path, b"\x93NUMPY"):
        pytest.fail("opened")
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_files_of_that_kind_and_empty_ones_are_replaced(tmp_path: Path) -> None:
    for content in (b"", b"\x93NUMPY", b"\x93NUMPY and more"):
        path = tmp_path / "there"
        path.write_bytes(content)
        with whole_file(path, b"\x93NUMPY") as file:
            file.write(b"\x93NUMPY new")
        assert path.read_bytes() == b"\x93NUMPY new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match="of another kind"), whole_file(tmp_path, b"{"):
        pytest.fail("opened")


def test_verbs_do_not_write_over_other_kinds(
    demo_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, x, corpus = (tmp_path / n for n in ("weights", "x.npy", "corpus.txt"))
    weights.write_bytes(OTHERS["weights"])
    np.save(x, np.zeros(256, np.float32))
    corpus.write_text("some words of a text, again and again\n" * 50)
    name = "model.layers.0.self_attn.q_proj.weight"
    for words in (
        ["tensor", demo_file, name, "--input", x, "-o", weights],
        ["tokenizer", "train", corpus, "--vocab", 280, "-o", weights],
    ):
        assert cli.main([str(word) for word in words]) == 1
        said = capsys.readouterr().err
        assert "of another kind" in said and str(weights) in said
    assert weights.read_bytes() == OTHERS["weights"]
    assert sorted(tmp_path.iterdir()) == sorted([weights, x, corpus])


def test_a_text_is_utf_8_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("é".encode() * 10)
    assert read_text(path) == "é" * 10
    monkeypatch.setattr(files, "LARGEST_TEXT", 19)
    for bad, said in ((path, "more than 19"), (Path("/dev/zero"), "more than 19")):
        with pytest.raises(FormatError, match=said):
            read_text(bad)
    path.write_bytes(b"ab\xff")
    with pytest.raises(FormatError, match=r"--text t: not UTF-8 at byte 2"):
        read_text(path, "--text t")
    for bad in (tmp_path, tmp_path / "nowhere", Path("a\0b"), Path("~no-such-user/x")):
        with pytest.raises(FormatError, match="cannot be read"):
            read_text(bad)
