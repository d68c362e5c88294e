"""Models by name: short names, several in one call, what is kept, and taking it off."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from chalot import cli, library, shelf, sources
from chalot.convert import batch
from chalot.demo import FOLDER
from chalot.describe import describe
from chalot.errors import ChalotError, FormatError, HubOfflineError, OutputError, TokenizerError
from chalot.formats import hub
from chalot.formats.myai import MyaiFile
from chalot.short_names import BITS, NAMES, near
from chalot.tokenizer import tokenizer
from hub_server import HubServer
from myai_files import checkpoint


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty CHALOT_HOME, an empty cache of the hub, and no network; in an empty folder."""
    from huggingface_hub import constants

    monkeypatch.setenv("CHALOT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture
def tinyllama(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that has a model under TinyLlama's id."""
    from huggingface_hub import constants

    folder = checkpoint(tmp_path / "source", "bf16")
    content = {p.name: p.read_bytes() for p in folder.iterdir()}
    with HubServer({NAMES["tinyllama"].id: content}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "*")
        yield server


# ---- names


def test_short_names_are_hub_ids_and_well_formed() -> None:
    assert len({known.id for known in NAMES.values()}) == len(NAMES)
    for name, known in NAMES.items():
        assert hub.is_hub_id(known.id) and name == name.lower() and "/" not in name
        assert sources.hub_id(name) == known.id == sources.hub_id(known.id)
    for family in ("tinyllama", "mistral-7b", "gemma-2b-it", "qwen2.5-0.5b-instruct", "bitnet-2b"):
        assert family in NAMES
    assert sources.hub_id("TinyLlama") == NAMES["tinyllama"].id


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("tinylama", "tinyllama"), ("qwen2.5-0.5", "qwen2.5-0.5b"), ("Lama2-7b", "llama2-7b")],
)
def test_a_slip_in_a_short_name_is_seen(typed: str, meant: str, home: Path) -> None:
    assert near(typed)[0] == meant
    with pytest.raises(FormatError, match=f"did you mean {meant}"):
        sources.resolve(typed)


def test_what_is_no_name_gets_no_guess(home: Path) -> None:
    for source in ("zzz", "./tinylama", "folder/tinylama.myai"):
        with pytest.raises(FormatError) as caught:
            sources.resolve(source)
        assert "did you mean" not in str(caught.value)


def test_a_local_folder_wins(home: Path) -> None:
    checkpoint(Path("tinyllama"), "bf16")
    assert sources.hub_id("tinyllama") is None and sources.resolve("tinyllama").samefile(
        "tinyllama"
    )
    with pytest.raises(HubOfflineError, match="no such file or folder here"):
        sources.resolve("gemma-2b")


@pytest.mark.parametrize(
    "source",
    [
        "",
        "/",
        ".",
        "..",
        "~",
        "~nobody/x",
        "~no-such-user/x",
        "a\0b",
        "x" * 5000,
        "\ud800",
        "/dev/null",
        "a/b/c",
        "-",
    ],
)
def test_strange_sources_are_refused(source: str, home: Path) -> None:
    with pytest.raises((ChalotError, OSError)):  # the system's own: a name too long
        library.converted(source)


# ---- kept once


def test_a_short_name_is_fetched_and_converted_once(tinyllama: HubServer) -> None:
    said: list[str] = []
    first = library.converted("tinyllama", say=said.append)
    assert len(said) == 1 and "once" in said[0]
    asked = len(tinyllama.log)
    again = library.converted(NAMES["tinyllama"].id, say=said.append)
    assert again == first and len(said) == 1 and len(tinyllama.log) == asked
    file = MyaiFile(first)
    assert file.manifest.source.name == NAMES["tinyllama"].id
    file.close()


