"""What a user calls a model, a path, a short name or a hub id, to a path on this disk."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from chalot.errors import FormatError, HubNotFoundError, HubOfflineError
from chalot.short_names import NAMES, near

Answer = TypeVar("Answer")
Progress = Callable[[str, int, int], None]  # what, done, of


def as_path(source: str | Path) -> Path:
    """A source as a path, which need not exist. Raises FormatError for what can be none."""
    try:
        path = Path(source).expanduser()
        with suppress(OSError):
            path.lstat()
        return path
    except (ValueError, RuntimeError) as error:  # a zero byte, half a character; an unknown ~user
        raise FormatError(
            f"{str(source)[:80]!r}: is no path ({error}); expected a model's folder, file or name"
        ) from None


def hub_id(source: str | Path) -> str | None:
    """The hub id, or ORG/NAME/FILE.gguf, that a source stands for, None if it is none.

    A path that exists wins.
    """
    if not isinstance(source, str) or as_path(source).exists():
        return None
    known = NAMES.get(source.lower())
    if known is not None:
        return known.id
    from chalot.formats import hub

    return source if hub.is_name(source) else None


def called(source: str | Path) -> str:
    """What a file that is made from a source calls it: its hub id, or its own name."""
    return hub_id(source) or Path(str(source)).name


def resolve(source: str | Path, progress: Progress | None = None) -> Path:
    """The folder or file that holds the source; what is on the hub is downloaded first.

    `progress` is told of the download: what, how many bytes are there, of how many.
    Raises FormatError when there is no such path and it is no name, HubError if the hub refuses.
    """
    path = as_path(source)
    if path.is_file() or path.is_dir():
        return path
    if path.exists():
        raise FormatError(f"{source}: found a device or a pipe, expected a file or a folder")
    from chalot.formats import hub

    def advance(done: int, total: int) -> None:
        if progress is not None:
            progress("download", done, total)

    return on_hub(source, lambda repo_id: hub.fetch(repo_id, progress=advance))


def on_hub(source: str | Path, ask: Callable[[str], Answer]) -> Answer:
    """`ask` of the hub id that a source stands for, which is no path here.

    Raises FormatError when it is no name of a model, HubError if the hub refuses.
    """
    found = hub_id(source)
    if found is None:
        raise FormatError(unknown(str(source)))
    try:
        return ask(found)
    except (HubNotFoundError, HubOfflineError) as error:
        raise type(error)(
            f"{source}: there is no such file or folder here; asked the hub: {error}"
        ) from error


def unknown(source: str) -> str:
    """The message for a source that is neither path nor name, with names that were perhaps meant.

    Only what has no slash nor suffix can be a short name with a slip in it.
    """
    meant = "" if "/" in source else " or ".join(near(source))
    return (
        f"{source}: there is no such file or folder; expected a model's folder or file, a hub id "
        "such as org/name or org/name/file.gguf, or a short name (chalot models lists them)"
        + (f"; did you mean {meant}?" if meant else "")
    )
