"""Damaged and hostile `.myai` files: refused with a typed error, quickly, in little memory."""

import hashlib
import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chalot
from chalot.errors import ChalotError, FormatError, SchemeError, UnsupportedError, WeightError
from chalot.formats.myai import HEADER, WHERE, MyaiFile
from chalot.model.config import from_hugging_face
from chalot.verify import verify
from myai_files import SMALL, edited, manifest_of, random_file, set_at, with_manifest

QUERY = ("tensors", "layers.0.query")
NORM = ("tensors", "final_norm")


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

HEADERS: dict[str, Callable[[bytearray], Any]] = {
    "magic": lambda h: struct.pack_into("<I", h, 0, 0x46554747),
    "version 0": lambda h: struct.pack_into("<I", h, 4, 0),
    "hidden": lambda h: struct.pack_into("<I", h, 8, 65),
    "reserved": lambda h: struct.pack_into("<I", h, 200, 1),
    "manifest at 0": lambda h: struct.pack_into("<Q", h, 64, 0),
    "manifest in the header": lambda h: struct.pack_into("<Q", h, 64, 128),
    "manifest at 2^63": lambda h: struct.pack_into("<Q", h, 64, 1 << 63),
    "manifest at 2^64 - 1": lambda h: struct.pack_into("<Q", h, 64, (1 << 64) - 1),
    "manifest of 0 bytes": lambda h: struct.pack_into("<Q", h, 72, 0),
    "manifest of 2^63 bytes": lambda h: struct.pack_into("<Q", h, 72, 1 << 63),
    "offset and length wrap": lambda h: struct.pack_into("<2Q", h, 64, (1 << 64) - 256, 512),
    "file of 2^63 bytes": lambda h: struct.pack_into("<Q", h, 80, 1 << 63),
    "checksum": lambda h: h.__setitem__(100, h[100] ^ 1),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_header(name: str, whole: bytes, tmp_path: Path) -> None:
    content = bytearray(whole)
    HEADERS[name](content)
    refuse(tmp_path / "x.myai", bytes(content))


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


# ---- the manifest as a text

DEEP = 200_000
TEXTS = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "not JSON": b"{",
    "two texts": b"{} {}",
    "not UTF-8": b'{"format": "\xff"}',
    "a lone surrogate": b'{"\\ud800": 1}',
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "values without end": b"[" + b"0," * 3_000_000 + b"0]",
    "an endless number": b'{"format": ' + b"9" * 1_000_000 + b"}",
    "an endless name": b'{"' + b"x" * 10_000_000 + b'": 1}',
    "NaN": b'{"format": NaN}',
    "Infinity": b'{"format": -Infinity}',
}


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_manifest_text(name: str, whole: bytes, tmp_path: Path) -> None:
    refuse(tmp_path / "x.myai", with_manifest(whole, TEXTS[name]), FormatError)


def test_duplicate_names(whole: bytes, tmp_path: Path) -> None:
    text = json.dumps(manifest_of(whole))
    entry = json.dumps(manifest_of(whole)["tensors"]["final_norm"])
    for twice in (
        text.replace('{"format": 3', '{"format": 3, "format": 3', 1),
        text.replace('"tensors": {', f'"tensors": {{"final_norm": {entry}, ', 1),
    ):
        assert "twice" in refuse(tmp_path / "x.myai", with_manifest(whole, twice.encode()))


# ---- the manifest's values

