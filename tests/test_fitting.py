"""Sizes before downloads: bytes, memory and disk in every scheme, out of headers alone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import chalot
from chalot import cli, machine
from chalot.describe import describe, fitting
from chalot.errors import ContextError, HubAccessError, HubNotFoundError, LimitError
from chalot.quant.scheme import SCHEMES
from chalot.short_names import NAMES
from hub_server import HubServer
from myai_files import checkpoint
from shapes import LLAMA2_7B, SHAPES, headers, shape, zeros

# not by ru_maxrss: a child starts with its parent's
PEAK = """
import sys
from pathlib import Path
import chalot
chalot.convert(*sys.argv[1:4])
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024)
"""
GB = 1_000_000_000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with Llama 2 7B in three files, of which only the headers exist; an empty cache."""
    from huggingface_hub import constants

    with HubServer({NAMES["llama2-7b"].id: headers(LLAMA2_7B, 3)}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.chdir(tmp_path)
        yield server


def have(monkeypatch: pytest.MonkeyPatch, memory: int, disk: int = 10_000 * GB) -> None:
    """Let the machine have so many bytes free."""
    monkeypatch.setattr(machine, "memory_available", lambda: memory)
    monkeypatch.setattr(machine, "disk_free", lambda _: disk)


# ---- of a model on the hub


def test_seven_billion_weights_are_judged_by_their_headers(hub: HubServer) -> None:
    report = describe("llama2-7b")
    assert sum(entry.sent for entry in hub.log) < 100_000
    assert report.parameters == NAMES["llama2-7b"].parameters
    assert report.fit is not None and report.fit.context == 4096
    assert report.fit.download_bytes == report.origin.download_bytes > 13 * GB
    options = {o.scheme: o for o in report.fit.options}
    assert list(options) == list(SCHEMES)
    assert 3.5 * GB < options["nl4"].file_bytes < 3.8 * GB
    assert 6.8 * GB < options["int8"].file_bytes < 7.1 * GB
    for o in report.fit.options:
        assert o.running > o.file_bytes * 0.95 - 300_000_000 and o.converting < GB


@pytest.mark.parametrize(
    ("memory", "best"),
    [(64 * GB, "int8"), (16 * GB, "int8"), (7 * GB, "int6"), (5 * GB, "nl4"), (3 * GB, None)],
)
def test_the_best_scheme_that_fits_memory(
    memory: int, best: str | None, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, memory)
    found = describe("llama2-7b").fit
    assert found is not None and found.best == best
    if best is None:
        with pytest.raises(LimitError, match="nl4.*--context"):
            fitting.chosen(found, "llama2-7b")


def test_a_longer_context_takes_another_scheme(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, int(7.5 * GB))
    best = [describe("llama2-7b", context=n).fit.best for n in (0, 4096)]  # type: ignore[union-attr]
    assert best == ["int8", "int6"]
    with pytest.raises(ContextError, match="4096"):
        describe("llama2-7b", context=4097)


def test_the_disk_must_hold_download_and_file(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for disk, fits in ((18 * GB, ["nl4"]), (21 * GB, ["int8", "nl4"]), (13 * GB, [])):
        have(monkeypatch, 64 * GB, disk)
        found = describe("llama2-7b").fit
        assert found is not None
        able = [o.scheme for o in found.options if o.fits_disk and o.scheme in ("int8", "nl4")]
        assert able == fits


def test_dry_run_says_it_all_and_writes_nothing(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    have(monkeypatch, 6 * GB)
    assert cli.main(["convert", "llama2-7b", "--fit", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "llama2-7b-nl4.myai" in said and "nl4 *" in said and "13.5 GB to download" in said
    assert cli.main(["convert", "llama2-7b", "--bits", "8", "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["scheme"] == "int8" and report["fit"]["best"] == "nl4"
    assert cli.main(["describe", "llama2-7b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fit"]["best"] == "nl4"
    assert list(tmp_path.iterdir()) == []


def test_what_the_hub_refuses(hub: HubServer) -> None:
    hub.fault("revision/main", status=403, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(HubAccessError, match=r"accept the licence at .*/meta-llama/.*HF_TOKEN"):
        describe("llama2-7b")
    with pytest.raises(HubNotFoundError, match=r"no such file or folder here; asked the hub: "):
        describe("org/nothing")


# ---- of a folder


def test_fit_converts_to_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "small", "bf16")
    found = describe(folder).fit
    assert found is not None and found.best == "int8" and found.download_bytes == 0
    sizes = {o.scheme: max(o.running, o.converting) for o in found.options}
    options = ["convert", str(folder), "--fit", "--output-dir", str(tmp_path / "out"), "-q"]
    assert cli.main(options) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["small-int8.myai"]
    have(monkeypatch, min(sizes.values()) // 2)
    assert cli.main(options) == 1
    assert "does not fit in nl4" in capsys.readouterr().err


def test_a_file_is_as_long_as_was_said(demo_files: dict[str, Path]) -> None:
    found = describe(chalot.demo.FOLDER).fit
    assert found is not None
    for o in found.options:
        if o.scheme in demo_files:
            assert 0.95 < o.file_bytes / demo_files[o.scheme].stat().st_size < 1.05


def test_parameters_of_short_names_are_those_of_their_shapes() -> None:
    from math import prod

    from chalot.model.config import from_hugging_face
    from chalot.model.layers import model_tensors

    for name, raw in SHAPES.items():
        tensors = model_tensors(from_hugging_face(raw))
        assert NAMES[name].parameters == sum(prod(t.shape) for t in tensors), name


@pytest.mark.skipif(not machine.resident_bytes(), reason="needs Linux to measure a process")
@pytest.mark.skipif(shutil.disk_usage("/tmp").free < GB, reason="needs room for a large file")
def test_converting_takes_what_was_said(tmp_path: Path) -> None:
    folder = zeros(tmp_path / "wide", shape(2048, 1, (16, 4), 8192, 2000))
    found = describe(folder).fit
    assert found is not None
    said = next(o.converting for o in found.options if o.scheme == "nl4")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "x.myai"), "nl4"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert abs(said / int(done.stdout) - 1) < 0.1, f"measured {int(done.stdout):,}, said {said:,}"


def test_what_is_converted_already_is_judged_as_a_source(
    demo_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`keep` leaves its codes as they are, and so takes as many bytes."""
    out = str(tmp_path / "again.myai")
    assert cli.main(["convert", str(demo_file), "--dry-run", "--json", "-o", out]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = {way["scheme"]: way["file_bytes"] for way in found["fit"]["options"]}
    assert found["scheme"] == "keep" and sizes["keep"] < sizes["int8"]
    assert cli.main(["convert", str(demo_file), "--fit", "-q", "-o", out]) == 0
    assert Path(out).stat().st_size == pytest.approx(demo_file.stat().st_size, rel=0.01)
