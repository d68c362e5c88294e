"""What chalot keeps under CHALOT_HOME: costs of passes, losses of plans, windows measured.

What is damaged there is no error, but as if it were not there.
"""

import os
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from attacks.changes import as_json, changed_bytes, changed_json
from attacks.reader import Reader as Base
from chalot.errors import ChalotError
from chalot.evaluate.quality import Window
from chalot.evaluate.report import Unfinished
from chalot.formats.myai import MyaiFile
from chalot.load.drafts import costs_at, read_costs
from chalot.model.config import from_hugging_face
from chalot.plan.losses import Keeper, Kept, digest_of
from myai_files import SMALL, random_file

NAMES = ("nl4", "int8")
LOSSES = {"layers.0": {"nl4": 0.1, "int8": 0.01}, "layers.1": {"nl4": 0.2, "int8": 0.02}}
COSTS = {"2": 1.5, "3": 1.75, "16": 4.0}


class Ignored(ChalotError):
    """Nothing was made of a file."""


class Reader(Base):
    """All three in a home of their own."""

    fewest_places = 1

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        os.environ["CHALOT_HOME"] = str(folder / "home")
        self.file = MyaiFile(random_file(folder / "x.myai", from_hugging_face(SMALL), "nl4"))
        self.keeper, self.unfinished = Keeper("k"), Unfinished("k")
        self.costs = costs_at(self.file, "avx2", 2)
        key = self.keeper.key
        self.wholes: dict[Path, Any] = {
            self.keeper.path: msgspec.to_builtins(Kept(key, LOSSES, digest_of(key, LOSSES))),
            self.costs: COSTS,
            self.unfinished.path: [0, [msgspec.to_builtins(Window())]],
        }
        for path in self.wholes:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, rng: Random | None) -> None:
        """See Base."""
        for path, whole in self.wholes.items():
            text = as_json(whole)
            if rng is not None:
                text = (
                    changed_bytes(text, rng)
                    if rng.random() < 0.6
                    else as_json(changed_json(whole, rng))
                )
            path.write_bytes(text)

    def read(self) -> None:
        """See Base."""
        found = [
            self.keeper.read(NAMES),
            read_costs(self.file, "avx2", 2).relative,
            self.unfinished.read(1),
        ]
        if not any(found):
            raise Ignored("nothing was kept")

    def close(self) -> None:
        """See Base."""
        self.file.close()