WRONG: dict[str, tuple[Any, ...]] = {
    "format 4": ("format", 4),
    "no source": ("source", ...),
    "unknown field": ("extra", 1),
    "tensors are a list": ("tensors", []),
    "a tensor is a number": (*QUERY, 7),
    "no scheme": (*QUERY, "scheme", ...),
    "scheme is null": (*QUERY, "scheme", None),
    "other scheme of other bytes": (*QUERY, "scheme", "int8"),
    "dense scheme": (*QUERY, "scheme", "f32"),
    "vector in bf16": (*NORM, "scheme", "bf16"),
    "vector in nl4": (*NORM, "scheme", "nl4"),
    "activation 7": (*QUERY, "activation", 7),
    "activation is a text": (*QUERY, "activation", "8"),
    "error is a text": (*QUERY, "error", "x"),
    "no dimensions": (*QUERY, "shape", []),
    "three dimensions": (*QUERY, "shape", [64, 1, 64]),
    "300,000 dimensions": (*QUERY, "shape", [1] * 300_000),
    "zero rows": (*QUERY, "shape", [0, 64]),
    "negative rows": (*QUERY, "shape", [-64, -64]),
    "2^63 rows": (*QUERY, "shape", [1 << 63, 64]),
    "product past 2^64": (*QUERY, "shape", [1 << 28, 1 << 28]),
    "rows are a fraction": (*QUERY, "shape", [64.5, 64]),
    "rows are true": (*QUERY, "shape", [True, 64]),
    "a dimension of 4,000 digits": (*QUERY, "shape", [10**4000, 64]),
    "other shape": (*QUERY, "shape", [65, 64]),
    "another shape of the same bytes": (*QUERY, "shape", [63, 64]),
    "vector of another length": (*NORM, "shape", [63]),
    "offset 0": (*QUERY, "extent", "offset", 0),
    "offset negative": (*QUERY, "extent", "offset", -64),
    "offset misaligned": (*QUERY, "extent", "offset", 257),
    "offset 2^63": (*QUERY, "extent", "offset", 1 << 63),
    "offset 2^64": (*QUERY, "extent", "offset", 1 << 64),
    "offset past the end": (*QUERY, "extent", "offset", 1 << 30),
    "offset a fraction": (*QUERY, "extent", "offset", 64.5),
    "offset a text": (*QUERY, "extent", "offset", "64"),
    "bytes 2^63": (*QUERY, "extent", "bytes", 1 << 63),
    "bytes negative": (*QUERY, "extent", "bytes", -1),
    "bytes one less": (*NORM, "extent", "bytes", 255),
    "checksum a number": (*QUERY, "extent", "sha256", 5),
    "tensor missing": (*QUERY, ...),
    "constant missing": ("constants", "rope.inverse_frequency", ...),
    "tables missing": ("constants", "tables.nl4", ...),
    "document past the end": ("documents", "tokenizer.json", {"offset": 1 << 40, "bytes": 9,
                                                              "sha256": ""}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_hostile_manifest(name: str, whole: bytes, tmp_path: Path) -> None:
    refuse(tmp_path / "x.myai", edited(whole, set_at(*WRONG[name])))


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


CONFIG: dict[str, tuple[str, Any]] = {
    "no layers": ("layers", 0),
    "one more layer": ("layers", 3),
    "2^24 layers": ("layers", 1 << 24),
    "2^63 layers": ("layers", 1 << 63),
    "hidden": ("hidden", 32),
    "no heads": ("heads", 0),
    "no key/value heads": ("kv_heads", 0),
    "heads that do not share": ("kv_heads", 3),
    "odd head size": ("head_dim", 15),
    "vast head size": ("head_dim", 1 << 20),
    "negative vocabulary": ("vocabulary", -1),
    "other vocabulary": ("vocabulary", 131),
    "context 0": ("context", 0),
    "context a text": ("context", "2048"),
    "theta a long text": ("rope_theta", "9" * 20_000_000),
    "theta a list": ("rope_theta", [1]),
    "theta too large": ("rope_theta", 10**400),
    "theta negative": ("rope_theta", -1.0),
    "theta missing": ("rope_theta", ...),
    "epsilon null": ("norm_epsilon", None),
    "epsilon 0": ("norm_epsilon", 0.0),
    "tied but with a head's sizes": ("hidden", 1 << 24),
    "biases that are not there": ("output_bias", True),
    "unknown activation": ("activation", "relu\n"),
    "unknown field": ("mystery", 1),
    "scaling without factors": ("rope_scaling", {"factor": 8.0}),
}


@pytest.mark.parametrize("name", CONFIG)
def test_hostile_configuration(name: str, whole: bytes, tmp_path: Path) -> None:
    refuse(tmp_path / "x.myai", edited(whole, set_at("config", *CONFIG[name])))


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
