"""Folders for what is needed only while a process runs; those that killed ones left are cleared.

A folder is locked by who made it, and the lock dies with that process: what nobody holds is waste.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

try:
    import fcntl
except ImportError:  # Windows: nothing tells which are still in use, and none is cleared
    fcntl = None  # type: ignore[assignment]


def claim(path: Path) -> int | None:
    """A descriptor that holds a folder's lock; None where others have it, or there are no locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:  # gone, or a link that someone planted
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def drop(path: Path, held: int | None) -> None:
    """Remove a folder, and let go of its lock."""
    shutil.rmtree(path, ignore_errors=True)
    if held is not None:
        os.close(held)


@contextmanager
def scratch(folder: Path, prefix: str) -> Iterator[Path]:
    """A new folder PREFIX... in `folder`, which is made if it is not there; gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{prefix}*"):
        waste = claim(left)
        if waste is not None:
            drop(left, waste)
    made = Path(mkdtemp(dir=folder, prefix=f".{prefix}"))  # hidden from others until it is locked
    held = claim(made)
    try:
        with suppress(OSError):
            made = made.rename(folder / made.name[1:])
        yield made
    except BaseException as error:
        vars(error).pop("__notes__", None)  # what they say is kept goes with the folder
        raise
    finally:
        drop(made, held)
