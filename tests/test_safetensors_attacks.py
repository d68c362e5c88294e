"""safetensors: what is hostile is refused in one line that names the file, in little memory."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chalot.errors import ChalotError, FormatError, UnsupportedError
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.documents import DOCUMENTS, MAX_JSON_VALUES
from chalot.formats.safetensors import SafetensorsFolder
from chalot.formats.safetensors_header import MAX_HEADER
from safetensors_files import INDEX, entry, folder_with, pack, refuse, two_shards, with_index

GOOD = {"a": entry(0, 8), "b": entry(8, 16)}

HEADERS = {  # name -> (header, payload bytes, part of the message)
    "array": ([1], 0, "expected a JSON object"),
    "not json": (b"{]", 0, "is not JSON"),
    "empty": (b"", 2, "is not JSON"),
    "utf-8": (b'{"\xc3": 1}', 0, "is not UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), 0, "is not UTF-8"),
    "surrogate": (b'{"\\ud800": 1}', 0, "is not JSON"),
    "NaN": (b'{"a": NaN}', 0, "found NaN"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", 0, "is not JSON"),
    "nested arrays": (b"[" * 500_000, 0, "nested too deeply"),
    "nested objects": (b'{"a":' * 500_000, 0, "nested too deeply"),
    "many values": (b"[" + b"0," * (MAX_JSON_VALUES + 1) + b"0]", 0, "found more than"),
    "duplicate tensor": (
        b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 4)).encode(),) * 2),
        4,
        "key 'a' is there twice",
    ),
    "duplicate key": (
        b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}',
        4,
        "key 'dtype' is there twice",
    ),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "metadata list": ({"__metadata__": []}, 0, "__metadata__"),
    "entry": ({"a": 1}, 0, "'a': expected dtype, shape and data_offsets"),
    "entry key": ({"a": {**entry(0, 4), "x": 1}}, 4, "'a': expected dtype"),
    "dtype": ({"a": entry(0, 4, [1], "Q4")}, 4, "unknown dtype 'Q4'"),
    "dtype list": ({"a": entry(0, 4, [1], ["F32"])}, 4, "unknown dtype"),
    "negative dimension": ({"a": entry(0, 4, [-1, -1])}, 4, "shape is not"),
    "float dimension": ({"a": entry(0, 4, [1.0])}, 4, "shape is not"),
    "boolean dimension": ({"a": entry(0, 4, [True])}, 4, "shape is not"),
    "huge dimension": ({"a": entry(0, 4, [1 << 63])}, 4, "shape is not"),
    "product overflow": ({"a": entry(0, 0, [1 << 32, 1 << 32])}, 0, "takes"),
    "product overflow to 4": ({"a": entry(0, 4, [(1 << 62) + 1, 4])}, 4, "takes"),
    "rank": ({"a": entry(0, 4, [1] * 17)}, 4, "shape is not"),
    "shape text": ({"a": entry(0, 4, "11")}, 4, "shape is not"),
    "negative offset": ({"a": entry(-4, 0, [1])}, 4, "data_offsets"),
    "descending": ({"a": entry(4, 0, [1])}, 4, "data_offsets"),
    "three offsets": ({"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, 8, "data_offsets"),
    "contradiction": ({"a": entry(0, 8, [1])}, 8, "its extent has 8"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' begins at 4, overlaps"),
    "same extent": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlaps"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "'b' begins at 8, leaves a hole"),
    "hole first": ({"a": entry(4, 8)}, 8, "leaves a hole"),
    "past the end": (GOOD, 15, "tensors end at 16 bytes of payload, file has 15"),
    "far past the end": ({"a": entry(0, 1 << 40)}, 4, "truncated download"),
    "bytes after": (GOOD, 17, "expected no bytes past the last one"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers(tmp_path, case):
    header, payload, message = HEADERS[case]
    refuse(folder_with(tmp_path, pack(header, bytes(payload))), message)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "found 0 bytes"),
        (b"\0" * 7, "found 7 bytes"),
        (b"\2" + b"\0" * 7 + b"{", "found 9 bytes"),
        (b"\3" + b"\0" * 7 + b"{}", "header of 3 bytes"),
        (b"\xff" * 8 + b"{}", "header of 18,446,744,073,709,551,615 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_hostile_starts(tmp_path, content, message):
    refuse(folder_with(tmp_path, content), message)


def test_a_header_over_100_mb_is_not_even_read(tmp_path):
    folder = folder_with(tmp_path, (MAX_HEADER + 1).to_bytes(8, "little"))
    os.truncate(folder / "model.safetensors", 2 * MAX_HEADER)  # sparse
    refuse(folder, "expected at most 100,000,000", memory=1_000_000)


def test_every_truncation_is_refused(tmp_path):
    whole = pack(GOOD, bytes(16))
    for length in range(len(whole)):
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            SafetensorsFolder(folder_with(tmp_path, whole[:length]))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_raise_or_read_but_never_crash(tmp_path_factory, data):
    content = bytearray(pack(GOOD, bytes(16)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = folder_with(tmp_path_factory.mktemp("damaged"), bytes(content))
    try:
        with SafetensorsFolder(folder) as read:
            for name in read.tensors:
                read.float32(name)
                read.raw(name)
    except ChalotError as error:
        assert str(folder) in str(error)


@pytest.mark.parametrize(
    "file",
    [
        "../one.safetensors",
        "/etc/one.safetensors",
        "sub/one.safetensors",
        "..\\one.safetensors",
        "C:one.safetensors",
        "..",
        "",
        "a\0.safetensors",
        "x" * 300 + ".safetensors",
        7,
        ["one.safetensors"],
    ],
)
def test_an_index_names_plain_files_only(tmp_path, file):
    two_shards(tmp_path)
    refuse(with_index(tmp_path, {"a": file}), "expected the plain name", file=INDEX)


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "expected *.safetensors"),
        ({"weight_map": {"a": "two.safetensors"}}, "does not"),
        ({"weight_map": {"c": "one.safetensors"}}, "does not"),
        ({"weight_map": {str(i): f"{i}.safetensors" for i in range(501)}}, "names 501 files"),
    ],
)
def test_hostile_indices(tmp_path, content, message):
    two_shards(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(content))
    refuse(tmp_path, message, file=INDEX)


def test_an_index_over_its_size_is_refused(tmp_path):
    two_shards(tmp_path)
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(DOCUMENTS[INDEX] * 100)
    refuse(tmp_path, "found more than 64,000,000 bytes", file=INDEX, memory=150_000_000)


def test_a_missing_shard_is_named(tmp_path):
    places = two_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    refuse(with_index(tmp_path, places), "cannot be opened", file="two.safetensors")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for file in ("one.safetensors", "two.safetensors"):
        folder_with(tmp_path, pack({"a": entry(0, 4)}, bytes(4)), file)
    refuse(tmp_path, "tensor 'a' is in one.safetensors", file="two.safetensors")
    refuse(
        with_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}),
        "expected it once",
        "",
    )


def test_links_may_not_leave_the_folder(tmp_path):
    outside = folder_with(tmp_path / "outside", pack({"w": entry(0, 4)}, bytes(4)))
    folder = folder_with(tmp_path / "model", b"", "x")
    link = folder / "model.safetensors"
    link.symlink_to(outside / "model.safetensors")
    refuse(folder, "outside the checkpoint's folder")
    link.unlink()
    link.symlink_to(link)  # a loop
    refuse(folder, "cannot be opened")
    link.unlink()
    (folder / "real.bin").write_bytes((outside / "model.safetensors").read_bytes())
    link.symlink_to("real.bin")
    with SafetensorsFolder(folder) as read:
        (folder / "config.json").symlink_to("/etc/hostname")
        with pytest.raises(FormatError, match=r"config\.json: is a link to"):
            read.document("config.json")


def test_links_inside_a_hub_cache_are_followed_and_no_further(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    folder_with(repository / "blobs", pack({"w": entry(0, 4)}, bytes(4)), "blob")
    (snapshot / "model.safetensors").symlink_to("../../blobs/blob")
    with SafetensorsFolder(snapshot) as read:
        assert list(read.tensors) == ["w"]
    folder_with(tmp_path / "models--other--name", pack({}), "blob")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../models--other--name/blob")
    refuse(snapshot, "outside the checkpoint's folder")


def test_a_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    refuse(tmp_path, "not a regular file")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refuse(tmp_path, "model.safetensors")


def test_an_unreadable_file_is_named(tmp_path):
    folder_with(tmp_path, pack({})).joinpath("model.safetensors").chmod(0)
    if os.access(tmp_path / "model.safetensors", os.R_OK):
        pytest.skip("this user reads everything")
    refuse(tmp_path, "cannot be opened")


@pytest.mark.parametrize(
    "files, error, message",
    [
        ([], FormatError, "holds no *.safetensors"),
        (["pytorch_model.bin", "config.json"], UnsupportedError, "safe_serialization=True"),
        (["adapter_model.safetensors"], UnsupportedError, "LoRA adapter"),
    ],
)
def test_folders_without_weights_say_what_helps(tmp_path, files, error, message):
    for file in files:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(error) as caught:
        open_checkpoint(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
