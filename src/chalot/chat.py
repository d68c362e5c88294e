"""The verb `chat`: a conversation in a terminal, or over a pipe, by the model's own chat template.

Answers go to stdout, all else to stderr. Ctrl-C stops an answer and keeps what was said; at the
prompt, twice leaves. Lines are edited with readline, and kept in `chat_history` in CHALOT_HOME.
"""

import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec

from chalot.errors import ChalotError, FormatError, OutputError, one_line
from chalot.formats.files import whole_file
from chalot.home import home
from chalot.model.window import Window
from chalot.table import printable

HELP = """\
/reset      forget the conversation (the system message stays)
/save FILE  write the conversation as JSON
/load FILE  go on with a saved one
/stats      tokens and speed of the last answer
/exit       leave (so do Ctrl-D, and Ctrl-C twice)
Ctrl-C stops an answer. A line that ends with \\ goes on in the next."""
HISTORY_LINES = 1000
NOTHING: Mapping[str, Any] = {}
MAX_SAVED = 16_000_000  # bytes of a saved conversation

# A model's text must not steer the terminal: control characters are shown as their pictures.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Stats(Protocol):
    """What the last answer took."""

    prompt_tokens: int
    new_tokens: int
    seed: int | None

    @property
    def prefill_tokens_per_second(self) -> float: ...

    @property
    def tokens_per_second(self) -> float: ...

    @property
    def drafting(self) -> str: ...


class File(Protocol):
    digest: str


class Talker(Protocol):
    """What `chat` asks of a model; `chalot.Model` is one."""

    kv: Any
    context: int
    window: Window

    @property
    def tokenizer(self) -> Any: ...

    @property
    def file(self) -> File: ...

    @property
    def last_stats(self) -> Stats: ...

    @property
    def reports(self) -> Mapping[str, object]: ...

    def stream_chat(self, messages: list[dict[str, str]], **options: Any) -> Iterator[str]: ...

    def load_talk(self, path: Path) -> bytes: ...

    def save_talk(self, path: Path, note: bytes) -> None: ...


class Message(msgspec.Struct, omit_defaults=True):
    """One turn; an answer may have a seed of its own."""

    role: Literal["system", "user", "assistant"]
    content: str
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None


class Options(msgspec.Struct, omit_defaults=True):
    """Sampling options that are saved with a conversation; None is the model's own."""

    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    repetition_window: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] | None = None
    stop: list[Annotated[str, msgspec.Meta(min_length=1)]] | None = None


class Saved(msgspec.Struct):
    """A conversation on disk. `model` is the digest of the file that it was held with."""

    format: Literal[1]
    version: str
    model: str
    options: Options
    messages: Annotated[list[Message], msgspec.Meta(max_length=100_000)]
    kv: Literal["int8", "f16", "f32"] = "int8"  # type of the cache, and most tokens in it
    context: Annotated[int, msgspec.Meta(ge=1)] | None = None
    window: Annotated[int, msgspec.Meta(ge=1)] | None = None
    sinks: Annotated[int, msgspec.Meta(ge=0)] | None = None


