"""describe: from headers alone, what a conversion then writes and a process then takes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot import cli, machine
from chalot.describe import describe
from chalot.describe.description import render
from chalot.describe.memory import cache_bytes
from chalot.errors import ChalotError, ContextError, FormatError, SchemeError, UnsupportedError
from chalot.formats import safetensors
from chalot.kernels.program import PAGE
from chalot.model.config import from_hugging_face
from hub_server import HubServer
from myai_files import SMALL, checkpoint, random_file

LARGE = {  # 113 MB in nl4, most of it in the layers
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4096,
    "vocab_size": 12_000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
TAKES = """
import sys
from pathlib import Path
import chalot
with chalot.load(sys.argv[1]) as model:
    session = model.session(seed=1)
    session.prefill([i * 7919 % model.config.vocabulary for i in range(int(sys.argv[2]))])
    session.step()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of bf16 weights, without a tokenizer."""
    return checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", "bf16")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    """The same, converted."""
    out = folder.parent / "small.myai"
    chalot.convert(folder, out)
    return out


# ---- what a model is


@pytest.mark.parametrize("scheme", ["nl4", "bf16", "attention=int8,ffn=nl4,embedding=f16"])
def test_a_folder_is_described_as_its_conversion(scheme: str, folder: Path, tmp_path: Path) -> None:
    before = describe(folder, scheme)
    report = chalot.convert(folder, tmp_path / "x.myai", scheme)
    after = describe(tmp_path / "x.myai")
    assert before.architecture == after.architecture
    assert before.parameters == after.parameters == report.weights
    assert before.bytes == after.bytes == sum(k.bytes for k in report.kinds)
    assert before.bits_per_weight == after.bits_per_weight == report.bits_per_weight
    for a, b in zip(before.tensors, after.tensors, strict=True):
        assert (a.name, a.kind, a.shape, a.scheme, a.bytes) == (
            b.name, b.kind, b.shape, b.scheme, b.bytes,
        )  # fmt: skip
    kinds = {k.kind: (k.tensors, k.bytes) for k in after.kinds}
    assert kinds == {k.kind: (k.tensors, k.bytes) for k in report.kinds}
    # planned with room for alignment and documents, so never too little
    assert 0 <= before.file_bytes - after.file_bytes + report.bytes - after.bytes < 40_000


def test_a_file_says_where_it_comes_from(file: Path) -> None:
    report = describe(file)
    o = report.origin
    assert (o.form, o.bytes, o.made_from) == (".myai", file.stat().st_size, "small")
    assert "chalot convert" in (o.command or "") and len(o.digest or "") == 64
    assert report.file_bytes == o.bytes and o.documents == ("config.json",)
    coded = [t for t in report.tensors if t.scheme == "nl4"]
    assert coded and all(t.activation in (8, 16) and 0 < (t.error or 0) < 0.02 for t in coded)


def test_a_hub_id_is_described_before_any_download(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    content = {p.name: p.read_bytes() for p in folder.iterdir()}
    with HubServer({"org/small": {**content, "tokenizer.json": b"x" * 5_000_000}}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        found = describe("org/small")
        assert sum(entry.sent for entry in hub.log) < 20_000
    here = describe(folder)
    assert found.origin.form == "hub" and found.tensors == here.tensors
    assert found.origin.download_bytes == sum(len(c) for c in content.values()) + 5_000_000
    assert found.memory(100).total == here.memory(100).total
    assert found.memory(100).tokenizer > 0 == here.memory(100).tokenizer
    assert "download" in render(found)


def test_unused_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    source = safetensors.SafetensorsFolder(folder)
    tensors = [(n, "bf16", i.shape, source.raw(n)) for n, i in source.tensors.items()]
    tensors.append(("rotary.inv_freq", "f32", (8,), np.ones(8, np.float32)))
    safetensors.write(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    source.close()
    report = describe(tmp_path)
    assert report.origin.unused == ("rotary.inv_freq",) and "rotary.inv_freq" in render(report)


def test_text_and_json(file: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (file, folder):
        text = render(describe(source))
        for word in ("qwen2", "2,048 tokens", "attention", "bits each", "fits here", "kernels"):
            assert word in text, word
        assert "layers.1.down" not in text and "layers.1.down" in render(describe(source), True)
        assert cli.main(["describe", str(source), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["architecture"]["hidden"] == 64
        assert [m["context"] for m in report["memory_at"]] == [0, 1000, 2048]
    assert [m.context for m in describe(file, context=300).memory_at] == [0, 300, 1000, 2048]


# ---- refusals


def test_refusals(file: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="converted already"):
        describe(file, "int8")
    with pytest.raises(SchemeError, match="nl5"):
        describe(folder, "nl5")
    for context in (-1, 2049):
        with pytest.raises(ContextError, match="2048"):
            describe(file).memory(context)
    for path in (tmp_path / "nothing", "no such thing", "/dev/null"):
        with pytest.raises(FormatError, match="expected"):
            describe(path)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"hidden_size": 128}, FormatError),
        ({"num_hidden_layers": 3}, FormatError),
        ({"num_hidden_layers": 1 << 24}, FormatError),
        ({"model_type": "mamba"}, UnsupportedError),
    ],
)
def test_contradictions(changes: dict[str, object], kind: type[ChalotError], folder: Path,
                        tmp_path: Path) -> None:  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **changes}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(kind, match="config.json"):
        describe(tmp_path)


# ---- memory


def test_cache_is_what_the_pages_take() -> None:
    config = from_hugging_face(SMALL)
    position = 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, numbers, bytes
    assert cache_bytes(config, 0, "f16") == 0
    assert cache_bytes(config, PAGE, "f16") == PAGE * position
    assert cache_bytes(config, PAGE, "f32") == PAGE * position * 2
    assert cache_bytes(config, PAGE + 1, "f16") == PAGE * position + 8 * 4096


def test_memory_grows_with_context(file: Path) -> None:
    report = describe(file)
    totals = [report.memory(n).total for n in (0, 1, 256, 257, 1000, 2048)]
    assert totals == sorted(totals)
    assert report.memory(2048, "f32").cache == 2 * report.memory(2048, "f16").cache
    assert dataclasses.replace(report, memory_available=1 << 20).fits(1000) is False
    assert dataclasses.replace(report, memory_available=1 << 40).fits(2048) is True
    assert dataclasses.replace(report, memory_available=None).fits(0) is None


@pytest.mark.skipif(not machine.resident_bytes(), reason="needs /proc to measure a process")
@pytest.mark.parametrize("context", [1, 300])
def test_memory_is_what_a_process_takes(context: int, large: Path) -> None:
    said = describe(large).memory(context)
    done = subprocess.run(
        [sys.executable, "-c", TAKES, str(large), str(context)],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    measured = int(done.stdout)
    parts = dataclasses.asdict(said)
    assert abs(said.total / measured - 1) < 0.05, f"measured {measured:,}, predicted {parts}"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random codes, large beside the interpreter."""
    path = tmp_path_factory.mktemp("large") / "x.myai"
    random_file(path, from_hugging_face(LARGE), "nl4")
    assert path.stat().st_size > 100_000_000
    return path
