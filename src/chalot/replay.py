"""The verb `replay`: whether the answers in a saved transcript come out again, to the last byte.

A transcript is a conversation that chat's /save or the chat page wrote, what `run --json` printed,
or `{"request": ..., "response": ...}`: the bodies of a request to `chalot serve` and of its answer.
Each names the model file by its digest, and the seed. What need not come again is not compared:
ids, times, and how much of a prompt was in the server's cache.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from chalot.chat import MAX_SAVED, Options, Saved, read_saved
from chalot.errors import ChalotError, FormatError, UnsupportedError, one_line
from chalot.formats.documents import parse_json
from chalot.formats.files import open_regular, quoted
from chalot.formats.myai import MyaiFile
from chalot.load import Model
from chalot.shelf import kept

PATHS = {  # what an answer says it is -> where it came from
    "chat.completion": "/v1/chat/completions",
    "text_completion": "/v1/completions",
    "response": "/v1/responses",
}
PASSING = {"id", "created", "created_at", "completed_at", "item_id", "call_id", "usage", "metrics"}


class RunOptions(Options, omit_defaults=True):
    """Options of `run`, whose seeds may be below 0."""

    choice: Annotated[int, msgspec.Meta(ge=0, le=2**32)] | None = None
    window: int | None = None
    sinks: int | None = None

    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None


class RunChoice(msgspec.Struct):
    """One of several answers."""

    choice: int
    text: str


class RunAnswer(msgspec.Struct):
    """What `run --json` prints: a text, or with -n several answers."""

    prompt: str
    digest: str
    options: RunOptions
    max_tokens: int | None
    stop: list[str]
    context: int
    kv: Literal["int8", "f16", "f32"]
    text: str = ""
    answers: list[RunChoice] = []


@dataclass(frozen=True)
class Again:
    """An answer that was computed again. `differs_at` is the first byte that is another one."""

    number: int
    bytes: int  # of the saved answer
    same: bool
    differs_at: int | None = None
    saved: str = ""  # what stands there
    found: str = ""  # and what came out
    went_on: bool = False  # the saved answer was stopped by hand; it would have gone on


@dataclass(frozen=True)
class ReplayReport:
    """Every answer of a transcript."""

    file: str
    kind: str  # "chat", "run" or "server"
    model: str
    digest: str
    answers: tuple[Again, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte came out again."""
        return all(answer.same for answer in self.answers)


@dataclass(frozen=True)
class Transcript:
    """A file's content: which model it asks for, how that was opened, and what is in it."""

    kind: str
    digest: str
    content: Any
    kv: str | None = None
    context: int | None = None
    window: int | None = None
    sinks: int | None = None


def replay(path: str | Path, model: str | Path | None = None, **options: Any) -> ReplayReport:
    """Compute a transcript's answers again. `options` are those of `chalot.load`.

    Without `model` the file is looked for by its digest among the converted models in CHALOT_HOME.
    Raises FormatError for what is no transcript, or a model that it was not made with;
    UnsupportedError where the extra `serve` is missing.
    """
    path = Path(path).expanduser()
    found = read_transcript(path)
    file = model_with(found.digest) if model is None else Path(model).expanduser()
    names = ("kv", "context", "window", "sinks")
    given: dict[str, Any] = {name: getattr(found, name) for name in names}
    given |= {name: value for name, value in options.items() if value is not None}
    given = {name: value for name, value in given.items() if value is not None}
    with Model(file, **given) as opened:
        if opened.file.digest != found.digest:
            raise FormatError(
                f"{path}: was made with a model file of digest {found.digest[:16]}..., and {file} "
                f"has {opened.file.digest[:16]}...; give the file that it was made with"
            )
        answers = tuple(AGAIN[found.kind](opened, found.content))
    if not answers:
        raise FormatError(f"{path}: holds no answer; expected one at least")
    return ReplayReport(str(path), found.kind, str(file), found.digest, answers)


def read_transcript(path: Path) -> Transcript:
    """A transcript of any kind. Raises FormatError."""
    with open_regular(path, path) as file:
        raw = file.read(MAX_SAVED + 1)
    if len(raw) > MAX_SAVED:
        raise FormatError(f"{path}: found more than {MAX_SAVED:,} bytes; not a transcript")
    content = parse_json(raw, path)
    keys = content.keys() if isinstance(content, dict) else set()
    if {"format", "messages"} <= keys:
        saved = read_saved(path)
        how = saved.kv, saved.context, saved.window, saved.sinks
        return Transcript("chat", _digest(saved.model, path), saved, *how)
    if "prompt" in keys and keys & {"text", "answers"}:
        try:
            run = msgspec.convert(content, RunAnswer)
        except msgspec.ValidationError as error:
            raise FormatError(
                f"{path}: {one_line(error)}; expected what `chalot run --json` prints"
            ) from None
        how = run.kv, run.context, run.options.window, run.options.sinks
        return Transcript("run", _digest(run.digest, path), run, *how)
    if {"request", "response"} <= keys:
        return _exchange(content, path)
    raise FormatError(
        f"{path}: is no transcript; expected a conversation that /save wrote, what "
        '`chalot run --json` printed, or {"request": ..., "response": ...} of a server'
    )


