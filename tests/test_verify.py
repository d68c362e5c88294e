"""verify: a whole file is whole; damage is named, counted and told on one line each."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from chalot import cli
from chalot.errors import FormatError
from chalot.formats.myai import MyaiFile
from chalot.model.config import from_hugging_face
from chalot.quant.scheme import SCHEMES
from chalot.verify import render, verify
from myai_files import SMALL, edited, random_file, set_at


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return random_file(tmp_path / "x.myai", from_hugging_face(SMALL), "bf16")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_whole_file_is_whole(scheme: str, tmp_path: Path) -> None:
    path = random_file(tmp_path / "x.myai", from_hugging_face(SMALL), scheme)
    report = verify(path)
    assert report.ok and not report.damaged and report.bytes == path.stat().st_size
    assert "all as written" in render(report)


def test_a_converted_file_is_whole(demo_files: dict[str, Path]) -> None:
    assert all(verify(path).ok for path in demo_files.values())


def test_progress_counts_every_byte(path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    verify(path, lambda *what: seen.append(what))
    done = [d for _, d, _ in seen]
    assert done == sorted(done) and done[-1] == seen[-1][2] and len({n for n, _, _ in seen}) > 20


def test_each_damaged_extent_is_named(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = MyaiFile(path)
    extents = dict(file.extents())
    file.close()
    content = bytearray(path.read_bytes())
    for name in ("layers.0.gate", "tables.nl4"):
        content[extents[name].offset + 7] ^= 0x10
    path.write_bytes(content)
    report = verify(path)
    assert [d.name for d in report.damaged] == ["'layers.0.gate'", "'tables.nl4'"]
    assert all("checksum" in d.what for d in report.damaged)
    assert render(report).count("\n") == 2 and "download" in render(report)
    assert cli.main(["verify", str(path)]) == 1
    assert "layers.0.gate" in capsys.readouterr().out


@pytest.mark.parametrize("scheme", ["f32", "bf16", "f16"])
def test_dense_weights_must_be_finite(scheme: str, tmp_path: Path) -> None:
    path = random_file(tmp_path / "x.myai", from_hugging_face(SMALL), scheme)
    file = MyaiFile(path)
    extent = file.manifest.tensors["layers.1.up"].extent
    file.close()
    content = bytearray(path.read_bytes())
    width = 4 if scheme == "f32" else 2
    content[extent.offset + width * 5 : extent.offset + width * 6] = b"\xff" * width  # NaN in all
    whole = bytes(content[extent.offset : extent.offset + extent.bytes])
    place = ("tensors", "layers.1.up", "extent", "sha256", hashlib.sha256(whole).hexdigest())
    path.write_bytes(edited(bytes(content), set_at(*place)))
    report = verify(path)
    assert [(d.name, d.what) for d in report.damaged] == [
        ("'layers.1.up'", "has weights that are NaN or Inf")
    ]


def test_a_contradiction_is_reported(path: Path) -> None:
    content = edited(path.read_bytes(), set_at("tensors", "layers.1.up", ...))
    path.write_bytes(content)
    with pytest.raises(FormatError, match="belong to nothing"):
        verify(path)


def test_what_cannot_be_opened_raises(tmp_path: Path) -> None:
    (tmp_path / "x.myai").write_bytes(b"nothing of the sort" * 50)
    for path in (tmp_path / "x.myai", tmp_path / "y.myai", tmp_path):
        with pytest.raises(FormatError, match=str(path)):
            verify(path)


def test_memory_stays_small(tmp_path: Path) -> None:
    """A tensor of 40 MB is read in pieces."""
    import tracemalloc

    config = from_hugging_face({**SMALL, "vocab_size": 160_000, "num_hidden_layers": 1})
    path = random_file(tmp_path / "x.myai", config, "bf16")
    tracemalloc.start()
    try:
        assert verify(path).ok
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()
    assert np.prod([160_000, 64]) * 2 > 16 << 20
