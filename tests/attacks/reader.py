"""What a kind of file brings to be attacked; and what came of one input."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from random import Random
from traceback import extract_tb
from typing import Any

import chalot
from attacks.limits import Cost, measured
from chalot.errors import ChalotError

LONGEST = 900  # characters of a message, which has the file's path in it
HERE = str(Path(chalot.__file__).parent)


class Reader(ABC):
    """Hostile files of one kind in a folder, and how they are read."""

    file = ""  # what hostile cases are called, and what errors name
    fewest_places = 3  # of chalot's code that refuse something, in a run that counts

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def write(self, rng: Random | None) -> None:
        """Put a whole file into the folder, or a changed one."""

    def put(self, content: Any) -> None:
        """Put a case into the folder."""
        (self.folder / self.file).write_bytes(content)

    @abstractmethod
    def read(self) -> None:
        """Open the file and use all of it."""

    def close(self) -> None:  # noqa: B027  (most have nothing open)
        """Give back what was opened to read with."""


class Fault(AssertionError):
    """Anything but an answer or a typed error of one line, within the limits."""


@dataclass
class Outcome:
    """What came of an input that did no harm."""

    place: str  # in chalot, where it was refused; "" if it was read
    said: str
    cost: Cost


def outcome(reader: Reader) -> Outcome:
    """Read what is in the reader's folder. Raises Fault."""
    size = sum(path.stat().st_size for path in reader.folder.iterdir() if path.is_file())
    place = said = ""
    with measured() as cost:
        try:
            reader.read()
        except ChalotError as error:
            frames = [f for f in extract_tb(error.__traceback__) if f.filename.startswith(HERE)]
            place = f"{Path(frames[-1].filename).stem}:{frames[-1].lineno}" if frames else "?"
            said = str(error)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            name = type(error).__name__
            raise Fault(f"{name}: {error!s:.200}; expected a ChalotError") from error
    if "\n" in said or len(said) > LONGEST:
        raise Fault(f"{place}: {len(said)} characters, expected one line: {said!r:.300}")
    too_much = cost.over(size)
    if too_much:
        raise Fault(f"{too_much} ({f'refused at {place}' if place else 'read'})")
    return Outcome(place, said, cost)