def _exchange(content: dict[str, Any], path: Path) -> Transcript:
    request, response = content["request"], content["response"]
    if not (isinstance(request, dict) and isinstance(response, dict)):
        raise FormatError(f"{path}: request and response: expected two objects")
    kind = response.get("object")
    if kind not in tuple(PATHS):  # which may be no text
        known = ", ".join(PATHS)
        raise FormatError(f"{path}: response: found {quoted(kind)}, expected one of {known}")
    if request.get("stream"):
        raise FormatError(f"{path}: request: is for a stream; expected one for a whole answer")
    for name in ("seed", "system_fingerprint"):
        if name not in response:
            raise FormatError(f"{path}: response: has no {name}; expected one of `chalot serve`")
    return Transcript("server", _digest(response["system_fingerprint"], path), content)


def _digest(found: Any, path: Path) -> str:
    if not (isinstance(found, str) and len(found) == 64 and found.isalnum()):
        raise FormatError(f"{path}: names its model {quoted(found)}, expected a digest")
    return found


def model_with(digest: str) -> Path:
    """The converted model in CHALOT_HOME with that digest. Raises FormatError if there is none."""
    for one in kept():
        with suppress(ChalotError, OSError), closing(MyaiFile(Path(one.path))) as file:
            if file.digest == digest:
                return file.path
    raise FormatError(
        f"no converted model has the digest {digest[:16]}...; name the .myai file after the "
        "transcript"
    )


# ---- the answers of each kind


def _chat(model: Model, saved: Saved) -> Iterator[Again]:
    options = msgspec.to_builtins(saved.options)
    messages = [msgspec.to_builtins(m) for m in saved.messages]
    number = 0
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        number += 1
        given = options | {"seed": message["seed"]} if "seed" in message else options
        before = [{"role": m["role"], "content": m["content"]} for m in messages[:at]]
        said: str = message["content"]
        # an answer that Ctrl-C stopped is whole as far as it goes
        yield compared(number, said, model.chat(before, **given), stopped=True)


def _run(model: Model, run: RunAnswer) -> Iterator[Again]:
    options = msgspec.to_builtins(run.options) | {"max_tokens": run.max_tokens, "stop": run.stop}
    options = {name: value for name, value in options.items() if name not in ("window", "sinks")}
    for answer in run.answers or [RunChoice(options.get("choice", 0), run.text)]:
        text = model.generate(run.prompt, **options | {"choice": answer.choice})
        yield compared(answer.choice + 1, answer.text, text)


def _server(model: Model, content: dict[str, Any]) -> Iterator[Again]:
    try:
        from chalot.serve.inside import answer
    except ImportError as error:
        raise UnsupportedError(
            f"an answer of a server needs {error.name} to be computed again; install it: "
            'pip install "chalot[serve]"'
        ) from None
    request, response = content["request"], content["response"]
    path = PATHS[response["object"]]
    name = response.get("model")
    body = {key: value for key, value in request.items() if key != "model"}
    body["seed"] = response["seed"]
    found = asyncio.run(answer(model, path, body, name if isinstance(name, str) else "chalot"))
    yield compared(1, lasting_text(response), lasting_text(found))


AGAIN: dict[str, Callable[[Model, Any], Iterator[Again]]] = {
    "chat": _chat,
    "run": _run,
    "server": _server,
}


def lasting_text(answer: Any) -> str:
    """An answer of a server as text, without what need not come again."""
    return json.dumps(_lasting(answer), ensure_ascii=False, sort_keys=True)


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(v) for key, v in value.items() if key not in PASSING}
    return [_lasting(v) for v in value] if isinstance(value, list) else value


def compared(number: int, saved: str, found: str, stopped: bool = False) -> Again:
    """What is said of an answer and what came out; one that was `stopped` may go on."""
    a, b = saved.encode("utf-8", "surrogatepass"), found.encode("utf-8", "surrogatepass")
    if a == b:
        return Again(number, len(a), True)
    if stopped and b.startswith(a):
        return Again(number, len(a), True, went_on=True)
    at = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    here, there = (part[at : at + 24].decode("utf-8", "replace") for part in (a, b))
    return Again(number, len(a), False, at, here, there)


def render(report: ReplayReport) -> str:
    """The report as text."""
    lines = []
    for answer in report.answers:
        said = f"answer {answer.number}: {answer.bytes:,} bytes, "
        if answer.same:
            said += "the same" + (" (it was stopped there)" if answer.went_on else "")
        else:
            said += (
                f"differs at byte {answer.differs_at:,}: saved {answer.saved!r}, "
                f"found {answer.found!r}"
            )
        lines.append(said)
    same = sum(answer.same for answer in report.answers)
    whole = "every byte came out again" if report.ok else "not every byte came out again"
    lines.append(f"{same} of {len(report.answers)} answers are the same: {whole}")
    return "\n".join(lines)
