"""safetensors: what is written is read back, whole or by rows, in little memory."""

import contextlib
import gc
import itertools
import json
import os
import resource
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from chalot.errors import FormatError, OutputError, UnsupportedError, WeightError
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.floats import bf16_to_float32, float32_to_bf16
from chalot.formats.safetensors import PIECE, SafetensorsFolder, write
from safetensors_files import entry, folder_with, pack, two_shards, with_index

STORED = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}


@pytest.fixture
def opened():
    """A function that opens a folder, and closes it when the test is over."""
    with contextlib.ExitStack() as stack:
        yield lambda folder: stack.enter_context(SafetensorsFolder(folder))


# ---- floats --------------------------------------------------------------------------------------


def test_every_bf16_survives_widening_and_narrowing():
    bits = np.arange(1 << 16, dtype=np.uint16)
    again = float32_to_bf16(bf16_to_float32(bits))
    quiet = np.isnan(bf16_to_float32(bits)) & (bits & 0x40 == 0)
    assert np.array_equal(again, np.where(quiet, bits | 0x40, bits))


@given(st.floats(width=32, allow_nan=False))
def test_narrowing_takes_the_nearest_bf16_and_the_even_one_of_two(value):
    got = int(float32_to_bf16(np.float32([value]))[0])
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    below, half = bits >> 16, (bits & 0xFFFF) - 0x8000
    assert got == below + (half > 0 or (half == 0 and below & 1))


def test_narrowing_keeps_nan_and_shape():
    wide = np.array([[np.nan, -np.inf, 3.4028235e38]], np.float32)
    got = bf16_to_float32(float32_to_bf16(wide))
    assert got.shape == (1, 3) and np.isnan(got[0, 0]) and got[0, 1] == -np.inf
    assert got[0, 2] == np.inf


# ---- round trip ----------------------------------------------------------------------------------


@st.composite
def stored_tensors(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=9), max_size=4, unique=True))
    names = [name for name in names if name != "__metadata__" and name.isprintable()]
    tensors = []
    for name in names:
        dtype = draw(st.sampled_from(sorted(STORED)))
        shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, max_side=7))
        bits = np.uint32 if dtype == "f32" else np.uint16
        values = draw(arrays.arrays(bits, shape)).view(STORED[dtype])
        tensors.append((name, dtype, shape, values))
    return tensors


@given(stored_tensors())
@settings(max_examples=60, deadline=None)
def test_reading_undoes_writing(tmp_path_factory, tensors):
    folder = tmp_path_factory.mktemp("written")
    write(folder / "model.safetensors", tensors)
    with SafetensorsFolder(folder) as read:
        assert set(read.tensors) == {name for name, *_ in tensors}
        for name, dtype, shape, values in tensors:
            info = read.tensors[name]
            assert (info.dtype, info.shape, info.nbytes) == (dtype, shape, values.nbytes)
            raw = read.raw(name)
            assert raw.tobytes() == values.tobytes()
            assert raw.flags.aligned and not raw.flags.writeable
            wide = bf16_to_float32(values) if dtype == "bf16" else values.astype(np.float32)
            got = read.float32(name)
            assert got.dtype == np.float32 and np.array_equal(got, wide, equal_nan=True)
            rows = shape[0] if shape else 0
            for first, last in itertools.combinations(range(rows + 1), 2):
                part = read.float32(name, first, last)
                assert np.array_equal(part, wide[first:last], equal_nan=True)


