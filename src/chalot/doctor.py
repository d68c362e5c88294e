"""The verb `doctor`: what this machine has, what chalot makes of it, and what would help.

Never raises and never hangs: what cannot be found out is a row that says so, and the hub has three
seconds to answer.
"""

import importlib.metadata
import os
import platform
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from chalot import __version__, machine
from chalot.errors import ChalotError
from chalot.home import home
from chalot.kernels import backend
from chalot.table import size

HUB_TIMEOUT = 3.0  # seconds
LITTLE_MEMORY, LITTLE_DISK = 1_000_000_000, 5_000_000_000  # bytes; below, a row warns
NEEDED = ("numpy", "msgspec", "tokenizers", "huggingface_hub", "jinja2", "rich")
OPTIONAL = {"torch": "tools/train_demo_model.py", "transformers": "tests/parity_live.py"}
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Row:
    """One finding. `state` is "ok", "warn" or "bad"; `remedy` is what would help, or ""."""

    name: str
    value: str
    state: str = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """All findings. `ok` is whether none is bad: chalot runs here."""

    ok: bool
    rows: tuple[Row, ...]


def doctor(hub_timeout: float = HUB_TIMEOUT) -> DoctorReport:
    """Look at versions, kernels, threads, memory, disk, hub and packages."""
    checks: tuple[Callable[[], Iterator[Row]], ...] = (
        _versions,
        _kernels,
        _threads,
        _memory,
        _huge_pages,
        _disk,
        lambda: _hub(hub_timeout),
        _packages,
    )
    rows: list[Row] = []
    for check in checks:
        try:
            rows += check()
        except (ChalotError, OSError, ValueError) as error:
            name = check.__name__.strip("_<>").replace("_", " ")
            rows.append(
                Row("hub" if name == "lambda" else name, "cannot be found out", "warn", str(error))
            )
    return DoctorReport(all(row.state != "bad" for row in rows), tuple(rows))


def _versions() -> Iterator[Row]:
    yield Row("chalot", f"{__version__}, in {Path(__file__).parent}")
    yield Row("python", f"{platform.python_implementation()} {platform.python_version()}")
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    libc = " ".join(platform.libc_ver()).strip()
    yield Row("platform", f"{system}, {libc}" if libc else system)
    yield Row("processor", _processor())


def _processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _kernels() -> Iterator[Row]:
    if backend.MISSING is None:
        yield Row("compiled kernels", "there")
    else:
        yield Row(
            "compiled kernels",
            f"missing ({backend.MISSING}); numpy computes, far slower",
            "warn",
            "reinstall chalot with a C++20 compiler at hand: pip install --force-reinstall chalot",
        )
    shown = [name if runs else f"({name})" for name, runs in backend.instruction_sets()]
    note = "; in brackets: not on this processor" if "(" in "".join(shown) else ""
    yield Row("instruction sets", ", ".join(shown) + note)
    forced = os.environ.get("CHALOT_ISA")
    by = f"by CHALOT_ISA={forced}" if forced else "the best that runs; CHALOT_ISA forces another"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the row above says it
            yield Row("chosen", f"{backend.open_backend(threads=1).name}, {by}")
    except ChalotError as error:
        yield Row("chosen", f"none, {by}", "bad", f"{error}; or unset CHALOT_ISA")


def _threads() -> Iterator[Row]:
    allowed, cores, quota = machine.allowed_cpus(), machine.physical_cores(), machine.cpu_quota()
    yield Row(
        "processors",
        f"{len(allowed)} allowed of {os.cpu_count()}, {cores} cores, "
        + ("no quota" if quota is None else f"a quota of {quota:.1f}"),
    )
    given = os.environ.get("CHALOT_THREADS")
    by = f"by CHALOT_THREADS={given}" if given else "CHALOT_THREADS or --threads sets another"
    try:
        count = backend.thread_count(None)
    except ChalotError as error:
        yield Row("threads", f"none, {by}", "bad", f"{error}; or unset CHALOT_THREADS")
        return
    able = machine.default_threads()
    if count > able:
        yield Row("threads", f"{count}, {by}", "warn", f"more than {able} wait for each other")
    else:
        yield Row("threads", f"{count}, {by}")


