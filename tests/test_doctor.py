"""doctor: every row there, never an exception, never a wait; what is wrong comes with a remedy."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chalot.doctor import DoctorReport, Row, doctor, render
from chalot.kernels import backend
from hub_server import HubServer

NAMES = {"chalot", "python", "platform", "instruction sets", "chosen", "threads", "memory"}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test asks the real hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("CHALOT_ISA", "CHALOT_THREADS"):
        monkeypatch.delenv(name, raising=False)
    yield


def row(report: DoctorReport, name: str) -> Row:
    return next(r for r in report.rows if r.name == name)


def test_every_row_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHALOT_HOME", str(tmp_path / "not" / "yet"))
    report = doctor()
    assert report.ok and {r.name for r in report.rows} >= NAMES | {"hub", "home", "packages"}
    assert all(r.state in ("ok", "warn", "bad") for r in report.rows)
    assert all(bool(r.remedy) == (r.state != "ok") for r in report.rows)
    assert "offline mode" in row(report, "hub").value
    assert str(tmp_path) in row(report, "home").value
    text = render(report)
    assert text.count("\n") + 1 == len(report.rows) + sum(bool(r.remedy) for r in report.rows)
    assert not (tmp_path / "not").exists()


def test_what_the_environment_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHALOT_ISA", "reference")
    monkeypatch.setenv("CHALOT_THREADS", "999")
    report = doctor()
    assert row(report, "chosen").value.startswith("reference")
    assert row(report, "threads").state == "warn" and "999" in row(report, "threads").value


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("CHALOT_ISA", "avx9", "chosen"),
        ("CHALOT_THREADS", "many", "threads"),
        ("CHALOT_THREADS", "0", "threads"),
        ("CHALOT_HOME", "/etc/passwd/x", "home"),
    ],
)
def test_what_is_wrong_is_a_row(
    variable: str, value: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    report = doctor()
    assert not report.ok
    assert row(report, name).state == "bad" and variable in row(report, name).remedy


def test_missing_extension_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "native", None)
    monkeypatch.setattr(backend, "MISSING", "no module")
    report = doctor()
    assert report.ok and row(report, "compiled kernels").state == "warn"
    assert row(report, "chosen").value.startswith("reference")


def test_a_hub_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer({}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        assert "answers" in row(doctor(), "hub").value


def test_a_hub_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as silent:  # takes a connection, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        found = row(doctor(hub_timeout=0.2), "hub")
        assert time.monotonic() - start < 5
        assert found.state == "warn" and "HF_ENDPOINT" in found.remedy
    assert row(doctor(hub_timeout=0.2), "hub").state == "warn"  # nobody listens any more