def read_saved(path: Path) -> Saved:
    """A saved conversation. Raises FormatError if the file is not one, or cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SAVED + 1)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from None
    return parse_saved(content, path)


def parse_saved(content: bytes, path: Path) -> Saved:
    """A conversation out of what a file holds. Raises FormatError if it is none."""
    try:
        if len(content) > MAX_SAVED:
            raise FormatError(f"{path}: found more than {MAX_SAVED:,} bytes; not a conversation")
        saved = msgspec.json.decode(content, type=Saved)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(
            f"{path}: {one_line(error)}; expected a conversation that /save wrote"
        ) from None
    turns = [message.role for message in saved.messages if message.role != "system"]
    systems = [i for i, message in enumerate(saved.messages) if message.role == "system"]
    if systems not in ([], [0]) or turns != ["user", "assistant"] * (len(turns) // 2):
        raise FormatError(
            f"{path}: found turns {' '.join(turns[:6])} ..., expected user and assistant in turn, "
            "with a system message at most before them"
        )
    return saved


def say(*words: object) -> None:
    """A line for the person at the terminal."""
    print(*(printable(str(word)) for word in words), file=sys.stderr, flush=True)


class Chat:
    """A conversation and the commands that work on it."""

    def __init__(self, model: Talker, system: str | None, options: dict[str, Any]) -> None:
        self.model = model
        self.given = {name: value for name, value in options.items() if value is not None}
        self.options = {"seed": secrets.randbits(32)} | self.given
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.system)
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: say(HELP),
            "/reset": self.reset,
            "/save": self.save,
            "/load": self.load,
            "/stats": self.stats,
        }

    def reset(self, _: str = "") -> None:
        """Forget everything but the system message."""
        self.messages = list(self.system)
        say("(conversation forgotten)")

    def save(self, argument: str) -> None:
        """Write the conversation, whole or not at all."""
        path = _path(argument, "/save")
        with whole_file(path, b"{") as file:
            file.write(msgspec.json.format(self.saved(), indent=1) + b"\n")
        say(f"(saved to {path})")

    def saved(self) -> bytes:
        """The conversation and its options as JSON."""
        options = {name: self.options.get(name) for name in Options.__struct_fields__}
        if options["stop"] is not None:
            options["stop"] = list(options["stop"])
        saved = Saved(
            format=1,
            version=_version(),
            model=self.model.file.digest,
            options=Options(**options),
            messages=[Message(**message) for message in self.messages],  # type: ignore[arg-type]
            kv=self.model.kv,
            context=self.model.context,
            window=self.model.window.size or None,
            sinks=self.model.window.sinks if self.model.window.size else None,
        )
        return msgspec.json.encode(saved)

    def load(self, argument: str) -> None:
        """Go on with a saved conversation; nothing changes if it cannot be read."""
        path = _path(argument, "/load")
        self.go_on(read_saved(path), path)

    def go_on(self, saved: Saved, path: Path, held: Mapping[str, Any] = NOTHING) -> None:
        """Take up a saved conversation with its options, but for those that are `held`."""
        if self.system and self.system[0]["content"] != _system_of(saved):
            say("(that conversation has its own beginning; --system is not used)")
        self.messages = [{"role": m.role, "content": m.content} for m in saved.messages]
        self.system = [m for m in self.messages[:1] if m["role"] == "system"]
        self.options |= msgspec.to_builtins(saved.options) | dict(held)
        say(f"({len(self.messages)} messages from {path}, seed {self.options['seed']})")
        if saved.model != self.model.file.digest:
            say("(that conversation was held with another model file; answers will differ)")

    def stats(self, _: str = "") -> None:
        """Tokens and speed of the last answer."""
        stats = self.model.last_stats
        say(
            f"{stats.prompt_tokens} prompt tokens at {stats.prefill_tokens_per_second:.1f}/s, "
            f"{stats.new_tokens} new at {stats.tokens_per_second:.1f}/s{stats.drafting}, "
            f"seed {self.options['seed']}, {len(self.messages)} messages"
        )
        for report in self.model.reports.values():
            say(str(report))

    def ask(self, text: str) -> None:
        """Stream the answer to `text`. An answer stopped by Ctrl-C is kept as far as it came."""
        question = [*self.messages, {"role": "user", "content": text}]
        answer: list[str] = []
        to_terminal = sys.stdout.isatty()
        try:
            for piece in self.model.stream_chat(question, **self.options):
                answer.append(piece)
                print(piece.translate(_VISIBLE) if to_terminal else piece, end="", flush=True)
        except KeyboardInterrupt:
            say("\n(stopped)")
        finally:
            if answer:
                print(flush=True)
                said = {"role": "assistant", "content": "".join(answer)}
                self.messages = [*question, said]

    def handle(self, line: str) -> None:
        """A message or a command. Raises ChalotError for what could not be done."""
        name, _, argument = line.strip().partition(" ")
        if name in self.commands:
            self.commands[name](argument.strip())
        elif name.startswith("/"):
            say(
                f"{name[:40]} is no command; see /help, or put a space before it to send it as text"
            )
        elif line.strip():
            self.ask(line)


def _system_of(saved: Saved) -> str | None:
    """The system message of a saved conversation."""
    first = saved.messages[0] if saved.messages else None
    return first.content if first is not None and first.role == "system" else None


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise OutputError(f"{command}: found no file name, expected one: {command} talk.json")
    return Path(argument).expanduser()


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("chalot")
    except PackageNotFoundError:  # run from a source tree
        return "0"


class _Lines:
    """Lines from a person with readline, or from a pipe without a prompt. Remembers them."""

    def __init__(self) -> None:
        self.edited = sys.stdin.isatty() and sys.stdout.isatty()
        self.history: Path | None = None

    def __enter__(self) -> "_Lines":
        if self.edited:
            try:
                import readline

                self.history = home() / "chat_history"
                readline.set_history_length(HISTORY_LINES)
                if self.history.exists():
                    readline.read_history_file(self.history)
            except (ImportError, OSError, ChalotError) as error:
                self.history = None
                say(f"(no line history: {error})")
        return self

    def __exit__(self, *_: object) -> None:
        if self.history is not None:
            import readline

            try:
                self.history.parent.mkdir(parents=True, exist_ok=True)
                self.history.touch(mode=0o600)  # it holds what was typed
                readline.write_history_file(self.history)
            except OSError as error:
                say(f"(line history not kept: {error})")

    def one(self, prompt: str) -> str:
        if self.edited:
            return input(prompt)
        if sys.stdin.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def read(self) -> str:
        """The next message; a line that ends with \\ goes on. Raises EOFError at the end."""
        line = self.one("> ")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self.one(". ")
        return line


@contextmanager
def _closed_as_left() -> Iterator[None]:
    """A terminal that is closed, or SIGTERM, ends the input: what was said is kept all the same."""

    def left(*_: object) -> None:
        raise EOFError

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = [(number, signal.signal(number, left)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def chat(
    model: Talker, *, system: str | None = None, cache: Path | None = None, **options: Any
) -> None:
    """Talk until /exit or the end of the input. `options` are those of `Model.stream_chat`.

    With a `cache`, a conversation that it holds goes on without being read again, and is kept there
    at the end, with the model's keys and values.

    Raises TokenizerError for a model without a chat template; other errors are shown, and the
    conversation goes on without the message that caused them.
    """
    model.tokenizer.chat_template()
    talk = Chat(model, system, options)
    if cache is not None:
        from chalot.load.sessions import check_cache

        check_cache(cache)
    if cache is not None and cache.exists():
        note = model.load_talk(cache)
        if not note:
            raise FormatError(
                f"{cache}: holds a text of `chalot run`, no conversation; choose another name"
            )
        talk.go_on(parse_saved(note, cache), cache, talk.given)
    say(f"seed {talk.options['seed']}; /help lists commands, Ctrl-D leaves")
    with _Lines() as lines, _closed_as_left(), suppress(KeyboardInterrupt):
        leaving = False
        while True:
            try:
                line = lines.read()
                leaving = False
                if line.strip() == "/exit":
                    break
                talk.handle(line)
            except EOFError:
                break
            except KeyboardInterrupt:
                if leaving:
                    break
                leaving = True
                say("\n(Ctrl-C again leaves)")
            except UnicodeDecodeError as error:
                say(f"error: found input that is not text ({error.reason}), expected UTF-8")
            except ChalotError as error:
                say(f"error: {error}")
    say()
    if cache is not None:
        model.save_talk(cache, talk.saved())
