"""The tables of byte pairs in a `.myai` file, which native code reads."""

import json
import struct
from pathlib import Path
from random import Random

import msgspec

import vocabularies
from attacks.changes import changed_bytes, changed_text, number
from attacks.reader import Reader as Base
from attacks.tokenizer import CONFIG, TEXT
from chalot.kernels.backend import byte_pairs
from chalot.text.byte_pairs import Tables
from chalot.text.tokenizer import compiled, from_source

FILE = "tokenizer.bpe"
LONG = TEXT * 120  # which does without the `tokenizers` library
WIDTHS = {"ids": 4, "pairs": 8, "merges": 4}

EMPTY = json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []})
CASES = {  # name -> (fields of the whole tables that are others, part of the message)
    "no letters": ({"skeleton": EMPTY.encode(), "ids": b""}, "do not fit their tokens"),
    "half a number": ({"ids": b"abc"}, FILE),
    "half a pair": ({"pairs": b"abcdefg"}, FILE),
    "no tokens": ({"tokens": b""}, "do not fit"),
    "more merges": ({"merges": bytes(8 * 5)}, "merges do not fit their pairs"),
    "pairs that descend": ({"pairs": struct.pack("<2Q", 9, 1), "merges": bytes(16)}, FILE),
    "a merge beyond": ({"pairs": bytes(8), "merges": b"\0\0\0\0" + b"\xff" * 4}, "do not fit"),
    "no skeleton": ({"skeleton": b"{}"}, "tokenizer.json"),
}


class Reader(Base):
    """Tables of three tokenizers, in plain Python and natively."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        v = vocabularies
        made = [compiled(make()) for make in (v.byte_level, v.llama3, v.sentencepiece)]
        self.wholes = [msgspec.msgpack.decode(raw or b"", type=Tables) for raw in made]
        self.native = True

    def write(self, rng: Random | None) -> None:
        """See Base."""
        raw = msgspec.msgpack.encode(self.wholes[0])
        if rng is not None:
            self.native = rng.random() < 0.8
            whole = rng.choice(self.wholes)
            raw = msgspec.msgpack.encode(changed(whole, rng))
            raw = changed_bytes(raw, rng) if rng.random() < 0.1 else raw
        (self.folder / FILE).write_bytes(raw)

    def put(self, content: dict[str, bytes]) -> None:
        """Tables with other fields."""
        other = msgspec.structs.replace(self.wholes[0], **content)
        (self.folder / FILE).write_bytes(msgspec.msgpack.encode(other))

    def document(self, name: str) -> bytes | None:
        """As a file gives it."""
        return json.dumps(CONFIG).encode() if name == "tokenizer_config.json" else None

    def read(self) -> None:
        """See Base."""
        tables = (self.folder / FILE).read_bytes()
        tokenizer = from_source(self, tables, byte_pairs if self.native else None)
        for text in (TEXT, LONG):
            tokenizer.decode([i for i in tokenizer.encode(text) if i < tokenizer.vocabulary_size])
        tokenizer.encode(TEXT, specials=True)
        _ = tokenizer.eos_ids


def changed(whole: Tables, rng: Random) -> Tables:
    """Other numbers, or another skeleton."""
    fields = msgspec.structs.asdict(whole)
    name = rng.choice(list(fields))
    raw = bytearray(fields[name])
    width = WIDTHS.get(name)
    if name == "skeleton" and rng.random() < 0.7:
        raw = bytearray(changed_text(json.loads(raw), rng))
    elif width is None or rng.random() < 0.3:
        raw = bytearray(changed_bytes(bytes(raw), rng))
    else:
        for _ in range(rng.randint(1, 30)):
            at = rng.randrange(len(raw) // width) * width
            small = rng.choice((rng.randrange(1000), number(rng) % (1 << 8 * width)))
            raw[at : at + width] = struct.pack("<Q", small)[:width]
        if name == "pairs" and rng.random() < 0.5:
            ascending = sorted(struct.unpack(f"<{len(raw) // 8}Q", raw))
            raw = bytearray(struct.pack(f"<{len(ascending)}Q", *ascending))
    return Tables(**fields | {name: bytes(raw)})
