"""A saved conversation, what `run --json` printed, a server's exchange: what `replay` reads."""

from random import Random
from typing import Any

from attacks.changes import as_json, changed_text
from attacks.reader import Reader as Base
from chalot.chat import read_saved
from chalot.errors import ChalotError
from chalot.replay import read_transcript

FILE = "talk.json"
DIGEST = "0" * 64
OPTIONS = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7, "stop": ["a"], "max_tokens": 5}
CHAT = {
    "format": 1,
    "version": "0.1.0",
    "model": DIGEST,
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ],
    "options": OPTIONS,
}
RUN = {
    **{
        "prompt": "a",
        "digest": DIGEST,
        "options": {"seed": 3, "temperature": 0.0},
        "max_tokens": 5,
    },
    **{
        "stop": [],
        "context": 100,
        "kv": "int8",
        "text": "b",
        "answers": [{"choice": 1, "text": "x"}],
    },
}
SERVED = {
    "request": {"model": "x", "messages": [{"role": "user", "content": "a"}], "seed": 1},
    "response": {
        **{"id": "1", "object": "chat.completion", "created": 1, "model": "x", "seed": 1},
        "system_fingerprint": DIGEST,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "b"}}],
    },
}

CASES = {  # name -> (the file, part of the message); found by random changes
    "a lone surrogate": (as_json(RUN | {"stop": ["\ud800"]}), "is not JSON"),
    "a kind that is a list": (as_json({**SERVED, "response": {"object": [1]}}), "found a list"),
    "a cache type without end": (as_json(RUN | {"kv": "x" * 5000}), "Invalid enum value 'xxx"),
    "a seed of two lines": (as_json(RUN | {"kv": "a\nb"}), r"a\nb"),
}


class Reader(Base):
    """Of all three kinds."""

    file = FILE

    def write(self, rng: Random | None) -> None:
        """See Base."""
        whole: Any = RUN if rng is None else rng.choice((CHAT, RUN, SERVED))
        text = as_json(whole) if rng is None else changed_text(whole, rng)
        (self.folder / FILE).write_bytes(text)

    def read(self) -> None:
        """See Base."""
        path = self.folder / FILE
        try:
            read_saved(path)
        except ChalotError:
            read_transcript(path)