def test_a_downloaded_model_is_described_without_the_hub(
    tinyllama: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    online = describe("tinyllama")
    folder = sources.resolve("tinyllama")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = describe("tinyllama")
    assert found.source == str(folder) and found.tensors == online.tensors
    with pytest.raises(HubOfflineError):
        describe("gemma-2b")


def test_the_tokenizer_of_a_short_name_needs_no_weights(
    tinyllama: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    held = tinyllama.repositories[NAMES["tinyllama"].id]
    with pytest.raises(TokenizerError, match="no tokenizer"):
        tokenizer("tinyllama")
    held["tokenizer.json"] = (FOLDER / "tokenizer.json").read_bytes()
    assert tokenizer("tinyllama").vocabulary_size == 4096
    assert not tinyllama.requests("main/model.safetensors") and not hub.kept(NAMES["tinyllama"].id)
    sources.resolve("tinyllama")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert tokenizer(NAMES["tinyllama"].id).vocabulary_size == 4096
    with pytest.raises(FormatError, match="did you mean tinyllama"):
        tokenizer("tinylama")


def test_nothing_is_announced_that_cannot_begin(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said: list[str] = []
    with pytest.raises(FormatError, match="holds no"):
        library.converted(tmp_path / "empty", say=said.append)
    assert said == [] and not list(library.folder().glob("*"))


def test_a_changed_source_is_converted_again(home: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "bf16")
    kept, said = library.converted(folder), []
    library.converted(folder, say=said.append)
    assert said == []
    late = kept.stat().st_mtime + 100
    os.utime(folder / "model.safetensors", (late, late))
    assert library.converted(folder, say=said.append) == kept and len(said) == 1


def test_an_older_file_moved_in_is_a_changed_source(home: Path, tmp_path: Path) -> None:
    """It keeps its date; only the time of its change says that it is new here."""
    folder, other = (checkpoint(tmp_path / n, "bf16") for n in ("m", "other"))
    old = other / "model.safetensors"
    os.utime(old, (1e9, 1e9))
    kept, said = library.converted(folder), []
    os.utime(kept, (kept.stat().st_mtime - 1,) * 2)  # clocks of file systems are coarse
    inside = max(p.stat().st_ctime for p in (folder, *folder.iterdir()))
    os.utime(kept, (inside, inside))
    library.converted(folder, say=said.append)
    assert said == []
    old.replace(folder / "model.safetensors")
    os.utime(folder, (1e9, 1e9))
    assert max(p.stat().st_mtime for p in (folder, *folder.iterdir())) <= kept.stat().st_mtime
    assert library.converted(folder, say=said.append) == kept and len(said) == 1


def test_ready_files_are_taken_as_they_are(home: Path, demo_file: Path, tmp_path: Path) -> None:
    assert library.converted(demo_file) == demo_file
    other = tmp_path / "named.bin"
    other.write_bytes(demo_file.read_bytes())
    assert library.converted(other) == other
    old = tmp_path / "old.myai"
    old.write_bytes(b"IAYM\2\0\0\0" + bytes(248))
    assert not library.is_ready(old)
    (tmp_path / "page.myai").write_text("<html>")
    assert library.is_ready(tmp_path / "page.myai")


# ---- models, rm


def test_models_and_rm(tinyllama: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    kept = library.converted("tinyllama")
    assert cli.main(["models", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {n["name"] for n in report["names"]} == set(NAMES)
    (found,) = report["converted"]
    assert (found["name"], found["scheme"], found["bytes"], found["source"]) == (
        kept.stem, "nl4", kept.stat().st_size, NAMES["tinyllama"].id,
    )  # fmt: skip
    assert [d["name"] for d in report["downloaded"]] == ["tinyllama"]
    assert cli.main(["models"]) == 0
    assert kept.stem in capsys.readouterr().out
    assert cli.main(["rm", "tinyllama", "--dry-run"]) == 0
    assert f"{kept.stat().st_size:,} bytes would be removed" in capsys.readouterr().out
    assert cli.main(["rm", "tinyllama", kept.name, kept.stem]) == 0
    assert not kept.exists() and capsys.readouterr().out.count("removed") == 1
    assert cli.main(["rm", "tinyllama"]) == 1
    assert "no converted model" in capsys.readouterr().err


def test_rm_takes_nothing_from_elsewhere(home: Path, tmp_path: Path) -> None:
    library.folder().mkdir(parents=True)
    outside = tmp_path / "outside.myai"
    outside.write_bytes(b"x")
    inside = library.folder() / "inside.myai"
    inside.symlink_to(outside)
    (library.folder() / "notes.txt").write_text("mine")
    for name in ("../../outside", str(outside), "../../outside.myai", "notes.txt", "*", "", "."):
        with pytest.raises(ChalotError):
            shelf.remove([name])
    with pytest.raises(ChalotError):  # and nothing goes when one of several is not there
        shelf.remove(["inside", "nothing"])
    assert inside.is_symlink()
    shelf.remove(["inside"])
    assert (
        outside.exists() and not inside.is_symlink() and (library.folder() / "notes.txt").exists()
    )


def test_a_damaged_file_is_listed_and_can_be_removed(home: Path) -> None:
    library.folder().mkdir(parents=True)
    (library.folder() / "junk.myai").write_bytes(b"IAYM" + b"\xff" * 300)
    (kept,) = shelf.kept()
    assert kept.scheme == "" and "cannot be read" in kept.source
    shelf.remove(["junk"])
    assert shelf.kept() == []


# ---- several at once


def test_bits_name_schemes(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(BITS.values()) == ["int8", "int6", "nl4", "nl3", "nl2", "ternary", "sign"]
    folder = checkpoint(tmp_path / "model", "bf16")
    for bits, out in (("4", "model-nl4.myai"), ("8", "model-int8.myai")):
        assert cli.main(["convert", str(folder), "--bits", bits, "-q"]) == 0
        assert Path(out).is_file() and capsys.readouterr().out.startswith(out)


def test_all_goes_on_past_what_fails(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "deep/b", "deep/c"):
        checkpoint(tmp_path / "many" / name, "bf16")
    (tmp_path / "many" / "deep" / "c" / "model.safetensors").write_bytes(b"broken")
    (tmp_path / "many" / "notes").mkdir()
    options = ["convert", "--all", str(tmp_path / "many"), "--output-dir", "out", "--json"]
    assert cli.main(options) == 1
    done = capsys.readouterr()
    report = json.loads(done.out)
    assert sorted(p.name for p in Path("out").iterdir()) == ["a-nl4.myai", "b-nl4.myai"]
    assert len(report["reports"]) == 2 and report["failed"][0]["source"].endswith("deep/c")
    assert "2 of 3 converted" in done.err


def test_all_without_a_folder_is_what_was_downloaded(
    tinyllama: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FormatError, match="nothing was downloaded"):
        batch.sources([], True)
    sources.resolve("tinyllama")
    assert batch.sources([], True) == [NAMES["tinyllama"].id]
    assert cli.main(["convert", "--all", "-q"]) == 0
    assert Path("TinyLlama-1.1B-Chat-v1.0-nl4.myai").is_file()


def test_names_of_outputs(home: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--Name-1B" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "x-00001-of-00002.gguf").write_bytes(b"GGUF")
    for source, kind, expected in (
        ("tinyllama", "nl4", "tinyllama-nl4.myai"),
        ("org/Name", "int8", "Name-int8.myai"),
        (str(snapshot), "nl4", "Name-1B-nl4.myai"),
        (str(tmp_path / "x-00001-of-00002.gguf"), "nl4", "x-nl4.myai"),
        ("org/Name", "ffn=nl4,attention=int8", "Name-ffn-nl4-attention-int8.myai"),
    ):
        assert batch.place(source, kind, "myai", Path("d")) == Path("d") / expected


def test_two_sources_of_one_name_are_refused(home: Path, tmp_path: Path) -> None:
    a, b = (checkpoint(tmp_path / x / "model", "bf16") for x in "ab")
    with pytest.raises(OutputError, match="both be written as model"):
        batch.sources([str(a), str(b)], False)
    with pytest.raises(FormatError, match="holds no checkpoint"):
        batch.sources(
            [
                str(
                    tmp_path / "a" / "model" / "..",
                ),
                str(home.parent / "here"),
            ],
            True,
        )


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert"],
        ["convert", "a", "b", "-o", "x.myai"],
        ["convert", "a", "-o", "x", "--output-dir", "d"],
        ["convert", "a", "--bits", "4", "--scheme", "nl4"],
        ["convert", "a", "--bits", "5"],
        ["convert", "a", "--fit", "--to", "gguf"],
        ["convert", "a", "--fit", "--bits", "4"],
        ["rm"],
    ],
)
def test_wrong_usage(arguments: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert f"Try: chalot {arguments[0]} --help" in capsys.readouterr().err
