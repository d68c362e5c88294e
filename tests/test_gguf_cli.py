"""GGUF files as commands meet them: run, described, converted, whole or in parts; or refused."""

import json
import time
import tracemalloc
from pathlib import Path

import pytest

from attacks.gguf import CASES
from chalot import cli
from gguf_cases import bundled_model
from gguf_files import pack, write

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The bundled model as one file, and in three parts, the first without tensors."""
    metadata, tensors = bundled_model()
    folder = tmp_path_factory.mktemp("gguf")
    whole = write(folder / "whole.gguf", pack(metadata, tensors))
    parts = []
    for n, held in enumerate(([], tensors[:20], tensors[20:])):
        keys = {"split.no": n, "split.count": 3, "split.tensors.count": len(tensors)}
        name = f"demo-{n + 1:05}-of-00003.gguf"
        parts.append(write(folder / name, pack((metadata if n == 0 else {}) | keys, held)))
    return whole, parts


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is converted to be run lies here."""
    monkeypatch.setenv("CHALOT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command says on stdout."""
    assert cli.main([*map(str, words)]) == 0
    return capsys.readouterr().out


def test_any_part_is_the_whole_model(
    files: tuple[Path, list[Path]], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = files
    options = ("--max-tokens", 8, "--temperature", 0)
    said = answer(capsys, "run", whole, PROMPT, *options)
    assert said.strip()
    assert answer(capsys, "run", parts[1], PROMPT, *options) == said
    made = sorted(home.rglob("*.myai"))
    assert answer(capsys, "run", parts[1], PROMPT, *options) == said
    assert sorted(home.rglob("*.myai")) == made  # converted once


def test_parts_are_described_and_converted_as_one(
    files: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = files
    found = [json.loads(answer(capsys, "describe", "--json", p)) for p in (whole, *parts)]
    for of_part in found[1:]:
        for key in ("parameters", "architecture", "kinds", "bits_per_weight"):
            assert of_part[key] == found[0][key]
    out = tmp_path / "demo.myai"
    answer(capsys, "convert", parts[2], "-o", out, "--scheme", "int8", "--json")
    assert "Once" in answer(capsys, "run", out, "Once", "--max-tokens", 2, "--json")


@pytest.mark.parametrize("verb, every", [("describe", 1), ("convert", 6), ("run", 6)])
def test_hostile_files_are_a_line_on_stderr(
    verb: str, every: int, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quickly, in little memory, and nothing is left behind."""
    out = tmp_path / "out.myai"
    rest = {"convert": ["-o", str(out)], "run": ["Hello"], "describe": []}[verb]
    # without the magic number it is no GGUF file to a command
    known = {case: file for case, file in CASES.items() if file[0].startswith(b"GGUF")}
    for case, (content, message) in [*known.items()][::every]:
        path = write(tmp_path / "hostile.gguf", content)
        begin = time.process_time()
        tracemalloc.start()
        try:
            assert cli.main([verb, str(path), *rest]) == 1, case
            assert tracemalloc.get_traced_memory()[1] < 20_000_000, case
        finally:
            tracemalloc.stop()
        assert time.process_time() - begin < 1, case
        said, err = capsys.readouterr()
        assert said == "" and message in err and path.name in err, (case, err)
        assert err.startswith("chalot: ") and err.count("\n") == 1, (case, err)
    assert not out.exists() and not [p for p in home.rglob("*") if p.is_file()]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["hostile.gguf"]
