"""What a user calls a model, a path or a hub id, to a path on this disk."""

from pathlib import Path

from chalot.errors import FormatError


def resolve(source: str | Path) -> Path:
    """The folder or file that holds the source; a hub id is downloaded first.

    Raises FormatError when there is no such path and it is no hub id, HubError if the hub refuses.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    from chalot.formats import hub

    if isinstance(source, str) and hub.is_hub_id(source):
        return hub.fetch(source)
    raise FormatError(
        f"{source}: there is no such file or folder; "
        "expected a model's folder, a .myai file, or a hub id such as org/name"
    )
