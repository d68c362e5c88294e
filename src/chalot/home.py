"""Where chalot keeps what it can make again: converted models and the history of chats."""

import os
from pathlib import Path

from chalot.errors import OutputError


def home() -> Path:
    """CHALOT_HOME, else `chalot` in XDG_CACHE_HOME, else ~/.cache/chalot. It may not exist yet."""
    given = os.environ.get("CHALOT_HOME")
    if given:
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if Path(cache).is_absolute():  # a relative one is to be ignored (XDG base directories 0.8)
        return Path(cache) / "chalot"
    try:
        return Path.home() / ".cache" / "chalot"
    except RuntimeError:
        raise OutputError("found no home directory; set CHALOT_HOME to a folder to use") from None
