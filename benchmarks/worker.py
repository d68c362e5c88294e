"""A side of a benchmark in a process of its own, which answers one request at a time over pipes.

Sides that take turns must not share cores: while one measures, the others sit in a blocking read.
Messages are JSON lines. A side first says what it is ({"ready": ...}), then answers each request
with one reply; {"error": ...} ends it. Its stdout belongs to the protocol, and whatever libraries
print goes to a log file beside the model.
"""

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
