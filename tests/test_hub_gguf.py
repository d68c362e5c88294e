"""GGUF files of the hub, whole or in parts: described by ranges, fetched, converted and run."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from chalot import cli, shelf, sources
from chalot.convert import batch
from chalot.demo import FOLDER
from chalot.describe import describe
from chalot.errors import FormatError, HubNotFoundError, HubOfflineError
from chalot.export import export
from chalot.formats import hub
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.hub import gguf as hub_gguf
from chalot.tokenizer import tokenizer
from hub_server import HubServer
from test_gguf import split

ONE = "org/small-GGUF/small-Q8_0.gguf"
PARTS = "org/small-GGUF/f32/m-00001-of-00003.gguf"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository of GGUF files only: the bundled model, and a tiny one in three parts."""
    folder = tmp_path_factory.mktemp("gguf")
    made = export(FOLDER, folder / "small-Q8_0.gguf", "gguf", "q8_0").path
    parts = {f"f32/{path.name}": path.read_bytes() for path in split(folder)}
    return {"README.md": b"", "small-Q8_0.gguf": Path(made).read_bytes(), **parts}


@pytest.fixture
def server(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubServer]:
    from huggingface_hub import constants

    with HubServer({"org/small-GGUF": files}) as server:
        server.large.update(name for name in files if name.endswith(".gguf"))
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setenv("CHALOT_HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.mark.parametrize(
    "text, expected",
    [
        (ONE, ("org/small-GGUF", "small-Q8_0.gguf")),
        (PARTS, ("org/small-GGUF", "f32/m-00001-of-00003.gguf")),
        ("org/name", None),
        ("org/name.gguf", None),
        ("org/name/x.bin", None),
        ("/org/name/x.gguf", None),
        ("org/name/../x.gguf", None),
        ("org/name/.hidden.gguf", None),
        ("org//x.gguf", None),
        ("a/b/c/d/e/f/g.gguf", None),
    ],
)
def test_names_of_files(text: str, expected: tuple[str, str] | None) -> None:
    assert hub_gguf.split(text) == expected and hub.is_name(text) == (
        expected is not None or text == "org/name"
    )


def test_a_folder_that_exists_is_no_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert hub_gguf.split("org/name/x.gguf") is None
    with pytest.raises(FormatError, match="no such file or folder"):
        sources.resolve("org/name/x.gguf")


def test_what_is_fetched_is_the_file_and_its_parts(server: HubServer) -> None:
    path = sources.resolve(ONE)
    assert path.read_bytes() == server.repositories["org/small-GGUF"]["small-Q8_0.gguf"]
    assert not server.requests("README.md") and not server.requests("of-00003.gguf")
    checkpoint = open_checkpoint(sources.resolve(PARTS.replace("00001-of", "00002-of")))
    assert len(checkpoint.tensors) == 20
    checkpoint.close()
    assert hub.kept(PARTS) == sources.resolve(PARTS) and len(server.requests("-of-00003.gguf")) == 6


def test_headers_transfer_no_weight(server: HubServer) -> None:
    """Tensors, configuration and tokenizer by ranges; as from the file itself."""
    for name in (ONE, PARTS):
        server.log.clear()
        remote = hub.headers(name)
        assert all(entry.range for entry in server.requests(".gguf"))
        checkpoint = open_checkpoint(hub.fetch(name))
        assert dict(checkpoint.tensors) == dict(remote.tensors)
        assert checkpoint.document("config.json") == remote.document("config.json")
        checkpoint.close()
    text = "def f(x): return x"
    assert tokenizer(ONE).encode(text) == tokenizer(FOLDER).encode(text)


def test_a_file_is_described_converted_and_run(
    server: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = describe(ONE)
    assert found.origin.document_bytes > 100_000
    assert found.fit is not None and found.fit.download_bytes == found.origin.download_bytes
    assert cli.main(["run", ONE, "def f", "--max-tokens", "3", "--temperature", "0", "-q"]) == 0
    ran = capsys.readouterr().out
    assert describe(ONE).fit.download_bytes == 0  # type: ignore[union-attr]
    assert cli.main(["convert", ONE, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == "small-Q8_0-keep.myai"
    assert "int8" in {kind["scheme"] for kind in report["kinds"]}
    assert cli.main(["run", report["path"], "def f", "--max-tokens", "3", "--temperature", "0",
                     "-q"]) == 0  # fmt: skip
    assert capsys.readouterr().out == ran
    assert batch.name_of(PARTS) == "m"
    from huggingface_hub import constants

    sources.resolve(PARTS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sources.resolve(ONE).exists()
    shown = {d.id: d for d in shelf.models().downloaded}
    assert list(shown) == [PARTS, ONE]
    held = server.repositories["org/small-GGUF"]
    assert shown[PARTS].bytes == sum(len(held[n]) for n in held if n.startswith("f32/"))
    assert batch.sources([], True) == [PARTS, ONE]
    Path(shown[PARTS].path).with_name("m-00002-of-00003.gguf").unlink()
    assert [d.id for d in shelf.models().downloaded] == [ONE]


def test_repositories_of_gguf_files_say_which(server: HubServer) -> None:
    for ask in (hub.headers, hub.fetch):
        with pytest.raises(
            FormatError, match=rf"no \*\.safetensors; name one of.* {ONE} \(0.01 GB"
        ):
            ask("org/small-GGUF")
        with pytest.raises(HubNotFoundError, match=rf"no file x.gguf; its GGUF files: {PARTS} "):
            ask("org/small-GGUF/x.gguf")
    del server.repositories["org/small-GGUF"]["f32/m-00003-of-00003.gguf"]
    with pytest.raises(HubNotFoundError, match="no file f32/m-00003-of-00003.gguf"):
        hub.fetch(PARTS)


def test_damaged_headers_are_named_as_they_were_asked_for(server: HubServer) -> None:
    held = server.repositories["org/small-GGUF"]
    for content in (b"GGUF", b"GGML" + bytes(100), b"GGUF\3\0\0\0" + bytes(range(200))):
        held["bad.gguf"] = content
        with pytest.raises(FormatError, match="^org/small-GGUF/bad.gguf: "):
            hub.headers("org/small-GGUF/bad.gguf")


def test_without_a_network_it_says_so(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubOfflineError, match="no such file or folder here; asked the hub"):
        sources.resolve(ONE)
