"""Damaged and hostile `.myai` files: refused with a typed error, quickly, in little memory."""

import hashlib
import json
import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chalot
from chalot.errors import ChalotError, FormatError, SchemeError, UnsupportedError, WeightError
from chalot.formats.myai import MyaiFile
from chalot.formats.myai.manifest import HEADER, WHERE
from chalot.model.config import from_hugging_face
from chalot.verify import verify
from myai_files import SMALL, edited, manifest_of, random_file, set_at, with_manifest

QUERY = ("tensors", "layers.0.query")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of 2 layers in nl4."""
    path = tmp_path_factory.mktemp("myai") / "whole.myai"
    return random_file(path, from_hugging_face(SMALL), "nl4").read_bytes()


def refuse(path: Path, content: bytes, kind: type[ChalotError] = ChalotError) -> str:
    """Loading raises one clear line, in less than half a second of work and 150 MB."""
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(kind) as caught:
        chalot.load(path).close()
    assert time.process_time() - start < 0.5
    tracemalloc.start()
    try:
        with pytest.raises(kind):
            chalot.load(path).close()
        assert tracemalloc.get_traced_memory()[1] < 150_000_000
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700, text[:1000]
    return text


def test_whole_file_loads(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.myai").write_bytes(whole)
    with chalot.load(tmp_path / "x.myai") as model:
        assert np.isfinite(model.logits([1, 2, 3])).all()


# ---- any byte


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_truncated_anywhere_is_refused(whole: bytes, tmp: Path, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, len(whole) - 1))
    tmp.write_bytes(whole[:size])
    with pytest.raises(FormatError, match="found|expected"):
        MyaiFile(tmp)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_is_found_and_named(whole: bytes, tmp: Path, data: st.DataObject) -> None:
    # half of the examples in the small parts: header, fill and manifest
    small = [*range(HEADER), *range(WHERE.unpack_from(whole, 64)[0] - 200, len(whole))]
    at = data.draw(st.one_of(st.integers(0, len(whole) - 1), st.sampled_from(small)))
    flipped = bytearray(whole)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    tmp.write_bytes(flipped)
    extents = extents_of(whole)
    try:
        report = verify(tmp)
    except ChalotError:
        assert at < HEADER or at >= WHERE.unpack_from(whole, 64)[0]
    else:
        assert not report.ok
        inside = [n for n, e in extents.items() if 0 <= at - e["offset"] < e["bytes"]]
        if inside:
            assert inside[0] in report.damaged[0].name
            names = {d.name for d in report.damaged}
            assert names <= {repr(inside[0]), "configuration"}
        else:
            assert "fill" in report.damaged[0].what


def extents_of(content: bytes) -> dict[str, Any]:
    manifest = manifest_of(content)
    tensors = {name: t["extent"] for name, t in manifest["tensors"].items()}
    return {**tensors, **manifest["documents"], **manifest["constants"]}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all examples of a law."""
    return tmp_path_factory.mktemp("law") / "x.myai"


def test_more_bytes_are_refused(whole: bytes, tmp_path: Path) -> None:
    assert "expected" in refuse(tmp_path / "x.myai", whole + b"\0")


def test_fill_is_checked(whole: bytes, tmp_path: Path) -> None:
    ends = {e["offset"] + e["bytes"] for e in extents_of(whole).values()}
    at = next(end for end in sorted(ends) if end % 64)
    changed = bytearray(whole)
    changed[at] = 1
    path = tmp_path / "x.myai"
    path.write_bytes(changed)
    report = verify(path)
    assert not report.ok and "fill" in report.damaged[0].what


# ---- the header


@pytest.mark.parametrize("version", [2, 4, 2**32 - 1])
def test_other_versions_say_so(version: int, whole: bytes, tmp_path: Path) -> None:
    content = bytearray(whole)
    struct.pack_into("<I", content, 4, version)
    text = refuse(tmp_path / "x.myai", bytes(content), UnsupportedError)
    assert str(version) in text and "3" in text