def _memory() -> Iterator[Row]:
    total, free, limit = machine.memory_total(), machine.memory_available(), machine.memory_limit()
    if free is None or total is None:
        yield Row("memory", "the system does not say", "warn", "give --context to bound the cache")
        return
    bound = "" if limit is None else f"; a control group grants {size(limit)}"
    value = f"{size(free)} free of {size(total)}{bound}"
    if free < LITTLE_MEMORY:
        yield Row("memory", value, "warn", "close other programs, or use a smaller --context")
    else:
        yield Row("memory", value)


def _huge_pages() -> Iterator[Row]:
    try:
        text = HUGE_PAGES.read_text()
    except OSError:
        yield Row("large pages", "the system does not say")
        return
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen == "never":
        yield Row(
            "large pages", "never", "warn", f"decoding is slower; echo madvise > {HUGE_PAGES}"
        )
    else:
        yield Row("large pages", chosen or text.strip())


def _disk() -> Iterator[Row]:
    folder = home()
    nearest = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
    value = f"{folder}, {size(machine.disk_free(folder))} free"
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        yield Row("home", value, "bad", f"{nearest} cannot be written; set CHALOT_HOME")
    elif machine.disk_free(folder) < LITTLE_DISK:
        yield Row("home", value, "warn", "little room for models; set CHALOT_HOME to another disk")
    else:
        yield Row("home", value)


def _hub(timeout: float) -> Iterator[Row]:
    from huggingface_hub import constants

    where = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        yield Row("hub", f"{where} is not asked: offline mode (HF_HUB_OFFLINE)")
        return
    answer: list[int | Exception] = []
    # in a thread of its own: looking up a name may take longer than any timeout
    asking = threading.Thread(target=_ask, args=(where, timeout, answer), daemon=True)
    asking.start()
    asking.join(timeout + 0.5)
    help_ = "check the network, HTTPS_PROXY and HF_ENDPOINT; files that are here need no hub"
    if not answer:
        yield Row("hub", f"{where} did not answer in {timeout:g} s", "warn", help_)
    elif isinstance(answer[0], Exception):
        what = str(answer[0]).partition("\n")[0][:120] or type(answer[0]).__name__
        yield Row("hub", f"{where} cannot be reached ({what})", "warn", help_)
    elif answer[0] >= 500:
        yield Row("hub", f"{where} answers {answer[0]}", "warn", "try again later")
    else:
        token = "a token is set" if _has_token() else "no token, so no gated models"
        yield Row("hub", f"{where} answers; {token}")


def _ask(where: str, timeout: float, answer: list[int | Exception]) -> None:
    """Append the status of the hub's answer, or what stood in its way."""
    try:
        utils: Any = import_module("huggingface_hub.utils")
        answer.append(int(utils.get_session().head(where, timeout=timeout).status_code))
    except Exception as error:  # of httpx or requests, whichever stands behind the session
        answer.append(error)


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _packages() -> Iterator[Row]:
    found, missing = [], []
    for name in NEEDED:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Row("packages", ", ".join(found))
    if missing:
        names = " ".join(missing)
        yield Row("missing packages", names, "bad", f"pip install {names}")
    for name, use in OPTIONAL.items():
        try:
            value = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            value = "not installed"
        yield Row(name, f"{value}; only for {use}")


def render(report: DoctorReport) -> str:
    """The report as text: a line for each row, its remedy under it."""
    width = max(len(row.name) for row in report.rows)
    lines = []
    for row in report.rows:
        lines.append(f"{row.state:4}  {row.name.ljust(width)}  {row.value}")
        if row.remedy:
            lines.append(f"{'':4}  {'':{width}}  -> {row.remedy}")
    return "\n".join(lines)
