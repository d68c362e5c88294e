"""`chalot replay`: what was saved comes out again, and what was changed is seen."""

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from chalot import cli
from chalot.errors import ChalotError, FormatError
from chalot.load import Model
from chalot.replay import replay


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """The command `chat` ends with Ctrl-C ignored, which in a process of tests must not stay."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


LINES = ("What does zip() do?", "And map()?")


def saved_chat(
    demo_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> Path:
    path = folder / "talk.json"
    monkeypatch.setattr(sys, "stdin", StringIO("\n".join([*LINES, f"/save {path}"])))
    assert cli.main(["chat", str(demo_file), "--max-tokens", "12", *options]) == 0
    return path


def change(path: Path, **changes: Any) -> Path:
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, **changes}), "utf-8")
    return path


@pytest.mark.parametrize(
    "options",
    [("--system", "Be short.", "--top-k", "0"), ("--kv", "f32"), ("--window", "20")],
)
def test_a_conversation(
    demo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, options: tuple
) -> None:
    path = saved_chat(demo_file, tmp_path, monkeypatch, *options)
    capsys.readouterr()
    assert cli.main(["replay", str(path), str(demo_file)]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 answers are the same: every byte came out again" in out


def test_a_changed_byte_is_seen(
    demo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    path = saved_chat(demo_file, tmp_path, monkeypatch)
    content = json.loads(path.read_text("utf-8"))
    said = content["messages"][-1]["content"]
    content["messages"][-1]["content"] = said[:3] + "§" + said[4:]
    path.write_text(json.dumps(content), "utf-8")
    capsys.readouterr()
    assert cli.main(["replay", str(path), str(demo_file), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [a["same"] for a in report["answers"]] == [True, False]
    assert report["answers"][1]["differs_at"] == len(said[:3].encode())
    assert cli.main(["replay", str(path), str(demo_file)]) == 1
    assert "differs at byte" in capsys.readouterr().out


def test_an_answer_that_was_stopped_is_whole_as_far_as_it_goes(
    demo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved_chat(demo_file, tmp_path, monkeypatch)
    content = json.loads(path.read_text("utf-8"))
    content["messages"][-1]["content"] = content["messages"][-1]["content"][:-2]
    path.write_text(json.dumps(content), "utf-8")
    report = replay(path, demo_file)
    assert report.ok and report.answers[-1].went_on


def test_answers_may_have_seeds_of_their_own(model: Model, tmp_path: Path) -> None:
    talk: list[dict[str, Any]] = []
    for seed, line in enumerate(LINES):
        talk.append({"role": "user", "content": line})
        text = model.chat([{"role": m["role"], "content": m["content"]} for m in talk],
                          seed=seed, max_tokens=9)  # fmt: skip
        talk.append({"role": "assistant", "content": text, "seed": seed})
    path = tmp_path / "page.json"
    saved = {"format": 1, "version": "page", "model": model.file.digest}
    path.write_text(json.dumps({**saved, "options": {"max_tokens": 9}, "messages": talk}))
    assert replay(path, model.file.path).ok


@pytest.mark.parametrize(
    "options",
    [
        ("--max-tokens", "20", "--seed", "-5"),
        ("--max-tokens", "30", "--stop", "e", "--temperature", "1.2", "--kv", "f16"),
        ("--context", "30"),
    ],
)
def test_a_run(demo_file: Path, tmp_path: Path, capsys, options: tuple[str, ...]) -> None:
    assert cli.main(["run", str(demo_file), "def f(a):", "--json", *options]) == 0
    path = tmp_path / "run.json"
    path.write_text(capsys.readouterr().out)
    assert cli.main(["replay", str(path), str(demo_file)]) == 0
    assert "1 of 1" in capsys.readouterr().out
    text = json.loads(path.read_text())["text"]
    for other in (text[:-1], text + "x"):
        assert not replay(change(path, text=other), demo_file).ok


def test_the_model_is_found_by_its_digest(
    demo_file: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHALOT_HOME", str(tmp_path / "home"))
    assert cli.main(["run", str(demo_file), "def f", "--json", "--max-tokens", "3"]) == 0
    path = tmp_path / "run.json"
    path.write_text(capsys.readouterr().out)
    assert cli.main(["replay", str(path)]) == 1
    assert "no converted model has the digest" in capsys.readouterr().err
    (tmp_path / "home" / "models").mkdir(parents=True, exist_ok=True)
    (tmp_path / "home" / "models" / "broken.myai").write_bytes(b"chalot")
    shutil.copy(demo_file, tmp_path / "home" / "models" / "demo-nl4.myai")
    assert cli.main(["replay", str(path)]) == 0


def test_another_model_is_refused(demo_files: dict[str, Path], tmp_path: Path, capsys) -> None:
    assert cli.main(["run", str(demo_files["int8"]), "def f", "--json", "--max-tokens", "3"]) == 0
    path = tmp_path / "run.json"
    path.write_text(capsys.readouterr().out)
    with pytest.raises(FormatError, match="was made with a model file of digest"):
        replay(path, demo_files["nl4"])


RUN = {"prompt": "a", "text": "b", "digest": "0" * 64, "options": {}, "max_tokens": None,
       "stop": [], "context": 9, "kv": "int8"}  # fmt: skip
ANSWER = {"object": "chat.completion", "seed": 1, "system_fingerprint": "0" * 64}
CHAT = {"format": 1, "version": "1", "model": "0" * 64, "options": {}, "messages": []}
BAD: list[tuple[Any, str]] = [
    (b"", "not JSON|JSON"),
    (b"\xff\xfe", "UTF-8"),
    (b"[" * 100_000, "nest|JSON"),
    ([], "is no transcript"),
    ({"messages": []}, "is no transcript"),
    ({"prompt": "a", "text": "b"}, "expected what `chalot run --json` prints"),
    ({**RUN, "kv": "f64"}, "kv"),
    ({**RUN, "stop": "x"}, "stop"),
    ({**RUN, "digest": "../../x"}, "expected a digest"),
    ({**RUN, "options": {"temperature": 1e9}}, "temperature"),
    ({"request": [], "response": {}}, "two objects"),
    ({"request": {}, "response": {"object": "list"}}, "expected one of chat.completion"),
    ({"request": {"stream": True}, "response": ANSWER}, "stream"),
    ({"request": {}, "response": {"object": "response", "seed": 1}}, "no system_fingerprint"),
    ({**CHAT, "model": ""}, "expected a digest"),
    ({**CHAT, "format": 2}, "expected a conversation"),
    ({**CHAT, "kv": 3}, "expected a conversation"),
]


@pytest.mark.parametrize(("content", "text"), BAD)
def test_what_is_no_transcript(tmp_path: Path, capsys, content: Any, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ChalotError, match=text):
        replay(path, tmp_path / "no.myai")
    assert cli.main(["replay", str(path)]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "no.json", tmp_path):
        with pytest.raises(FormatError):
            replay(path)


def test_no_answers_are_no_success(demo_file: Path, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**CHAT, "model": model.file.digest}))
    with pytest.raises(FormatError, match="holds no answer"):
        replay(path, demo_file)


# ---- of a server


@pytest.fixture
def exchange(model: Model) -> Any:
    """(path, request) -> a transcript, answered by the server."""
    for needed in ("starlette", "uvicorn", "llguidance", "prometheus_client"):
        pytest.importorskip(needed, reason="the extra `serve` is not installed")
    import asyncio

    from chalot.serve.inside import answer

    def ask(path: str, request: dict[str, Any]) -> dict[str, Any]:
        response = asyncio.run(answer(model, path, request, "demo"))
        return {"request": request, "response": response}

    return ask


@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.parametrize(
    ("path", "request_"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LINES[0]}], "n": 2,
                                  "model": "demo", "max_tokens": 9, "logprobs": True}),
        ("/v1/completions", {"prompt": "import ", "max_tokens": 9, "logprobs": 2, "echo": True}),
        ("/v1/responses", {"input": LINES[1], "max_output_tokens": 9}),
    ],
)  # fmt: skip
def test_an_answer_of_a_server(
    exchange: Any, demo_file: Path, tmp_path: Path, path: str, request_: dict[str, Any]
) -> None:
    made = exchange(path, request_)
    file = tmp_path / "x.json"
    file.write_text(json.dumps(made))
    report = replay(file, demo_file)
    assert report.ok and report.kind == "server" and report.answers[0].bytes > 100
    text = json.dumps(made["response"])
    at = next(i for i in range(len(text)) if text.startswith('"text": "', i) or
              text.startswith('"content": "', i))  # fmt: skip
    at = text.index(': "', at) + 3
    made["response"] = json.loads(text[:at] + "#" + text[at:])
    file.write_text(json.dumps(made))
    assert not replay(file, demo_file).ok


def test_a_server_needs_its_extra(
    demo_file: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "chalot.serve.inside", None)
    path = tmp_path / "x.json"
    response = {**ANSWER, "system_fingerprint": model.file.digest}
    path.write_text(json.dumps({"request": {}, "response": response}))
    with pytest.raises(ChalotError, match=r"chalot\[serve\]"):
        replay(path, demo_file)


def test_several_answers_of_a_run(
    demo_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", str(demo_file), "def f(", "-n", "2", "--choice", "1", "--max-tokens", "9"]
    assert cli.main([*run, "--json", "--seed", "4"]) == 0
    path = tmp_path / "n.json"
    path.write_text(capsys.readouterr().out)
    assert cli.main(["replay", str(path), str(demo_file)]) == 0
    changed = json.loads(path.read_text())
    changed["answers"][1]["text"] += "x"
    path.write_text(json.dumps(changed))
    assert cli.main(["replay", str(path), str(demo_file)]) == 1
