"""A folder with one safetensors file, its header changed."""

import json
from pathlib import Path
from random import Random

from attacks.changes import BOMBS, changed_bytes, changed_text
from attacks.reader import Reader as Base
from chalot.checking import check_shapes, read_config
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.documents import MAX_JSON_VALUES
from myai_files import checkpoint
from safetensors_files import entry, pack

FILE = "model.safetensors"
GOOD = {"a": entry(0, 8), "b": entry(8, 16)}


HEADERS = {  # name -> (header, payload bytes, part of the message)
    "array": ([1], 0, "expected a JSON object"),
    "not json": (b"{]", 0, "is not JSON"),
    "empty": (b"", 2, "is not JSON"),
    "utf-8": (b'{"\xc3": 1}', 0, "is not UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), 0, "is not UTF-8"),
    "surrogate": (b'{"\\ud800": 1}', 0, "is not JSON"),
    "NaN": (b'{"a": NaN}', 0, "found NaN"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", 0, "is not JSON"),
    "nested arrays": (b"[" * 100_000, 0, "nested too deeply"),
    "nested objects": (b'{"a":' * 100_000, 0, "nested too deeply"),
    "many values": (b"[" + b"0," * (MAX_JSON_VALUES + 1) + b"0]", 0, "found more than"),
    **{f"bomb: {name}": (bomb, 0, "found more than") for name, bomb in BOMBS.items()},
    "duplicate tensor": (
        b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 4)).encode(),) * 2),
        4,
        "key 'a' is there twice",
    ),
    "duplicate key": (
        b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}',
        4,
        "key 'dtype' is there twice",
    ),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "metadata list": ({"__metadata__": []}, 0, "__metadata__"),
    "entry": ({"a": 1}, 0, "'a': expected dtype, shape and data_offsets"),
    "entry key": ({"a": {**entry(0, 4), "x": 1}}, 4, "'a': expected dtype"),
    "dtype": ({"a": entry(0, 4, [1], "Q4")}, 4, "unknown dtype 'Q4'"),
    "dtype list": ({"a": entry(0, 4, [1], ["F32"])}, 4, "unknown dtype"),
    "negative dimension": ({"a": entry(0, 4, [-1, -1])}, 4, "shape is not"),
    "float dimension": ({"a": entry(0, 4, [1.0])}, 4, "shape is not"),
    "boolean dimension": ({"a": entry(0, 4, [True])}, 4, "shape is not"),
    "huge dimension": ({"a": entry(0, 4, [1 << 63])}, 4, "shape is not"),
    "product overflow": ({"a": entry(0, 0, [1 << 32, 1 << 32])}, 0, "takes"),
    "product overflow to 4": ({"a": entry(0, 4, [(1 << 62) + 1, 4])}, 4, "takes"),
    "rank": ({"a": entry(0, 4, [1] * 17)}, 4, "shape is not"),
    "shape text": ({"a": entry(0, 4, "11")}, 4, "shape is not"),
    "negative offset": ({"a": entry(-4, 0, [1])}, 4, "data_offsets"),
    "descending": ({"a": entry(4, 0, [1])}, 4, "data_offsets"),
    "three offsets": ({"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, 8, "data_offsets"),
    "contradiction": ({"a": entry(0, 8, [1])}, 8, "its extent has 8"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' begins at 4, overlaps"),
    "same extent": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlaps"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "'b' begins at 8, leaves a hole"),
    "hole first": ({"a": entry(4, 8)}, 8, "leaves a hole"),
    "past the end": (GOOD, 15, "tensors end at 16 bytes of payload, file has 15"),
    "far past the end": ({"a": entry(0, 1 << 40)}, 4, "truncated download"),
    "bytes after": (GOOD, 17, "expected no bytes past the last one"),
}

STARTS = [  # (the file, part of the message)
    (b"", "found 0 bytes"),
    (b"\0" * 7, "found 7 bytes"),
    (b"\2" + b"\0" * 7 + b"{", "found 9 bytes"),
    (b"\3" + b"\0" * 7 + b"{}", "header of 3 bytes"),
    (b"\xff" * 8 + b"{}", "header of 18,446,744,073,709,551,615 bytes"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
]

CASES = {name: (pack(h, bytes(n)), said) for name, (h, n, said) in HEADERS.items()}
CASES |= {f"start {n}": start for n, start in enumerate(STARTS)}


class Reader(Base):
    """A Qwen2 of 2 layers."""

    file = FILE

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        checkpoint(folder)
        self.whole = (folder / FILE).read_bytes()
        self.begin = 8 + int.from_bytes(self.whole[:8], "little")
        self.header = json.loads(self.whole[8 : self.begin])
        self.header["__metadata__"] = {"format": "pt", "made": "by chalot", "n": "1"}

    def write(self, rng: Random | None) -> None:
        """See Base."""
        content = self.whole
        if rng is not None and rng.random() < 0.3:
            content = changed_bytes(content, rng, self.begin)
        elif rng is not None:
            header = changed_text(self.header, rng)
            payload = self.whole[self.begin :][: rng.choice((*[None] * 18, 100, -4))]
            content = len(header).to_bytes(8, "little") + header + payload
        (self.folder / FILE).write_bytes(content)

    def read(self) -> None:
        """See Base."""
        read_folder(self.folder)


def read_folder(folder: Path) -> None:
    """Configuration, shapes, and the first rows of every tensor."""
    source = open_checkpoint(folder)
    try:
        for name, info in source.tensors.items():
            source.float32(name, 0, min(2, info.shape[0]) if info.shape else 1)
            source.raw(name)
        check_shapes(read_config(source), source)
    finally:
        source.close()
