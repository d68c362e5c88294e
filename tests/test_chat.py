"""The chat in a terminal and over a pipe: turns, commands, Ctrl-C, saved conversations."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chalot.chat import chat, read_saved
from chalot.errors import FormatError, TokenizerError
from chalot.load import Model


def talk(demo_file: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "chalot.cli", "chat", str(demo_file), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_piped_conversation_repeats_with_its_seed(demo_file: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = f"Hello\nWhat does os.getcwd do?\n/stats\n/save {saved}\n"
    options = ("--seed", "3", "--max-tokens", "16", "--system", "Be brief.")
    first = talk(demo_file, lines, *options)
    assert first.returncode == 0 and first.stdout.strip()
    assert "prompt tokens" in first.stderr and "seed 3" in first.stderr
    assert talk(demo_file, lines, *options).stdout == first.stdout
    conversation = read_saved(saved)
    assert [m.role for m in conversation.messages] == ["system", *["user", "assistant"] * 2]
    again = talk(demo_file, f"/load {saved}\n/reset\n/help\n/nonsense\n/exit\n")
    assert "5 messages" in again.stderr and "/save FILE" in again.stderr
    assert "no command" in again.stderr and not again.stdout


def test_load_goes_on_where_it_was(demo_file: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    options = ("--seed", "5", "--max-tokens", "12")
    together = talk(demo_file, "Hello\nThanks\n", *options)
    talk(demo_file, f"Hello\n/save {saved}\n", *options)
    resumed = talk(demo_file, f"/load {saved}\nThanks\n")
    assert together.stdout.endswith(resumed.stdout) and resumed.stdout.strip()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({"format": 2, "version": "1", "model": "x", "options": {}, "messages": []}),
        json.dumps(
            {
                "format": 1,
                "version": "1",
                "model": "x",
                "options": {"temperature": -1},
                "messages": [],
            }
        ),
        json.dumps(
            {
                "format": 1,
                "version": "1",
                "model": "x",
                "options": {},
                "messages": [{"role": "assistant", "content": "first"}],
            }
        ),
    ],
)
def test_broken_saved_conversations_are_refused(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FormatError, match=r"talk\.json"):
        read_saved(path)


def test_a_missing_file_keeps_the_conversation(demo_file: Path) -> None:
    done = talk(demo_file, "/load /nowhere.json\n/save\nHello\n", "--max-tokens", "4")
    assert done.returncode == 0 and done.stderr.count("error: ") == 2 and done.stdout.strip()


def test_a_model_without_a_template_says_so(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "_templates", {})
    with pytest.raises(TokenizerError, match="no chat template"):
        chat(model)


def read_until(terminal: int, words: str, seconds: float = 60) -> str:
    """What the terminal shows until `words` are there."""
    shown, end = "", time.monotonic() + seconds
    while words not in shown:
        assert time.monotonic() < end, f"{words!r} never came: {shown!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 4096).decode("utf-8", "replace")
    return shown


def test_control_c_stops_the_answer_and_keeps_the_session(demo_file: Path, tmp_path: Path) -> None:
    """In a real terminal: an endless answer is stopped, then the next command still works."""
    code = (
        "import sys\n"
        "from chalot.load import Model\n"
        "def endless(self, messages, **options):\n"
        "    import time\n"
        "    while True:\n"
        "        yield 'word '\n"
        "        time.sleep(0.01)\n"
        "Model.stream_chat = endless\n"
        "from chalot.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    process, terminal = pty.fork()
    if process == 0:
        os.environ["CHALOT_HOME"] = str(tmp_path)
        os.execv(sys.executable, [sys.executable, "-c", code, "chat", str(demo_file)])
    try:
        read_until(terminal, "> ")
        os.write(terminal, b"tell me\r")
        read_until(terminal, "word word word")
        os.write(terminal, b"\x03")
        read_until(terminal, "(stopped)")
        os.write(terminal, b"/stats\r")
        read_until(terminal, "2 messages")
        os.write(terminal, b"/exit\r")
        for _ in range(300):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                break
            time.sleep(0.1)
        assert ended and os.waitstatus_to_exitcode(status) == 0
        process = 0
        assert "tell me" in (tmp_path / "chat_history").read_text()
    finally:
        os.close(terminal)
        if process:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
