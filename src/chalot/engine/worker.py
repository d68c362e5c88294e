"""A thread that runs a scheduler for as long as there is something to do, and sleeps otherwise."""

import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from chalot.engine.scheduler import Scheduler
from chalot.errors import ChalotError, KernelError, LimitError

Result = TypeVar("Result")


def as_chalot_error(error: Exception) -> ChalotError:
    """What a request is told of an error that nobody has foreseen."""
    if isinstance(error, ChalotError):
        return error
    if isinstance(error, MemoryError):
        return LimitError("out of memory in mid-pass; fewer slots or a smaller --context help")
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "nowhere"
    return KernelError(f"the scheduler failed: {type(error).__name__} at {where}; report it")


class Worker:
    """Runs `scheduler.run_once()` in one thread from `start()` to `stop()`.

    `guard` is held during each pass, for an engine that others use too.
    """

    def __init__(
        self, scheduler: Scheduler, guard: AbstractContextManager[object] | None = None
    ) -> None:
        self.scheduler = scheduler
        self.guard = guard or nullcontext()
        self._wake = threading.Event()
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="chalot-scheduler", daemon=True)
        scheduler.woken = self._wake.set

    def start(self) -> "Worker":
        """Begin; returns itself."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End after the pass that runs; requests that are not finished are cancelled."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run a function in the worker's thread, between two passes."""
        future: Future[Any] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        self._calls.put(run)
        self._wake.set()
        return future

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            with self.guard:
                try:
                    busy = self._run_calls() or self.scheduler.run_once()
                except Exception as error:  # a fault of chalot's own: who waits must hear of it
                    self.scheduler.fail_all(as_chalot_error(error))
                    busy = False
            if not busy:
                self._wake.wait()
        with self.guard:
            self._run_calls()
            self.scheduler.close()

    def _run_calls(self) -> bool:
        ran = False
        while True:
            try:
                run = self._calls.get_nowait()
            except Empty:
                return ran
            run()
            ran = True

    def __enter__(self) -> "Worker":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
