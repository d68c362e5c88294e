"""The hub: what is fetched, how little is asked, and every refusal in a line of its own."""

import json
import logging
import shutil

import numpy as np
import pytest

from chalot.errors import (
    ChalotError,
    FormatError,
    HubAccessError,
    HubBusyError,
    HubError,
    HubNotFoundError,
    HubOfflineError,
    LimitError,
    OutputError,
    UnsupportedError,
)
from chalot.formats.hub import fetch, headers
from chalot.formats.hub import requests as hub_requests
from chalot.formats.safetensors import SafetensorsFolder
from hub_server import COMMIT, HubServer
from safetensors_files import entry, pack

WEIGHTS = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)  # 4 MB
SINGLE = pack({"w": entry(0, WEIGHTS.nbytes)}, WEIGHTS.tobytes())
INDEX = "model.safetensors.index.json"
SHARDS = {
    "model-00001-of-00002.safetensors": pack({"a": entry(0, 400)}, bytes(400)),
    "model-00002-of-00002.safetensors": pack({"b": entry(0, 800)}, bytes(800)),
}
WEIGHT_MAP = dict(zip("ab", SHARDS, strict=True))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a single-file model, a sharded one, and one of pickles; an empty cache."""
    from huggingface_hub import constants

    config = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}
    other = {"README.md": b"# hello", "pytorch_model.bin": b"evil", "onnx/model.onnx": b"big"}
    index = {INDEX: json.dumps({"weight_map": WEIGHT_MAP}).encode()}
    consolidated = {"consolidated.safetensors": pack({}, b"")}
    with HubServer(
        {
            "org/single": {**config, **other, "model.safetensors": SINGLE},
            "org/sharded": {**config, **other, **index, **SHARDS, **consolidated},
            "org/pickle": {**config, "pytorch_model.bin": b"evil"},
        }
    ) as server:
        server.large.update({"model.safetensors", *SHARDS})
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(hub_requests, "DELAYS", (0, 0, 0, 0))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "*")
        yield server


def weights(folder):
    with SafetensorsFolder(folder) as read:
        return read.float32("w")


def first_byte(request):
    return int(request.range.removeprefix("bytes=").partition("-")[0])


# ---- what is fetched -----------------------------------------------------------------------------


def test_fetch_brings_what_is_needed_and_nothing_else(hub):
    calls = []
    folder = fetch("org/single", progress=lambda done, total: calls.append((done, total)))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert np.array_equal(weights(folder), WEIGHTS)
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1] > WEIGHTS.nbytes
    assert not hub.requests(".bin") and not hub.requests(".onnx")


def test_fetch_takes_the_shards_of_the_index(hub):
    folder = fetch("org/sharded")
    with SafetensorsFolder(folder) as read:
        assert sorted(read.tensors) == ["a", "b"]
    assert not hub.requests("consolidated.safetensors")


def test_a_second_fetch_asks_for_the_listing_only(hub):
    first = fetch("org/single")
    hub.log.clear()
    assert fetch("org/single") == first
    assert [entry.path for entry in hub.log] == ["/api/models/org/single/revision/main"]


def test_the_cache_is_that_of_huggingface_hub(hub):
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    folder = fetch("org/single")
    assert try_to_load_from_cache("org/single", "config.json") == str(folder / "config.json")
    assert snapshot_download("org/single", local_files_only=True) == str(folder)
    assert (folder / "model.safetensors").is_symlink()


def test_revisions_are_asked_for_and_kept_apart(hub):
    folder = fetch("org/single", "v1")
    assert folder.name == COMMIT and (folder.parents[1] / "refs" / "v1").read_text() == COMMIT
    assert fetch("org/single", COMMIT) == folder
    with pytest.raises(HubNotFoundError, match="'v2'"):
        fetch("org/single", "v2")
    for hostile in ("../../x", "/etc", "a b", "-x", "a\n"):
        with pytest.raises(HubError, match="is no revision"):
            fetch("org/single", hostile)


def test_a_token_is_sent_to_the_hub_and_not_to_where_files_lie(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch("org/single")
    assert {entry.token for entry in hub.log if entry.host == "127.0.0.1"} == {"Bearer hf_secret"}
    assert {entry.token for entry in hub.log if entry.host == "localhost"} == {None}


# ---- what is asked before a download -------------------------------------------------------------


@pytest.mark.parametrize("repo_id", ["org/single", "org/sharded"])
def test_headers_transfer_no_weight(hub, repo_id):
    found = headers(repo_id)
    served = [entry for entry in hub.log if ".safetensors" in entry.path and entry.status != 302]
    served = [entry for entry in served if not entry.path.endswith(".json")]
    payload = {"org/single": [SINGLE], "org/sharded": list(SHARDS.values())}[repo_id]
    header_bytes = sum(8 + int.from_bytes(file[:8], "little") for file in payload)
    assert sum(entry.sent for entry in served) == header_bytes
    assert found.weight_bytes == sum(map(len, payload))
    assert found.download_bytes > found.weight_bytes and found.commit == COMMIT
    assert found.document("config.json") == b'{"model_type": "llama"}'
    assert found.document("generation_config.json") is None


def test_headers_are_those_of_the_downloaded_files(hub):
    for repo_id in ("org/single", "org/sharded"):
        found = headers(repo_id)
        with SafetensorsFolder(fetch(repo_id)) as read:
            assert dict(found.tensors) == dict(read.tensors)


def test_a_hub_that_ignores_ranges_is_not_heard_to_the_end(hub):
    hub.fault("/large/org/single/model.safetensors", ignore_range=True, times=9)
    assert list(headers("org/single").tensors) == ["w"]


def test_hostile_headers_are_refused_without_reading_on(hub):
    hub.repositories["org/single"]["model.safetensors"] = b"\xff" * 8 + bytes(100)
    with pytest.raises(FormatError, match=r"org/single/model\.safetensors: header of"):
        headers("org/single")
    huge = (20_000_000).to_bytes(8, "little") + bytes(20_000_000)
    hub.repositories["org/single"]["model.safetensors"] = huge
    with pytest.raises(FormatError, match="header of 20,000,000 bytes"):
        headers("org/single")
    assert sum(entry.sent for entry in hub.log) < 100_000


@pytest.mark.parametrize(
    "listing, message",
    [
        (b"[]", "lists no files"),
        (b"{", "not JSON"),
        (b'{"sha": "x", "siblings": []}', "lists no files"),
        (b'{"sha": "%b", "siblings": [7]}' % COMMIT.encode(), "no size and hash"),
        (
            b'{"sha": "%b", "siblings": [{"rfilename": "config.json", "size": -1}]}'
            % COMMIT.encode(),
            "no size and hash for 'config.json'",
        ),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * 33_000_000, "more than 32,000,000 bytes"),
    ],
)
def test_hostile_listings(hub, listing, message):
    hub.fault("/revision/main", body=listing)
    with pytest.raises(ChalotError) as caught:
        fetch("org/single")
    assert message in str(caught.value) and "org/single" in str(caught.value)


def test_names_out_of_a_listing_stay_in_the_snapshot(hub):
    hub.repositories["org/single"] = {"config.json": b"{}", "..\\..\\x.safetensors": SINGLE}
    with pytest.raises(FormatError, match="expected the plain name"):
        fetch("org/single")
    hub.repositories["org/single"] = {"config.json": b"{}", "../x.safetensors": SINGLE}
    with pytest.raises(FormatError, match=r"no \*\.safetensors"):
        fetch("org/single")


def test_documents_over_their_bound_are_not_downloaded(hub):
    hub.repositories["org/sharded"][INDEX] = bytes(64_000_001)
    with pytest.raises(FormatError, match="64,000,001 bytes"):
        fetch("org/sharded")
    assert not hub.requests(INDEX)


def test_models_without_safetensors_or_configuration_say_so(hub):
    for ask in (fetch, headers):
        with pytest.raises(UnsupportedError, match="pickled"):
            ask("org/pickle")
    del hub.repositories["org/single"]["config.json"]
    with pytest.raises(FormatError, match=r"no config\.json"):
        fetch("org/single")
    del hub.repositories["org/sharded"]["model-00002-of-00002.safetensors"]
    with pytest.raises(FormatError, match=r"names model-00002-of-00002\.safetensors"):
        fetch("org/sharded")


# ---- cuts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_stream_is_resumed_where_it_was_cut(hub, reset):
    hub.fault("/large/org/single/model.safetensors", cut_after=1_000_000, reset=reset)
    assert np.array_equal(weights(fetch("org/single")), WEIGHTS)
    first, second = hub.requests("/large/org/single/model.safetensors")
    assert 0 < first_byte(second) <= 1_000_000 and second.status == 206
    assert second.sent == len(SINGLE) - first_byte(second)


def test_a_stream_cut_every_time_is_an_error_and_the_next_run_resumes(hub):
    path = "/large/org/single/model.safetensors"
    hub.fault(path, cut_after=200_000, times=5)
    with pytest.raises(HubError, match="failed 5 times.*what arrived of a file is kept: run"):
        fetch("org/single")
    assert len(hub.requests(path)) == 5
    folder = fetch("org/single")
    assert 500_000 < first_byte(hub.requests(path)[5]) <= 1_000_000
    assert np.array_equal(weights(folder), WEIGHTS)


def test_progress_makes_the_attempts_count_anew(hub, monkeypatch):
    monkeypatch.setattr(hub_requests, "PROGRESS", 100_000)
    hub.fault("/large/org/single/model.safetensors", cut_after=200_000, times=20)
    assert np.array_equal(weights(fetch("org/single")), WEIGHTS)


def test_resuming_works_where_ranges_are_ignored(hub):
    path = "/large/org/single/model.safetensors"
    hub.fault(path, cut_after=1_000_000)
    hub.fault(path, ignore_range=True)
    assert np.array_equal(weights(fetch("org/single")), WEIGHTS)


def test_a_damaged_file_is_discarded(hub):
    hub.fault("/large/org/single/model.safetensors", garble=True)
    with pytest.raises(HubError, match="damaged on the way and discarded"):
        fetch("org/single")
    assert np.array_equal(weights(fetch("org/single")), WEIGHTS)
    hub.fault("/config.json", garble=True)
    with pytest.raises(HubError, match=r"config\.json: content has hash"):
        fetch("org/sharded")


def test_a_hub_that_fails_for_the_moment_is_asked_again(hub):
    hub.fault("/revision/main", status=503)
    hub.fault("config.json", status=500)
    assert np.array_equal(weights(fetch("org/single")), WEIGHTS)
    hub.fault("/revision/main", status=502, times=5)
    with pytest.raises(HubError, match=r"failed 5 times \(the hub answered 502\)"):
        headers("org/single")


def test_a_wrong_range_is_noticed(hub):
    path = "/large/org/single/model.safetensors"
    hub.fault(path, cut_after=200_000)
    hub.fault(path, status=206, headers={"Content-Range": "bytes 0-9/10"})
    with pytest.raises(HubError, match=r"asked for bytes from \d+, hub sent 0"):
        fetch("org/single")


# ---- refusals ------------------------------------------------------------------------------------

GATED = {"X-Error-Code": "GatedRepo"}
PAGE = "https://huggingface.co/org/single"


@pytest.mark.parametrize(
    "status, answer, error, parts",
    [
        (401, {}, HubAccessError, ["(401)", "HF_TOKEN", "expired"]),
        (401, GATED, HubAccessError, ["gated (401)", PAGE, "licence", "HF_TOKEN"]),
        (403, GATED, HubAccessError, ["gated (403)", PAGE, "licence", "HF_TOKEN"]),
        (403, {}, HubAccessError, ["(403)", PAGE, "HF_TOKEN"]),
        (401, {"X-Error-Code": "RepoNotFound"}, HubNotFoundError, ["no such model (401)", PAGE]),
        (404, {"X-Error-Code": "RepoNotFound"}, HubNotFoundError, ["no such model (404)", PAGE]),
        (404, {"X-Error-Code": "RevisionNotFound"}, HubNotFoundError, ["no revision 'main'"]),
        (404, {"X-Error-Code": "EntryNotFound"}, HubNotFoundError, ["no such file"]),
        (429, {"Retry-After": "120"}, HubBusyError, ["(429)", "in 120 seconds"]),
        (429, {"Retry-After": "9" * 99}, HubBusyError, ["(429)", "try again later"]),
        (429, {}, HubBusyError, ["(429)", "try again later"]),
        (418, {}, HubError, ["the hub answered 418"]),
    ],
)
def test_refusals_are_told_apart_in_one_line(hub, status, answer, error, parts):
    for ask in (fetch, headers):
        for suffix in ("/revision/main", "resolve/" + COMMIT + "/model.safetensors"):
            hub.fault(suffix, status=status, headers=answer)
            with pytest.raises(error) as caught:
                ask("org/single")
            assert type(caught.value) is error
            assert all(part in str(caught.value) for part in parts), str(caught.value)
            assert "org/single" in str(caught.value) and "\n" not in str(caught.value)
            hub.faults.clear()


@pytest.mark.parametrize("hostile", ["../x", "a/b/c", "a b/c", "org/..", "x", ""])
def test_ids_are_checked_before_anything_is_sent(hub, hostile):
    with pytest.raises(HubError, match="expected ORG/NAME"):
        fetch(hostile)
    assert not hub.log


def test_without_a_network_a_complete_copy_is_used_with_a_warning(hub, monkeypatch, caplog):
    from huggingface_hub import constants

    folder = fetch("org/sharded")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(HubOfflineError, match=r"127\.0\.0\.1:9 did not answer.*HF_ENDPOINT"):
        fetch("org/single")
    with pytest.raises(HubOfflineError):
        headers("org/sharded")
    with caplog.at_level(logging.WARNING):
        assert fetch("org/sharded") == folder
    assert "using the copy in" in caplog.text
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(HubOfflineError):
        fetch("org/sharded")


def test_offline_mode_uses_the_cache_or_says_so(hub, monkeypatch):
    from huggingface_hub import constants

    folder = fetch("org/single")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert fetch("org/single") == folder
    with pytest.raises(HubOfflineError, match="HF_HUB_OFFLINE is set"):
        fetch("org/sharded")
    assert not hub.log


# ---- this machine --------------------------------------------------------------------------------


def test_disk_is_checked_before_a_download(hub, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(LimitError, match=r"needs 0\.00 GB more.*HF_HOME"):
        fetch("org/single")
    assert all(entry.path.startswith("/api/") for entry in hub.log)


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(OutputError, match="HF_HOME"):
        fetch("org/single")


def test_two_processes_do_not_write_one_file(hub, tmp_path):
    import fcntl

    hub.fault("/large/org/single/model.safetensors", cut_after=1000, times=5)
    with pytest.raises(HubError):
        fetch("org/single")
    (part,) = tmp_path.glob("cache/*/blobs/*.incomplete")
    with part.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(HubError, match="another process is downloading it"):
            fetch("org/single")
    assert np.array_equal(weights(fetch("org/single")), WEIGHTS)


def test_a_file_system_without_links_gets_plain_files(hub, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    folder = fetch("org/single")
    assert not (folder / "model.safetensors").is_symlink()
    assert np.array_equal(weights(folder), WEIGHTS)
    hub.log.clear()
    fetch("org/single")
    assert len(hub.log) == 1
