"""npz: what is hostile is refused in one line that names the file, in little memory."""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chalot
from chalot.errors import ChalotError
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.npy import LONGEST, header_bytes, parse_header, read_array

NPZ, MANIFEST = "m_quantized_q4.npz", "m_manifest_q4.json"
ENTRY = {
    **{"name": "w", "shape": [4, 6], "bit_width": 4, "q": "q", "q_scales": "s"},
    **{"q_zero_point": "z", "quantization": {"type": "perrow_int", "bits": 4, "method": "x"}},
}
GOOD = {"format_version": "2", "weights": [ENTRY]}
ARRAYS = {
    "q": np.zeros((4, 3), np.uint8),
    "s": np.ones(4, np.float32),
    "z": np.zeros(4, np.float32),
}


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


def good(method: int = zipfile.ZIP_STORED, **other: bytes) -> bytes:
    members = {f"{name}.npy": npy(array) for name, array in ARRAYS.items()}
    return zipped(members | {f"{name}.npy": content for name, content in other.items()}, method)


def pair(folder: Path, manifest: Any = GOOD, arrays: bytes | None = None) -> Path:
    raw = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(raw)
    (folder / NPZ).write_bytes(good() if arrays is None else arrays)
    return folder / MANIFEST


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


def read_all(path: Path) -> None:
    found = open_checkpoint(path)
    try:
        for name, info in found.tensors.items():
            found.float32(name, 0, min(info.shape[0], 100))
        for name in ("tokenizer.json", "config.json"):
            found.document(name)
    finally:
        found.close()


