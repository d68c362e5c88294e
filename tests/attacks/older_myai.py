"""A `.myai` file of version 2, which has no manifest: all follows from its header."""

from pathlib import Path
from random import Random

from attacks.changes import changed_bytes
from attacks.reader import Reader as Base
from attacks.safetensors import read_folder
from myai_v2_files import write

FILE = "old.myai"


class Reader(Base):
    """A dense model, and one whose experts are alike."""

    file = FILE

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.wholes = []
        for changes in ({}, {"experts": 2, "top_k": 1}):
            write(folder / FILE, **changes)
            self.wholes.append((folder / FILE).read_bytes())

    def write(self, rng: Random | None) -> None:
        """See Base."""
        content = self.wholes[0]
        if rng is not None:
            content = changed_bytes(rng.choice(self.wholes), rng, rng.choice((160, 160, None)))
        (self.folder / FILE).write_bytes(content)

    def read(self) -> None:
        """See Base."""
        read_folder(self.folder / FILE)
