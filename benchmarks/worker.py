"""A side of a benchmark in a process of its own, which answers one request at a time over pipes.

Sides that take turns must not share cores: while one measures, the others sit in a blocking read.
Messages are JSON lines. A side first says what it is ({"ready": ...}), then answers each request
with one reply; {"error": ...} ends it. Its stdout belongs to the protocol, and whatever libraries
print goes to a log file beside the model.

    request  "prompt": ids; "tokens": ids to decode after it, one at a time, or "step" at a time
             (of sides that know how); "fresh": read the prompt from empty, though it is held
    reply    "prefill_seconds": of reading the prompt, null where the side held it already;
             "seconds": of each step; "host_seconds": of each, what is not in it (may be left out)
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Message = dict[str, Any]
HERE = Path(__file__).resolve().parent


class WorkerError(RuntimeError):
    """A side could not start or stopped; names its log."""


class Worker:
    """The caller's end: `with Worker(name, command, log) as side: side.ask(request)`."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True,
            )  # fmt: skip
        try:
            self.ready: Message = self._reply()["ready"]
        except WorkerError:
            self.close()
            raise

    def ask(self, request: Message) -> Message:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # the missing reply is reported with the log
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._reply()

    def resident_bytes(self) -> int | None:
        """Memory of the side's process that is in RAM now, file pages included."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except OSError:
            return None
        return pages * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate(timeout=60)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reply(self) -> Message:
        assert self.process.stdout
        line = self.process.stdout.readline()
        reply: Message = json.loads(line) if line else {"error": "stopped without a word"}
        if "error" in reply:
            raise WorkerError(f"{self.name}: {reply['error']}; its log is {self.log}")
        return reply


def protocol_stdout() -> Callable[[Message], None]:
    """Keep the real stdout for replies and send everything else that is printed to stderr."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda message: print(json.dumps(message), file=channel)


def serve(start: Callable[[], tuple[Message, Callable[[Message], Message]]]) -> None:
    """The side's end: `start()` gives what it is and a function from request to reply."""
    reply = protocol_stdout()
    try:
        ready, answer = start()
        reply({"ready": ready})
        for line in sys.stdin:
            reply(answer(json.loads(line)))
    except Exception as problem:
        reply({"error": f"{type(problem).__name__}: {problem}"})
        raise


def side_arguments(text: str, makes: bool = True) -> argparse.ArgumentParser:
    """The command line that all sides share; `--context` is the most tokens that will be held."""
    parser = argparse.ArgumentParser(description=text)
    verbs = parser.add_subparsers(dest="verb", required=True)
    if makes:
        making = verbs.add_parser("make")
        making.add_argument("folder", type=Path, help="a Hugging Face folder")
        making.add_argument("out", type=Path)
        making.add_argument("form")
    serving = verbs.add_parser("serve")
    serving.add_argument("model", type=Path)
    serving.add_argument("--threads", type=int, default=2)
    serving.add_argument("--context", type=int, default=64)
    serving.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                         help="an option of that side")  # fmt: skip
    return parser


def offline() -> dict[str, str]:
    """The environment, with downloads switched off: everything is made from the checkpoint."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}
