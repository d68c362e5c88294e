"""A plan's file, in both forms."""

import json
from random import Random

from attacks.changes import BOMBS, changed_text
from attacks.reader import Reader as Base
from chalot.model.config import from_hugging_face
from chalot.model.layers import model_tensors
from chalot.planfile import VERSION, read_plan
from chalot.quant.scheme import SCHEMES
from myai_files import SMALL

FILE = "p.json"
CONFIG = from_hugging_face(SMALL)
MATRICES = [spec.name for spec in model_tensors(CONFIG) if spec.kind != "vector"]
FULL = {
    **{"format": VERSION, "source": "x", "fingerprint": "0" * 64, "method": "ewq"},
    **{"tensors": dict.fromkeys(MATRICES, "nl4") | {"deep.ffn": "int8"}, "bytes": 1000},
    **{"bits_per_weight": 4.5, "expected_loss": 0.1, "measured_loss": None, "text": "t"},
    "details": {"entropies": [1.0, 2.0], "variant": "softmax", "thresholds": {"a": 0.5}},
}
SIMPLE = {"0": "raw", "1": "8-bit"}


def changed(**fields: object) -> bytes:
    """The plan with other fields."""
    return json.dumps({**FULL, **fields}).encode()


CASES = {  # name -> (the file, part of the message)
    "format": (changed(format=VERSION + 1), "format 2"),
    "format text": (changed(format="1"), "format"),
    "scheme": (changed(tensors={"embedding": "nosuch"}), "nosuch"),
    "scheme number": (changed(tensors={"embedding": 4}), "tensors"),
    "tensors list": (changed(tensors=[]), "tensors"),
    "bytes 2^70": (changed(bytes=2**70), "bytes"),
    "bytes negative": (changed(bytes=-1), "bytes"),
    "unknown field": (changed(surprise=1), "surprise"),
    "unknown field of two lines": (changed(**{"a\nb": 1}), r"a\nb"),
    "long names": (
        changed(source="\n" * 9 + "x" * 5000, tensors={"y" * 9999: "nosuch"}),
        "not known",
    ),
    "nothing": (b"", "JSON"),
    "empty": (b"{}", "chalot plan"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    **{f"bomb: {name}": (bomb, "found more than") for name, bomb in BOMBS.items()},
    "utf-16": (b"\xff\xfe{", "is not UTF-8"),
    "twice": (b'{"format": 1, "format": 1}', "is there twice"),
    "NaN": (b'{"format": NaN}', "found NaN"),
    "simple list": (b'["raw", "raw"]', "chalot plan"),
    "fewer": (b'{"0": "raw"}', "each of 2 blocks"),
    "more": (b'{"0": "raw", "1": "raw", "2": "raw"}', "each of 2 blocks"),
    "level": (b'{"0": "raw", "1": "3-bit"}', "1.58-bit"),
    "level list": (b'{"0": "raw", "1": []}', "1.58-bit"),
    "level object": (b'{"0": "raw", "1": {"a": {}}}', "1.58-bit"),
    "zero in front": (b'{"0": "raw", "01": "raw"}', "each of 2 blocks"),
    "other digits": ('{"0": "raw", "\u0661": "raw"}'.encode(), "each of 2 blocks"),
}


class Reader(Base):
    """Of a model of 2 layers."""

    file = FILE

    def write(self, rng: Random | None) -> None:
        """See Base."""
        text = (
            json.dumps(FULL).encode()
            if rng is None
            else changed_text(rng.choice((FULL, SIMPLE)), rng)
        )
        (self.folder / FILE).write_bytes(text)

    def read(self) -> None:
        """See Base."""
        found = read_plan(self.folder / FILE, CONFIG)
        assert set(found.tensors.values()) <= SCHEMES.keys()
