"""A model that is none: it repeats what it is told, word by word, as chat asks of a model."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import vocabularies
from chalot.model.window import Window
from chalot.text.tokenizer import Tokenizer
from conversations import TEMPLATES


@dataclass
class Stats:
    prompt_tokens: int = 3
    new_tokens: int = 4
    seed: int | None = None
    prefill_tokens_per_second: float = 100.0
    tokens_per_second: float = 10.0
    drafting: str = ""


class Talker:
    """`heard` keeps every call; told to "interrupt", it sends itself a SIGINT after two words."""

    kv = "int8"
    context = 1024
    window = Window()

    def __init__(self, template: str | None = "chatml", digest: str = "d1") -> None:
        source = None if template is None else TEMPLATES[template]
        self.tokenizer = Tokenizer.from_documents(vocabularies.byte_level(), {}, {}, source)
        self.file = SimpleNamespace(digest=digest)
        self.last_stats = Stats()
        self.reports: dict[str, object] = {}
        self.heard: list[tuple[list[dict[str, str]], dict[str, Any]]] = []

    def stream_chat(self, messages: list[dict[str, str]], **options: Any) -> Iterator[str]:
        self.heard.append(([dict(message) for message in messages], options))
        self.tokenizer.encode_chat(messages)
        text = messages[-1]["content"]
        for number, word in enumerate(["you", " said", *(" " + part for part in text.split())]):
            if number == 2 and "interrupt" in text:
                signal.raise_signal(signal.SIGINT)
            yield word

    def load_talk(self, path: Path) -> bytes:
        return path.read_bytes()

    def save_talk(self, path: Path, note: bytes) -> None:
        path.write_bytes(note)


if __name__ == "__main__":
    from chalot.chat import chat

    chat(Talker(), seed=1)