@pytest.mark.parametrize("content", [b"", b"\0", b"GGUF" * 100, b"PK\3\4" + bytes(400), bytes(256)])
def test_other_files(content: bytes, tmp_path: Path) -> None:
    refuse(tmp_path / "x.myai", content, FormatError)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.myai")
    for path in (tmp_path, tmp_path / "nothing.myai", tmp_path / "pipe.myai", Path("/dev/zero")):
        with pytest.raises(FormatError, match="expected a .myai file"):
            MyaiFile(path)


def test_refusal_leaves_no_descriptor(whole: bytes, tmp_path: Path) -> None:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("needs /proc to count open files")
    (tmp_path / "x.myai").write_bytes(whole[:-1])
    before = len(list(folder.iterdir()))
    for _ in range(5):
        with pytest.raises(FormatError):
            MyaiFile(tmp_path / "x.myai")
    assert len(list(folder.iterdir())) == before


# ---- the manifest


def test_duplicate_names(whole: bytes, tmp_path: Path) -> None:
    text = json.dumps(manifest_of(whole))
    entry = json.dumps(manifest_of(whole)["tensors"]["final_norm"])
    for twice in (
        text.replace('{"format": 3', '{"format": 3, "format": 3', 1),
        text.replace('"tensors": {', f'"tensors": {{"final_norm": {entry}, ', 1),
    ):
        assert "twice" in refuse(tmp_path / "x.myai", with_manifest(whole, twice.encode()))


def test_unknown_scheme_is_a_scheme_error(whole: bytes, tmp_path: Path) -> None:
    content = edited(whole, set_at(*QUERY, "scheme", "nl9"))
    assert "nl9" in refuse(tmp_path / "x.myai", content, SchemeError)
    content = edited(whole, set_at(*QUERY, "scheme", "x\n" * 5000))
    refuse(tmp_path / "x.myai", content, SchemeError)


def test_extents_may_not_overlap_or_leave_holes(whole: bytes, tmp_path: Path) -> None:
    extents = extents_of(whole)
    for name in ("layers.0.key", "tables.nl4"):
        place = (
            ("constants", name) if name == "tables.nl4" else ("tensors", "layers.0.key", "extent")
        )
        content = edited(whole, set_at(*place, "offset", extents["embedding"]["offset"]))
        refuse(tmp_path / "x.myai", content, FormatError)
    assert "belong to nothing" in refuse(
        tmp_path / "x.myai", with_manifest(whole, manifest_of(whole), fill=64), FormatError
    )


# ---- numbers


@pytest.mark.parametrize("kind", ["row scale", "segment", "vector", "frequency"])
def test_numbers_that_are_not_finite_are_named(kind: str, whole: bytes, tmp_path: Path) -> None:
    name, size, number = {
        "row scale": ("layers.0.query", 4, b"\0\0\xc0\x7f"),
        "segment": ("layers.0.query", 64 * 4 + 2, b"\0\x7e"),
        "vector": ("final_norm", 4, b"\0\0\x80\xff"),
        "frequency": ("rope.inverse_frequency", 4, b"\0\0\x80\x7f"),
    }[kind]
    e = extents_of(whole)[name]
    end = e["offset"] + e["bytes"]
    changed = bytearray(whole)
    changed[end - size : end - size + len(number)] = number
    digest = hashlib.sha256(changed[e["offset"] : end]).hexdigest()

    def edit(manifest: Any) -> None:
        room = manifest["constants"] if "." in name and "layers" not in name else None
        (room[name] if room else manifest["tensors"][name]["extent"])["sha256"] = digest

    content = edited(bytes(changed), edit)
    assert name in refuse(tmp_path / "x.myai", content, WeightError)
    report = verify(tmp_path / "x.myai")
    assert not report.ok and "NaN or Inf" in report.damaged[0].what


def test_a_file_cut_while_in_use_is_noticed(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.myai"
    path.write_bytes(whole)
    with chalot.load(path) as model:
        os.truncate(path, len(whole) - 5000)
        with pytest.raises(FormatError, match="while in use"):
            model.logits([1])
