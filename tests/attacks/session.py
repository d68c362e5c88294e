"""A saved session, which a model restores and goes on with."""

import hashlib
import json
from pathlib import Path
from random import Random

import chalot
from attacks.changes import changed_bytes, changed_text
from attacks.reader import Reader as Base
from chalot.formats.session_file import FRONT, MAGIC
from chalot.model.config import from_hugging_face
from myai_files import SMALL, random_file

FILE = "text.session"


class Reader(Base):
    """600 tokens, with a window."""

    file = FILE

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        model = random_file(folder / "x.myai", from_hugging_face(SMALL), "nl4")
        self.model = chalot.load(model, threads=1, window=64, sinks=4, draft=False)
        with self.model.session(seed=5, temperature=0.9) as session:
            session.prefill([i % 130 for i in range(600)])
            self.model.save_session(session, folder / FILE, b"some words")
        self.whole = (folder / FILE).read_bytes()
        _, self.header, _ = FRONT.unpack_from(self.whole)
        self.free = sorted(self.model.engine.cache.free)

    def write(self, rng: Random | None) -> None:
        """See Base."""
        content = self.whole
        if rng is not None:
            content = changed_bytes(content, rng, 1200) if rng.random() < 0.2 else self.lying(rng)
        (self.folder / FILE).write_bytes(content)

    def lying(self, rng: Random) -> bytes:
        """Another header, or other content, behind a good checksum."""
        end = FRONT.size + self.header
        text, rest = self.whole[FRONT.size : end], self.whole[end:]
        text = text if rng.random() < 0.2 else changed_text(json.loads(text), rng)
        rest = rest if rng.random() < 0.5 else changed_bytes(rest, rng)
        if rng.random() < 0.8:  # what follows begins where it should
            rest = bytes(-(FRONT.size + len(text) + 10) % 64 + 10) + rest[10 + -(end + 10) % 64 :]
        digest = hashlib.sha256(text + rest).digest()
        return FRONT.pack(MAGIC, len(text), digest) + text + rest

    def read(self) -> None:
        """See Base."""
        try:
            with self.model.load_session(self.folder / FILE) as session:
                session.step()
        finally:
            assert sorted(self.model.engine.cache.free) == self.free, "pages were not given back"

    def close(self) -> None:
        """See Base."""
        self.model.close()
