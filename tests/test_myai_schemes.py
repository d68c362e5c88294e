"""Damaged and hostile `.myai` files of every coded scheme: refused, or the same bits everywhere."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chalot
from chalot.errors import ChalotError, FormatError, WeightError
from chalot.kernels.backend import instruction_sets
from chalot.model.config import from_hugging_face
from chalot.quant.packing import Layout
from chalot.quant.scheme import SCHEMES
from chalot.verify import verify
from myai_files import SMALL, edited, manifest_of, random_file, set_at

CODED = [name for name, scheme in SCHEMES.items() if scheme.is_coded]
LEVELS = [name for name in CODED if SCHEMES[name].has_levels]
ISAS = [name for name, runs in instruction_sets() if runs]
QUERY = ("tensors", "layers.0.query")
PARTS = {"segment": 1, "row scale": 2, "row offset": 3}  # of a layout
NUMBERS = {"NaN": np.nan, "Inf": np.inf, "-Inf": -np.inf}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small file of random codes of each scheme."""
    folder, config = tmp_path_factory.mktemp("schemes"), from_hugging_face(SMALL)
    return {s: random_file(folder / f"{s}.myai", config, s).read_bytes() for s in CODED}


def refuse(path: Path, content: bytes, kind: type[ChalotError]) -> str:
    """Loading raises one clear line. (test_myai.py measures its time and memory.)"""
    path.write_bytes(content)
    with pytest.raises(kind) as caught:
        chalot.load(path).close()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    return text


def changed(content: bytes, place: tuple[str, ...], at: int, new: bytes) -> bytes:
    """The file with other bytes in an extent, and the checksum that fits them."""
    extent: Any = manifest_of(content)
    for key in place:
        extent = extent[key]
    start, end = extent["offset"], extent["offset"] + extent["bytes"]
    out = bytearray(content)
    out[start + at : start + at + len(new)] = new
    digest = hashlib.sha256(out[start:end]).hexdigest()
    return edited(bytes(out), set_at(*place, "sha256", digest))


def test_every_kind_of_part_is_there() -> None:
    counts = {len(Layout(SCHEMES[s], 64, 64).parts) for s in CODED}
    assert counts == {3, 4}


@pytest.mark.parametrize("scheme", CODED)
def test_wrong_sizes_are_refused(scheme: str, files: dict[str, bytes], tmp_path: Path) -> None:
    whole, path = files[scheme], tmp_path / "x.myai"
    size = manifest_of(whole)["tensors"]["layers.0.query"]["extent"]["bytes"]
    for wrong in (0, size - 64, size - 1, size + 1, size + 64):
        refuse(path, edited(whole, set_at(*QUERY, "extent", "bytes", wrong)), FormatError)
    for shape in ([63, 64], [64, 63], [80, 64], [64, 192], [1 << 28, 1 << 28]):
        refuse(path, edited(whole, set_at(*QUERY, "shape", shape)), FormatError)


@pytest.mark.parametrize("scheme", CODED)
def test_another_scheme_of_other_bytes_is_refused(
    scheme: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    whole, sizes = files[scheme], {s: Layout(SCHEMES[s], 64, 64).nbytes for s in CODED}
    for other in CODED:
        if sizes[other] != sizes[scheme]:
            content = edited(whole, set_at(*QUERY, "scheme", other))
            text = refuse(tmp_path / "x.myai", content, FormatError)
            assert f"expected {sizes[other]} for {other}" in text


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("scheme", CODED)
def test_scales_that_are_not_finite_are_named(
    scheme: str, part: str, number: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    parts = Layout(SCHEMES[scheme], 64, 64).parts
    where = parts[PARTS[part]] if PARTS[part] < len(parts) else slice(0, 0)
    if where.start == where.stop:
        return  # this scheme has no such part
    new = np.array([NUMBERS[number]], "<f2" if part == "segment" else "<f4").tobytes()
    content = changed(files[scheme], (*QUERY, "extent"), where.stop - len(new), new)
    path = tmp_path / "x.myai"
    assert "layers.0.query" in refuse(path, content, WeightError)
    report = verify(path)
    assert not report.ok and "NaN or Inf" in report.damaged[0].what


@pytest.mark.parametrize("scheme", LEVELS)
def test_tables_that_are_missing_or_of_another_length(
    scheme: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    whole, name = files[scheme], f"tables.{scheme}"
    extent = manifest_of(whole)["constants"][name]

    def renamed(manifest: Any) -> None:
        manifest["constants"]["tables.nl9"] = manifest["constants"].pop(name)

    def shorter(manifest: Any) -> None:
        e = manifest["constants"][name]
        e["bytes"] -= 16
        start = e["offset"]
        e["sha256"] = hashlib.sha256(whole[start : start + e["bytes"]]).hexdigest()

    assert extent["bytes"] == 4096
    for edit in (renamed, shorter):
        assert name in refuse(tmp_path / "x.myai", edited(whole, edit), FormatError)


@pytest.mark.parametrize("fill", ["as they are", "00", "ff", "tables"])
@pytest.mark.parametrize("scheme", CODED)
def test_any_codes_and_levels_give_the_same_everywhere(
    scheme: str, fill: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: Any
) -> None:
    """Every byte is a code, every byte a level, -128 too; no table and no digit is outside."""
    content, panels = files[scheme], Layout(SCHEMES[scheme], 64, 64).parts[0]
    if fill == "tables":
        if scheme not in LEVELS:
            return
        table = np.random.default_rng(5).integers(-128, 128, 4096).astype(np.int8)
        table[:999] = -128
        content = changed(content, ("constants", f"tables.{scheme}"), 0, table.tobytes())
    elif fill != "as they are":
        run = bytes.fromhex(fill) * (panels.stop - panels.start)
        content = changed(content, (*QUERY, "extent"), 0, run)
    (tmp_path / "x.myai").write_bytes(content)
    found = set()
    for isa in ISAS:
        monkeypatch.setenv("CHALOT_ISA", isa)
        with chalot.load(tmp_path / "x.myai", threads=1) as model:
            found.add(model.logits([1, 2, 3, 129, 5]).tobytes())
            assert model.backend.name == isa
    assert len(found) == 1
