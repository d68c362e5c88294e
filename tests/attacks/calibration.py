"""What `chalot calibrate` leaves beside a model, read when that is opened."""

import hashlib
import json
from pathlib import Path
from random import Random

import msgspec
import numpy as np

import chalot
from attacks.changes import changed_bytes, changed_text
from attacks.reader import Reader as Base
from chalot.calibrated import (
    FRONT,
    MAGIC,
    VERSION,
    Calibration,
    Depth,
    Drafting,
    Exit,
    ShortHead,
    Supervisor,
    beside,
)
from chalot.model.config import from_hugging_face
from chalot.quant.packing import ALIGNMENT, as_matrix
from chalot.quant.scheme import Scheme
from myai_files import SMALL, random_file

HEAD = (16, 64)  # rows of the short head, columns


class Reader(Base):
    """With a short head, drafts, exits and a supervisor."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = random_file(folder / "x.myai", from_hugging_face(SMALL), "nl4")
        with chalot.load(self.model, threads=1) as model:
            digest = model.file.digest
        weights = np.random.default_rng(0).standard_normal(HEAD, np.float32)
        self.head = as_matrix(weights, Scheme.parse("nl4")).data.tobytes()
        found = Calibration(
            model=digest,
            text="t",
            machine="m",
            tokens=100,
            seconds={"1": 0.1},
            depths=(Depth(1, 0.9, 0.8),),
            short=ShortHead("nl4", tuple(range(0, 80, 5)), 1, 0.9),
            draft=Drafting(1, 3, True, 0.8, 1.5, True),
            exits=(Exit(1, 2.0, 0.5, 0.99, 0.2),),
            supervisor=Supervisor(0.9, 0.5, 0.5, 0.1, 9, True, (0.1,) * 64, 0.0),
        )
        self.found = msgspec.json.decode(msgspec.json.encode(found))

    def write(self, rng: Random | None) -> None:
        """See Base."""
        text, head = json.dumps(self.found).encode(), self.head
        if rng is not None and rng.random() < 0.8:
            text = changed_text(self.found, rng)
        elif rng is not None:
            head = changed_bytes(head, rng)
        body = text + bytes(-len(text) % ALIGNMENT) + head
        front = FRONT.pack(MAGIC, VERSION, len(text), hashlib.sha256(body).digest())
        content = front.ljust(ALIGNMENT, b"\0") + body
        if rng is not None and rng.random() < 0.1:
            content = changed_bytes(content, rng, ALIGNMENT)
        beside(self.model).write_bytes(content)

    def read(self) -> None:
        """See Base: early exit is what insists on a calibration."""
        with chalot.load(self.model, threads=1, early_exit="auto") as model:
            model.logits([1, 2, 3], last=1)
            with model.session(temperature=0) as session:
                session.prefill([1, 2, 3])
                session.step()
