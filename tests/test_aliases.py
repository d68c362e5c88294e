"""Tensors that share one extent: written once, read by every name; any other overlap is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chalot
from chalot.describe import describe
from chalot.errors import FormatError
from chalot.formats.myai import MyaiFile
from chalot.formats.myai.source import MyaiSource
from chalot.formats.safetensors import SafetensorsFolder
from chalot.verify import verify
from myai_files import checkpoint, edited, manifest_of

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
PARTS = ("query", "up", "attention_norm")


def share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let folders say that the second layer's tensors are the first one's."""
    names = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    of = {f"model.layers.1.{n}.weight": f"model.layers.0.{n}.weight" for n in names}
    monkeypatch.setattr(SafetensorsFolder, "aliases", of, raising=False)
    read = SafetensorsFolder.float32

    def float32(self: Any, name: str, *rows: Any) -> Any:
        return read(self, of.get(name, name), *rows)

    monkeypatch.setattr(SafetensorsFolder, "float32", float32)


@pytest.fixture(params=["f32", "int8"])
def both(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """One model twice: each tensor on its own, and with shared extents."""
    source = checkpoint(tmp_path / "source")
    share(monkeypatch)
    chalot.convert(source, tmp_path / "shared.myai", request.param)
    monkeypatch.setattr(SafetensorsFolder, "aliases", {})
    chalot.convert(source, tmp_path / "own.myai", request.param)
    return tmp_path / "own.myai", tmp_path / "shared.myai"


def test_shared_weights_are_stored_once_and_compute_the_same(both: tuple[Path, Path]) -> None:
    own, shared = both
    with chalot.load(own) as a, chalot.load(shared) as b:
        np.testing.assert_array_equal(a.logits(IDS), b.logits(IDS))
    file = MyaiFile(shared)
    found = dict(file.aliases)
    file.close()
    # in codes, a layer whose columns are balanced otherwise is not the other one any more
    assert found.items() <= {f"layers.1.{n}": f"layers.0.{n}" for n in PARTS}.items()
    if len(found) == len(PARTS):
        assert shared.stat().st_size < own.stat().st_size - 2 * 64 * 64


def test_verify_reads_a_shared_extent_once(both: tuple[Path, Path]) -> None:
    own, shared = map(verify, both)
    assert own.ok and shared.ok
    file = MyaiFile(both[1])
    assert shared.extents == own.extents - len(file.aliases)
    entry = file.manifest.tensors["layers.1.query"].extent
    file.close()
    content = bytearray(both[1].read_bytes())
    content[entry.offset] ^= 1
    both[1].write_bytes(content)
    assert len(verify(both[1]).damaged) == 1


def test_a_shared_file_stays_shared_when_it_is_converted(tmp_path: Path, both: Any) -> None:
    again = tmp_path / "again.myai"
    chalot.convert(both[1], again, "f32")
    source = MyaiSource(both[1])
    file = MyaiFile(again)
    assert len(file.aliases) == len(source.aliases)
    file.close()
    source.close()


def offset_by(count: int) -> Callable[[Any], None]:
    def edit(manifest: Any) -> None:
        manifest["tensors"]["layers.1.query"]["extent"]["offset"] += count

    return edit


def shape(manifest: Any) -> None:
    manifest["tensors"]["layers.1.query"]["shape"] = [32, 128]


def shorter(manifest: Any) -> None:
    manifest["tensors"]["layers.1.query"]["extent"]["bytes"] -= 64


def checksum(manifest: Any) -> None:
    manifest["tensors"]["layers.1.query"]["extent"]["sha256"] = "0" * 64


def document(manifest: Any) -> None:
    manifest["documents"]["config.json"] = manifest["tensors"]["layers.1.query"]["extent"]


@pytest.mark.parametrize(
    "edit", [offset_by(64), offset_by(-64), shape, shorter, checksum, document]
)
def test_any_other_overlap_is_refused(
    edit: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "source")
    share(monkeypatch)
    path = tmp_path / "shared.myai"
    chalot.convert(source, path, "f32")
    content = path.read_bytes()
    tensors = manifest_of(content)["tensors"]
    assert tensors["layers.1.query"]["extent"] == tensors["layers.0.query"]["extent"]
    path.write_bytes(edited(content, edit))
    with pytest.raises(FormatError):
        MyaiFile(path)


def test_describe_counts_what_is_stored(both: tuple[Path, Path]) -> None:
    own, shared = map(describe, map(str, both))
    file = MyaiFile(both[1])
    saved = sum(file.manifest.tensors[n].extent.bytes for n in file.aliases)
    weights = sum(int(np.prod(file.manifest.tensors[n].shape)) for n in file.aliases)
    file.close()
    assert own.parameters == own.stored_parameters == shared.parameters
    assert shared.stored_parameters == own.parameters - weights
    assert shared.bytes == own.bytes - saved


def test_a_copy_keeps_what_an_alias_asks_of_its_inputs(tmp_path: Path, both: Any) -> None:
    def wide(manifest: Any) -> None:
        manifest["tensors"]["layers.1.query"]["activation"] = 16

    file = tmp_path / "wide.myai"
    file.write_bytes(edited(both[1].read_bytes(), wide))
    chalot.convert(
        file,
        tmp_path / "copy.myai",
        manifest_of(both[1].read_bytes())["tensors"]["embedding"]["scheme"],
    )
    copy, source = (manifest_of(p.read_bytes())["tensors"] for p in (tmp_path / "copy.myai", file))
    assert {n: e["activation"] for n, e in copy.items()} == {
        n: e["activation"] for n, e in source.items()
    }
    assert copy["layers.1.query"]["activation"] == 16
