"""The verb chat: what a person sees, what a pipe carries, what is saved and loaded."""

import codecs
import fcntl
import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from chalot.chat import MAX_SAVED, chat, read_saved
from chalot.errors import FormatError, OutputError, TokenizerError
from chalot.home import home
from talker import Talker


class Screen(io.StringIO):
    """Says that it is a terminal, where it is written to."""

    def isatty(self) -> bool:
        return self is sys.stdout


def test_a_conversation_goes_on_from_a_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept, model = tmp_path / "talk.session", Talker()
    talk(monkeypatch, model, "one", "/exit", seed=1, cache=kept)
    _, err = talk(monkeypatch, model, "two", seed=2, cache=kept)
    assert "(2 messages from" in err and "seed 2" in err  # what is asked for holds
    _, err = talk(monkeypatch, model, "three", cache=kept, system="Be brief")
    assert "seed 2" in err and "--system is not used" in err
    with pytest.raises(OutputError, match="cannot be written"):
        talk(monkeypatch, model, "four", cache=tmp_path / "none" / "talk.session")
    del model.heard[-1]
    assert [m["content"] for m in model.heard[-1][0]] == ["one", "you said one", "two"]


def talk(
    monkeypatch: pytest.MonkeyPatch, model: Talker, *lines: str, **options: Any
) -> tuple[str, str]:
    """What went to stdout and to stderr."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    chat(model, **options)
    return out.getvalue(), err.getvalue()


def test_answers_alone_go_to_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = talk(monkeypatch, Talker(), "Hello", "", "/help", "bye now", seed=7)
    assert out == "you said Hello\nyou said bye now\n"
    assert "seed 7" in err and "/reset" in err


def test_the_conversation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Talker()
    talk(monkeypatch, model, "a", "b", system="Be brief", seed=7, temperature=0.5, top_k=None)
    messages, options = model.heard[-1]
    roles = ["system", "user", "assistant", "user"]
    assert [message["role"] for message in messages] == roles
    assert [message["content"] for message in messages] == ["Be brief", "a", "you said a", "b"]
    assert options == {"seed": 7, "temperature": 0.5}


def test_a_seed_is_drawn_once_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Talker()
    _, err = talk(monkeypatch, model, "a", "b")
    seeds = {options["seed"] for _, options in model.heard}
    assert len(seeds) == 1 and f"seed {seeds.pop()}" in err


def test_reset_keeps_the_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Talker()
    talk(monkeypatch, model, "a", "/reset", "b", system="S")
    assert [message["content"] for message in model.heard[-1][0]] == ["S", "b"]


def test_a_line_may_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Talker()
    talk(monkeypatch, model, "one\\", "two\\", "three", "/exit", "never")
    assert model.heard[-1][0][-1]["content"] == "one\ntwo\nthree"
    assert len(model.heard) == 1


def test_unknown_commands_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Talker()
    out, err = talk(monkeypatch, model, "/etc/passwd", " /etc/passwd")
    assert "/etc/passwd is no command" in err
    assert not model.heard and not out


def test_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    _, err = talk(monkeypatch, Talker(), "a", "/stats", seed=9)
    assert "3 prompt tokens at 100.0/s, 4 new at 10.0/s, seed 9, 2 messages" in err


def test_a_model_without_a_template_is_told_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        talk(monkeypatch, Talker(template=None), "a")


def test_an_error_keeps_the_conversation_without_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Talker()
    out, err = talk(monkeypatch, model, "a", "bad \ud800", "b")
    assert "error: text: found half of a surrogate pair" in err
    assert [message["content"] for message in model.heard[-1][0]] == ["a", "you said a", "b"]
    assert out == "you said a\nyou said b\n"


def test_an_interrupted_answer_is_kept_as_far_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Talker()
    out, err = talk(monkeypatch, model, "interrupt me", "b")
    assert out == "you said\nyou said b\n" and "(stopped)" in err
    assert [m["content"] for m in model.heard[-1][0]] == ["interrupt me", "you said", "b"]


def test_answers_do_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\x1b[2J\x07 \x9b1A é 你"
    assert talk(monkeypatch, Talker(), text)[0] == f"you said {text}\n"
    monkeypatch.setattr(io, "StringIO", Screen)
    assert talk(monkeypatch, Talker(), text)[0] == "you said ␛[2J␇ \ufffd1A é 你\n"


# ---------------------------------------------------------------------------------- save and load


def test_load_undoes_save(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, model = tmp_path / "talk one.json", Talker()
    options = {"seed": 5, "temperature": 0.25, "stop": ("x", "y"), "max_tokens": 99}
    talk(monkeypatch, model, "á 你 👩‍👩‍👧", f"/save {path}", system="S", **options)
    again = Talker()
    _, err = talk(monkeypatch, again, f"/load {path}", "b", "/reset", "c", seed=1, top_k=3)
    heard = again.heard[0]
    contents = ["S", "á 你 👩‍👩‍👧", "you said á 你 👩‍👩‍👧", "b"]
    assert [message["content"] for message in heard[0]] == contents
    wanted = {"seed": 5, "temperature": 0.25, "stop": ["x", "y"], "max_tokens": 99, "top_k": 3}
    assert heard[1] == wanted
    assert [message["content"] for message in again.heard[1][0]] == ["S", "c"]
    assert "3 messages" in err and "seed 5" in err and "another model" not in err
    saved = json.loads(path.read_text())
    assert (saved["format"], saved["model"], saved["options"]["seed"]) == (1, "d1", 5)
    _, err = talk(monkeypatch, Talker(digest="d2"), f"/load {path}")
    assert "another model" in err


def test_saving_replaces_conversations_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "model.myai"
    path.write_bytes(b"IAYM\3\0\0\0")
    _, err = talk(monkeypatch, Talker(), "a", f"/save {path}")
    assert "of another kind" in err and path.read_bytes() == b"IAYM\3\0\0\0"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_is_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text("{old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    _, err = talk(
        monkeypatch, Talker(), "a", f"/save {path}", "/save", f"/save {tmp_path}/no/x.json"
    )
    assert path.read_text() == "{old" and list(tmp_path.iterdir()) == [path]
    assert "No space left" in err and "found no file name" in err and err.count("error:") == 3


GOOD: dict[str, Any] = {
    "format": 1,
    "version": "0",
    "model": "d1",
    "options": {"seed": 1},
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
}
HOSTILE = {
    "nothing": b"",
    "cut": json.dumps(GOOD).encode()[:-5],
    "no object": b"[]",
    "deep": b"[" * 1_000_000,
    "not utf-8": b'{"format": 1, "version": "\xff"}',
    "surrogate": json.dumps({**GOOD, "version": "X"}).replace("X", "\\ud800").encode(),
    "another format": json.dumps({**GOOD, "format": 2}).encode(),
    "no messages": json.dumps({k: v for k, v in GOOD.items() if k != "messages"}).encode(),
    "role": json.dumps({**GOOD, "messages": [{"role": "root", "content": "a"}]}).encode(),
    "content": json.dumps({**GOOD, "messages": [{"role": "user", "content": [1]}]}).encode(),
    "unanswered": json.dumps({**GOOD, "messages": GOOD["messages"][:1]}).encode(),
    "answers first": json.dumps({**GOOD, "messages": GOOD["messages"][::-1]}).encode(),
    "late system": json.dumps(
        {**GOOD, "messages": [*GOOD["messages"], {"role": "system", "content": ""}]}
    ).encode(),
    "seed": json.dumps({**GOOD, "options": {"seed": -1}}).encode(),
    "huge seed": json.dumps({**GOOD, "options": {"seed": 2**64}}).encode(),
    "nan": json.dumps({**GOOD, "options": {"temperature": float("nan")}}).encode(),
    "top_p": json.dumps({**GOOD, "options": {"top_p": 7}}).encode(),
    "stop": json.dumps({**GOOD, "options": {"stop": [""]}}).encode(),
    "long": b" " * (MAX_SAVED + 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_conversations_change_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, model = tmp_path / "talk.json", Talker()
    path.write_bytes(HOSTILE[name])
    with pytest.raises(FormatError, match=r"talk\.json"):
        read_saved(path)
    _, err = talk(monkeypatch, model, "a", f"/load {path}", "b")
    assert "error:" in err and len(model.heard[-1][0]) == 3


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FormatError, match="cannot be read"):
            read_saved(path)


# ------------------------------------------------------------------------------------------- home


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("CHALOT_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert home() == Path("/h/.cache/chalot")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert home() == Path("/h/.cache/chalot")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert home() == Path("/x/chalot")
    monkeypatch.setenv("CHALOT_HOME", "~/c")
    assert home() == Path("/h/c")
    monkeypatch.setenv("CHALOT_HOME", "")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError()))
    with pytest.raises(OutputError, match="CHALOT_HOME"):
        home()


# --------------------------------------------------------------------------------------- terminal


class Terminal:
    """A person at a terminal: types, and waits for what appears."""

    def __init__(self, kept: Path) -> None:
        self.main, side = pty.openpty()
        here = Path(__file__).parent
        paths = os.pathsep.join([*sys.path, str(here), str(here.parent / "src")])
        environment = {**os.environ, "CHALOT_HOME": str(kept), "PYTHONPATH": paths, "TERM": "dumb"}
        self.process = subprocess.Popen(
            [sys.executable, str(here / "talker.py")],
            stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(side)
        self.seen, self.decoder = "", codecs.getincrementaldecoder("utf-8")()

    def wait_for(self, text: str) -> str:
        """Read until `text` appears; what came before it."""
        while text not in self.seen:
            assert select.select([self.main], [], [], 60)[0], f"no {text!r} in {self.seen!r}"
            self.seen += self.decoder.decode(os.read(self.main, 4096))
        before, _, self.seen = self.seen.partition(text)
        return before

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.main)

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())

    def close(self, interrupt: bool = False) -> int:
        """Read to the end; with `interrupt`, press Ctrl-C whenever nothing comes.

        (One that arrives just before readline waits for a key is seen with the next key only.)
        """
        with suppress(OSError):  # the other side is gone
            while True:
                ready, _, _ = select.select([self.main], [], [], 0.2 if interrupt else 30)
                if ready:
                    self.seen += self.decoder.decode(os.read(self.main, 4096))
                else:
                    self.type("\x03")
        return self.process.wait(30)


def test_a_person_at_a_terminal(tmp_path: Path) -> None:
    with Terminal(tmp_path / "kept") as terminal:
        terminal.wait_for("/help lists commands")
        terminal.wait_for("> ")
        terminal.type("Xin chào\x7f\x7fào\n")  # edited with the backspace key
        terminal.wait_for("you said Xin chào\r\n")
        terminal.wait_for("> ")
        terminal.type("a \x1b[31m\x07 interrupt\n")
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
        terminal.type("/stats\n")
        terminal.wait_for("4 messages")
        terminal.wait_for("> ")
        assert terminal.close(interrupt=True) == 0
    assert "again leaves" in terminal.seen and "Traceback" not in terminal.seen
    history = tmp_path / "kept" / "chat_history"
    assert "Xin chào" in history.read_text() and history.stat().st_mode & 0o077 == 0


def test_the_end_of_input_leaves(tmp_path: Path) -> None:
    with Terminal(tmp_path / "kept") as terminal:
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.close() == 0


def test_a_history_that_cannot_be_kept_is_said(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file where a folder should be")
    with Terminal(tmp_path / "kept") as terminal:
        terminal.wait_for("> ")
        terminal.type("/exit\n")
        assert terminal.close() == 0
    assert "(line history not kept:" in terminal.seen