def test_pieces_join_and_only_the_rows_asked_for_are_read(tmp_path, monkeypatch):
    rows = np.arange(3 * PIECE // 4, dtype=np.float32).reshape(3, -1)  # a row is one piece and more
    rows = np.concatenate([rows, rows[:, :1001]], axis=1)
    write(tmp_path / "model.safetensors", [("w", "f32", rows.shape, rows)])
    with SafetensorsFolder(tmp_path) as read:
        asked = []
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, n, at: asked.append(n) or pread(fd, n, at))
        assert np.array_equal(read.float32("w", 1, 3), rows[1:3])
        assert sum(asked) == rows[1:3].nbytes
        with pytest.raises(IndexError):
            read.float32("w", 2, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to measure a process")
def test_float32_leaves_nothing_resident_but_its_result(tmp_path, opened):
    """A whole 64 MB tensor read in parts of 1 MB: the process grows by less than 16 MB."""
    rows = np.zeros((64, 1 << 18), np.float32)
    write(tmp_path / "model.safetensors", [("w", "f32", rows.shape, rows)])
    code = (
        "import sys; from pathlib import Path\n"
        "from chalot.formats.safetensors import SafetensorsFolder\n"
        "def peak():\n"
        "    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "read = SafetensorsFolder(Path(sys.argv[1]))\n"
        "before = peak()\n"
        "for row in range(64): read.float32('w', row, row + 1)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, check=True)
    assert int(done.stdout) * 1024 < 16e6


def test_floats_are_rounded_and_overflow_is_named(tmp_path):
    values = np.float32([1.00390625, -70000.0])
    path = tmp_path / "model.safetensors"
    write(path, [("w", "bf16", (2,), lambda: values)])
    with SafetensorsFolder(tmp_path) as read:
        assert read.float32("w").tolist() == [1.0, -70144.0]
    with pytest.raises(WeightError, match="'w'.*too large for f16"):
        write(path, [("w", "f16", (2,), values)])
    with SafetensorsFolder(tmp_path) as read:  # the older file is untouched
        assert read.tensors["w"].dtype == "bf16"


@pytest.mark.parametrize(
    "tensor",
    [
        ("w", "f32", (3,), np.zeros(2, np.float32)),
        ("w", "f32", (2,), np.zeros(2, np.int32)),
        ("w", "f64", (2,), np.zeros(2)),
        ("", "f32", (2,), np.zeros(2, np.float32)),
    ],
)
def test_writing_what_does_not_fit_leaves_nothing(tmp_path, tensor):
    with pytest.raises(ValueError):
        write(tmp_path / "model.safetensors", [tensor])
    assert not list(tmp_path.iterdir())


def test_a_name_is_written_once(tmp_path):
    tensor = ("w", "f32", (1,), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="twice"):
        write(tmp_path / "model.safetensors", [tensor, tensor])


def test_the_reference_library_can_read_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(
        tmp_path / "m.safetensors",
        [("w", "f32", (2, 3), values), ("h", "f16", (1,), values[:1, 1])],
    )
    loaded = safetensors.load_file(tmp_path / "m.safetensors")
    assert np.array_equal(loaded["w"], values) and loaded["h"][0] == 1


def test_full_disk_leaves_nothing(tmp_path):
    """A limit on file size stands in for the disk: the write fails in the middle with EFBIG."""
    code = (
        "import resource, signal, sys; from pathlib import Path; import numpy as np\n"
        "from chalot.formats.safetensors import write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "write(Path(sys.argv[1]), [('w', 'f32', (100_000,), np.zeros(100_000, np.float32))])\n"
    )
    path = tmp_path / "model.safetensors"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert "OutputError" in done.stderr and str(path) in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_directory_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "none" / "model.safetensors", [])


# ---- folders -------------------------------------------------------------------------------------


def test_shards_are_one_checkpoint_with_and_without_an_index(tmp_path):
    places = two_shards(tmp_path)
    for _ in range(2):
        with SafetensorsFolder(tmp_path) as read:
            assert sorted(read.tensors) == ["a", "b"] and read.float32("b").tolist() == [1.0]
        with_index(tmp_path, places)


def test_a_single_file_goes_before_an_index(tmp_path, opened):
    with_index(folder_with(tmp_path, pack({"w": entry(0, 4)}, bytes(4))), {"w": "gone.safetensors"})
    assert list(opened(tmp_path).tensors) == ["w"]


def test_views_outlive_the_checkpoint(tmp_path):
    read = open_checkpoint(folder_with(tmp_path, pack({"w": entry(0, 4)}, b"\0\0\x80\x3f")))
    view = read.raw("w")
    read.close()
    assert view[0] == 1
    for ask in (read.raw, read.float32):
        with pytest.raises(FormatError, match="closed"):
            ask("w")


def test_misaligned_tensors_come_as_aligned_copies(tmp_path, opened):
    header = json.dumps({"w": entry(0, 4)}).encode()
    header += b" " * (3 - len(header) % 4)  # the payload begins at an odd offset
    read = opened(folder_with(tmp_path, pack(header, b"\0\0\x80\x3f")))
    assert read.raw("w").flags.aligned and read.raw("w")[0] == 1 and read.float32("w")[0] == 1


def test_other_types_are_listed_and_refused_only_when_asked_for(tmp_path, opened):
    header = {"position_ids": entry(0, 8, [1], "I64"), "w": entry(8, 12)}
    read = opened(folder_with(tmp_path, pack(header, bytes(12))))
    assert read.tensors["position_ids"].dtype == "i64" and read.float32("w").shape == (1,)
    for ask in (read.raw, read.float32):
        with pytest.raises(UnsupportedError, match="'position_ids' is i64"):
            ask("position_ids")


def test_empty_tensors_are_listed_and_refused_only_when_asked_for(tmp_path, opened):
    read = opened(folder_with(tmp_path, pack({"w": entry(0, 0, [0, 5])})))
    assert read.tensors["w"].shape == (0, 5)
    with pytest.raises(FormatError, match=r"'w' is empty, shape \(0, 5\).*ZeRO-3"):
        read.float32("w")


def test_a_tensor_that_is_not_there_is_named(tmp_path, opened):
    read = opened(folder_with(tmp_path, pack({})))
    with pytest.raises(FormatError, match="no tensor 'lm_head.weight'"):
        read.float32("lm_head.weight")


def test_documents_are_bounded_utf8_and_optional(tmp_path, opened):
    read = opened(folder_with(tmp_path, pack({})))
    assert read.document("config.json") is None
    (tmp_path / "config.json").write_text('{"é": 1}', encoding="utf-8")
    assert read.document("config.json") == '{"é": 1}'.encode()
    (tmp_path / "config.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(FormatError, match=r"config\.json: byte 2 is not UTF-8"):
        read.document("config.json")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(50_000_000_000)  # sparse
    with pytest.raises(FormatError, match=r"config\.json: found more than 4,000,000 bytes"):
        read.document("config.json")
    with pytest.raises(ValueError):
        read.document("../secret")


@pytest.mark.parametrize("change", ["touch", "grow", "new document", "gone"])
def test_a_changed_checkpoint_is_noticed(tmp_path, change, opened):
    read = opened(folder_with(tmp_path, pack({"w": entry(0, 4)}, bytes(4))))
    read.check_unchanged()
    path = tmp_path / "model.safetensors"
    if change == "touch":
        os.utime(path, (1, 1))
    elif change == "grow":
        path.write_bytes(path.read_bytes() + b"x")
    elif change == "gone":
        path.unlink()
    else:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="changed since it was opened"):
        read.check_unchanged()


@pytest.mark.parametrize("ask", ["raw", "float32"])
def test_a_file_cut_after_opening_is_an_error_and_no_crash(tmp_path, ask, opened):
    read = opened(folder_with(tmp_path, pack({"w": entry(0, 40_000)}, bytes(40_000))))
    os.truncate(tmp_path / "model.safetensors", 20_000)
    with pytest.raises(FormatError, match=r"model\.safetensors: (found|file ends)"):
        getattr(read, ask)("w")


def test_closing_gives_descriptors_back_also_after_an_error(tmp_path):
    places = two_shards(tmp_path)
    (tmp_path / "two.safetensors").write_bytes(b"")
    with_index(tmp_path, places)
    gc.collect()  # what earlier tests left open must not be closed while we count
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(FormatError):
            SafetensorsFolder(tmp_path)
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_too_many_open_files_is_no_traceback(tmp_path):
    two_shards(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    taken = []
    try:
        with contextlib.suppress(OSError):
            taken.extend(os.dup(0) for _ in range(100))
        with pytest.raises(FormatError, match="Too many open files"):
            SafetensorsFolder(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


def test_written_files_have_ordinary_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        write(tmp_path / "model.safetensors", [])
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640
