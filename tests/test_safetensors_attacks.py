"""safetensors: what is hostile is refused in one line that names the file, in little memory."""

import os

import pytest

from chalot.errors import FormatError, UnsupportedError
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.documents import DOCUMENTS
from chalot.formats.safetensors import SafetensorsFolder
from chalot.formats.safetensors.header import MAX_HEADER
from safetensors_files import INDEX, entry, folder_with, pack, refuse, two_shards, with_index

GOOD = {"a": entry(0, 8), "b": entry(8, 16)}


def test_a_header_over_100_mb_is_not_even_read(tmp_path):
    folder = folder_with(tmp_path, (MAX_HEADER + 1).to_bytes(8, "little"))
    os.truncate(folder / "model.safetensors", 2 * MAX_HEADER)  # sparse
    refuse(folder, "expected at most 100,000,000", memory=1_000_000)


def test_every_truncation_is_refused(tmp_path):
    whole = pack(GOOD, bytes(16))
    for length in range(len(whole)):
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            SafetensorsFolder(folder_with(tmp_path, whole[:length]))


def test_an_index_over_its_size_is_refused(tmp_path):
    two_shards(tmp_path)
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(DOCUMENTS[INDEX] * 100)
    refuse(tmp_path, "found more than 64,000,000 bytes", file=INDEX, memory=1_000_000)


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