def test_the_good_pair_is_read(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        read_all(pair(tmp_path, arrays=good(method)))


def changed(**fields: object) -> dict[str, Any]:
    return {**GOOD, "weights": [{**ENTRY, **fields}]}


MANIFESTS = {  # name -> (manifest, part of the message)
    "not json": (b"{]", "is not JSON"),
    "utf-8": (b'{"\xc3": 1}', "is not UTF-8"),
    "deep": (b'{"a":' * 300_000, "nested too deeply"),
    "twice": (b'{"weights":[],"weights":[]}', "is there twice"),
    "no weights": ({}, "has no weights"),
    "a config": ({"model_type": "llama"}, "has no weights"),
    "weights": ({"weights": "w"}, "expected a list or an object"),
    "version": ({**GOOD, "format_version": 3}, "format_version '3'"),
    "version list": ({**GOOD, "format_version": [2]}, "format_version"),
    "entry": ({"weights": [7]}, "no object with a name"),
    "name": (changed(name=7), "no object with a name"),
    "name twice": ({"weights": [ENTRY, ENTRY]}, "'w' is there twice"),
    "shape": (changed(shape="46"), "shape is not"),
    "shape 0": (changed(shape=[0, 6]), "shape is not"),
    "shape negative": (changed(shape=[-4, -6]), "shape is not"),
    "shape huge": (changed(shape=[1 << 62, 4]), "shape is not"),
    "shape bool": (changed(shape=[True, 6]), "shape is not"),
    "shape rank": (changed(shape=[2, 2, 6]), "shape is not"),
    "other shape": (changed(shape=[4, 7]), "expected 4 bytes a row"),
    "more rows": (changed(shape=[16777216, 6]), "expected 3 bytes a row"),
    "bits": (changed(bit_width=3), "'3' bits"),
    "bits huge": (changed(bit_width=10**400), "bits; expected"),
    "kind": (changed(quantization={"type": "gptq"}), "quantised as 'gptq'"),
    "quantization": (changed(quantization=[4]), "expected an object"),
    "axis": (changed(scale_axis={"index": 1}), "scales of axis"),
    "q": (changed(q=None), "not names of arrays"),
    "q list": (changed(q=["q"]), "not names of arrays"),
    "no scales": (changed(q_scales=None), "q_scales or q_zero_point is missing"),
    "missing array": (changed(q="absent"), "array 'absent' is missing"),
    "a path": (changed(q="../../etc/passwd"), "is missing"),
    "codes for scales": (changed(q_scales="q"), "expected one number"),
    "vector of codes": (changed(shape=[4]), "neither floats nor codes"),
    "document": ({**GOOD, "metadata": {"documents": {"x": "q"}}}, "document 'x' is not known"),
    "document type": ({**GOOD, "metadata": {"documents": {"config.json": 1}}}, "is not known"),
    "document of codes": (
        {**GOOD, "metadata": {"documents": {"tokenizer.json": "s"}}},
        "expected at most 128,000,000 bytes",
    ),
    "weights file": ({**GOOD, "metadata": {"weights_file": "../x.npz"}}, "plain name"),
    "weights file absolute": ({**GOOD, "npz": "/etc/passwd"}, "plain name"),
    "other bytes": ({**GOOD, "metadata": {"weights_bytes": 5}}, "its manifest says 5"),
    "metadata": ({**GOOD, "metadata": [1]}, "expected an object"),
    "architecture": ({**GOOD, "architecture": 7}, "expected an object"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_hostile_manifests(tmp_path: Path, case: str) -> None:
    manifest, message = MANIFESTS[case]
    refuse(pair(tmp_path, manifest), message, "m_")


def pickled() -> bytes:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch /tmp/chalot-was-here",)

    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    start = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
    return start + pickle.dumps([Bomb()])


def with_header(text: str, content: bytes = bytes(12)) -> bytes:
    raw = text.encode()
    return b"\x93NUMPY\1\0" + len(raw).to_bytes(2, "little") + raw + content


def said(descr: object = "|u1", fortran: object = False, shape: object = (4, 3)) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': {fortran!r}, 'shape': {shape!r}, }}\n"


HEADERS = {
    "pickle": (pickled(), "an array of objects, a pickle"),
    "objects in fields": (with_header(said([("a", "|O")])), "is not what numpy writes"),
    "code": (with_header("__import__('os').system('x')\n"), "is not what numpy writes"),
    "deep": (with_header("(" * 3000), "is not what numpy writes"),
    "minus": (with_header("-" * 4000 + "1"), "is not what numpy writes"),
    "too long": (with_header(" " * 60000), "a header of 60,000 bytes"),
    "no magic": (b"PK\3\4" + bytes(200), "is no numpy array"),
    "version": (b"\x93NUMPY\x09\0" + bytes(200), "is no numpy array"),
    "cut": (b"\x93NUMPY\1", "is no numpy array"),
    "cut header": (b"\x93NUMPY\1\0\xff\0{", "a header of 255 bytes"),
    "columns first": (with_header(said(fortran=True)), "stored by columns"),
    "big-endian": (with_header(said(">f4"), bytes(48)), "numbers of type '>f4'"),
    "complex": (with_header(said("<c8"), bytes(96)), "numbers of type '<c8'"),
    "unknown": (with_header(said("|V2"), bytes(24)), "numbers of type '|V2'"),
    "no endian": (with_header(said("|f4"), bytes(48)), "numbers of type '|f4'"),
    "negative": (with_header(said(shape=(-4, -3))), "is not what numpy writes"),
    "huge": (with_header(said(shape=(10**30, 3))), "none of an array"),
    "overflow": (with_header(said(shape=(1 << 40, 1 << 40))), "takes"),
    "rank": (with_header(said(shape=(1,) * 40)), "none of an array"),
    "longer": (with_header(said(), bytes(13)), "takes"),
    "shorter": (with_header(said(), bytes(11)), "takes"),
    "other type": (with_header(said("<f8"), bytes(96)), "found shape (4, 3), expected (4, 6)"),
    "wide codes": (with_header(said("<i4"), bytes(48)), "neither floats nor codes"),
    "empty": (b"", "is no numpy array"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_arrays(tmp_path: Path, case: str) -> None:
    content, message = HEADERS[case]
    refuse(pair(tmp_path, arrays=good(q=content)), message, NPZ)
    assert not Path("/tmp/chalot-was-here").exists()


def patched(content: bytes, signature: bytes, offset: int, value: bytes, which: int = 0) -> bytes:
    """The zip file with some bytes of its `which`-th record of a kind changed."""
    at = -1
    for _ in range(which + 1):
        at = content.index(signature, at + 1)
    return content[: at + offset] + value + content[at + offset + len(value) :]


LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
ZIPS = {
    "nothing": (b"PK\3\4", "is no whole zip file"),
    "method": (patched(good(), CENTRAL, 10, b"\x0c\0"), "packed by another method"),
    "encrypted": (patched(good(), CENTRAL, 8, b"\1\0"), "encrypted"),
    "offset": (patched(good(), CENTRAL, 42, b"\xff\xff\xff\x7f"), "m_quantized"),
    "same bytes": (patched(good(), CENTRAL, 42, bytes(4), 1), "run into what follows"),
    "longer than there is": (patched(good(), CENTRAL, 20, b"\0\0\0\x10" * 2), "run into"),
    "contradiction": (patched(good(), CENTRAL, 24, b"\x99\0\0\0"), "zip bomb"),
    "local name": (patched(good(), LOCAL, 26, b"\xff\xff"), "run into what follows"),
    "directory": (patched(good(), END, 12, b"\xff\xff\xff\x7f"), "is no whole zip file"),
    "count": (patched(good(), END, 8, b"\xff\xff\xff\xff"), "m_quantized"),
    "checksum": (patched(good(), CENTRAL, 16, b"\1\2\3\4"), "wrong checksum"),
    "damaged": (good().replace(b"\0\0\x80\x3f" * 4, b"\0\0\x80\x40" * 4), "wrong checksum"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_hostile_zip_files(tmp_path: Path, case: str) -> None:
    content, message = ZIPS[case]
    if case == "count":  # counts are not believed: the listing is what it is
        read_all(pair(tmp_path, arrays=content))
        return
    refuse(pair(tmp_path, arrays=content), message, NPZ)


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


@settings(max_examples=150)
@given(st.data())
def test_no_byte_that_is_changed_is_more_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    content = bytearray(good(data.draw(st.sampled_from([0, 8]))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    try:
        read_all(pair(folder, arrays=bytes(content)))
    except ChalotError as error:
        assert "\n" not in str(error)


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
