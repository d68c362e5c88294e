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

CASES = {  # name -> (sampling options that are others, part of the message)
    "a seed of half a number": ({"seed": 1.5}, "expected a whole number"),
    "half a token": ({"top_k": 2.5}, "expected a whole number"),
    "a number without end": ({"temperature": 10**400}, "expected 0.0 to 100.0"),
    "no number": ({"temperature": "x"}, "sampling"),
    "an option that is not known": ({"shell": 1}, "shell"),
}


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
        return self.with_header(text, rest, moved=rng.random() < 0.8)

    def with_header(self, text: bytes, rest: bytes, moved: bool = True) -> bytes:
        """A file with a good checksum; what follows the header is `moved` to where it should be."""
        if moved:
            held = 10 + -(FRONT.size + self.header + 10) % 64  # the note, and fill behind it
            rest = bytes(10 + -(FRONT.size + len(text) + 10) % 64) + rest[held:]
        digest = hashlib.sha256(text + rest).digest()
        return FRONT.pack(MAGIC, len(text), digest) + text + rest

    def put(self, content: dict[str, object]) -> None:
        """Other options, in a header as long as it was."""
        end = FRONT.size + self.header
        header = json.loads(self.whole[FRONT.size : end])
        header["sampling"] |= content
        super().put(self.with_header(json.dumps(header).encode(), self.whole[end:]))

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
