"""npz: what is hostile is refused in one line that names the file, in little memory."""

import io
import json
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import chalot
from attacks.npz import (
    ARRAYS,
    CENTRAL,
    END,
    GOOD,
    MANIFEST,
    NPZ,
    changed,
    good,
    npy,
    pair,
    patched,
    read_all,
)
from chalot.errors import ChalotError
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.npy import LONGEST, header_bytes, parse_header, read_array


def refuse(path: Path, message: str, file: str, memory: int = 60_000_000) -> None:
    """Opening, and reading all of it, raises one clear line that names the file."""
    tracemalloc.start()
    try:
        with pytest.raises(ChalotError) as caught:
            read_all(path)
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert message in text and file in text and "\n" not in text and len(text) < 600


def test_the_good_pair_is_read(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        read_all(pair(tmp_path, arrays=good(method)))


def test_counts_are_not_believed(tmp_path: Path) -> None:
    """The listing of a zip file is what it is."""
    read_all(pair(tmp_path, arrays=patched(good(), END, 8, b"\xff\xff\xff\xff")))


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    content = good(r=npy(np.zeros(3, np.uint8))).replace(b"r.npy", b"q.npy")
    refuse(pair(tmp_path, arrays=content), "'q.npy' is there twice", NPZ)


def test_zip_bombs_cost_nothing(tmp_path: Path) -> None:
    """A member that unpacks to 300 MB, where 12 bytes are asked for; it is never unpacked."""
    members = {f"{n}.npy": npy(a) for n, a in ARRAYS.items()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content + bytes(300_000_000 if name == "q.npy" else 0))
    refuse(pair(tmp_path, arrays=out.getvalue()), "takes 140", NPZ, 8_000_000)


def test_a_weight_that_is_a_bomb_is_read_in_runs(tmp_path: Path) -> None:
    """2^22 x 32 weights of zero in 100 kB: any row of it takes little memory."""
    rows, out = 1 << 22, io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, kind, shape in (("q", "|u1", (rows, 16)), ("s", "|u1", (rows,))):
            with file.open(f"{name}.npy", "w") as member:
                member.write(header_bytes(kind, shape))
                for _ in range(0, np.prod(shape), 1 << 20):
                    member.write(bytes(1 << 20))
    path = pair(tmp_path, changed(shape=[rows, 32], q_zero_point="s"), out.getvalue())
    assert (tmp_path / NPZ).stat().st_size < 100_000
    tracemalloc.start()
    try:
        found = open_checkpoint(path)
        for first in (0, rows - 3, 12345):
            assert not found.float32("w", first, first + 3).any()
        found.close()
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_a_long_listing_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for i in range(2):
            file.writestr(f"{i}", b"")
    content = out.getvalue()
    at = content.index(CENTRAL)
    entries = content[at : content.index(END)] * 60_000
    end = struct.pack("<4s4H2IH", END, 0, 0, 0xFFFF, 0xFFFF, len(entries), at, 0)
    refuse(pair(tmp_path, arrays=content[:at] + entries + end), "has more than 4,194,304", NPZ)


def test_partners_that_are_missing_are_named(tmp_path: Path) -> None:
    pair(tmp_path)
    (tmp_path / NPZ).rename(tmp_path / "other.npz")
    refuse(tmp_path / MANIFEST, f"expected {NPZ!r} beside it", MANIFEST)
    refuse(tmp_path / "other.npz", "expected 'other.json' beside it", "other.npz")


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    pair(tmp_path / "elsewhere")
    pair(tmp_path / "model")
    (tmp_path / "model" / NPZ).unlink()
    (tmp_path / "model" / NPZ).symlink_to(tmp_path / "elsewhere" / NPZ)
    refuse(tmp_path / "model" / MANIFEST, "outside the checkpoint's folder", NPZ)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_files_cut_at_any_byte_are_refused(tmp_path: Path, method: int) -> None:
    content = good(method)
    for length in range(0, len(content), 7):
        with pytest.raises(ChalotError):
            read_all(pair(tmp_path, arrays=content[:length]))
    manifest = json.dumps(GOOD).encode()
    for length in range(0, len(manifest), 7):
        with pytest.raises(ChalotError):
            read_all(pair(tmp_path, manifest[:length]))


@given(st.binary(max_size=200), st.integers(0, 65535))
def test_no_header_is_more_than_an_error(text: bytes, length: int) -> None:
    for start in (text, b"\x93NUMPY\1\0" + length.to_bytes(2, "little") + text):
        try:
            parse_header(start[:LONGEST], "x.npy")
        except ChalotError as error:
            assert str(error).startswith("x.npy")


def test_headers_are_numpy_s_own() -> None:
    for shape in ((), (3,), (4, 5), (1, 2, 3)):
        array = np.zeros(shape, np.float32)
        assert npy(array)[: len(header_bytes("<f4", shape))] == header_bytes("<f4", shape)


def test_an_input_array_is_as_long_as_it_says(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(npy(np.zeros(9, np.float32))[:-1])
    for path in (tmp_path / "x.npy", tmp_path / "absent.npy", tmp_path):
        with pytest.raises(ChalotError, match=str(path)):
            read_array(path)


def test_conversion_of_what_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ChalotError):
        chalot.convert(pair(tmp_path), tmp_path / "out.myai")
    assert not (tmp_path / "out.myai").exists()
