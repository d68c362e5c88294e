"""A `.myai` file: its header, its manifest behind a good checksum, the bytes of its extents."""

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import chalot
import vocabularies
from attacks.changes import BOMBS, as_json, changed_bytes, changed_json, changed_text
from attacks.reader import Reader as Base
from chalot.formats.myai.manifest import HEADER, WHERE
from chalot.model.config import from_hugging_face
from golden.cases import mixtral
from myai_files import SMALL, edited, manifest_of, random_file, set_at, with_manifest

FILE = "x.myai"
EXPERTS = mixtral(
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=1,
    vocab_size=85,
    hidden_size=64,
    intermediate_size=72,
)
GENERATION = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "do_sample": True, "eos_token_id": 2}
ROOM = 4000  # bytes: a changed document may be longer
DOCUMENTS = {
    "generation_config.json": json.dumps(GENERATION).encode().ljust(ROOM),
    "tokenizer.json": vocabularies.unigram(),
}
MODELS = ((SMALL, "nl4"), (SMALL | {"tie_word_embeddings": True}, "row4"), (EXPERTS, "int8"))

QUERY = ("tensors", "layers.0.query")
NORM = ("tensors", "final_norm")

ELSEWHERE = {"offset": 0, "bytes": 1, "sha256": "0" * 64, "elsewhere": True}
OTHERS = {
    "itself": FILE,
    "a path": "../x.myai",
    "a folder": ".",
    "a root": "/x",
    "nobody": "a.myai",
}
OTHERS |= {"a device": "/dev/zero", "no name": "", "a long name": "x" * 300, "a zero byte": "a\0"}

HEADERS: dict[str, Callable[[bytearray], Any]] = {
    "magic": lambda h: struct.pack_into("<I", h, 0, 0x46554747),
    "version 0": lambda h: struct.pack_into("<I", h, 4, 0),
    "hidden": lambda h: struct.pack_into("<I", h, 8, 65),
    "reserved": lambda h: struct.pack_into("<I", h, 200, 1),
    "manifest at 0": lambda h: struct.pack_into("<Q", h, 64, 0),
    "manifest in the header": lambda h: struct.pack_into("<Q", h, 64, 128),
    "manifest at 2^63": lambda h: struct.pack_into("<Q", h, 64, 1 << 63),
    "manifest at 2^64 - 1": lambda h: struct.pack_into("<Q", h, 64, (1 << 64) - 1),
    "manifest of 0 bytes": lambda h: struct.pack_into("<Q", h, 72, 0),
    "manifest of 2^63 bytes": lambda h: struct.pack_into("<Q", h, 72, 1 << 63),
    "offset and length wrap": lambda h: struct.pack_into("<2Q", h, 64, (1 << 64) - 256, 512),
    "file of 2^63 bytes": lambda h: struct.pack_into("<Q", h, 80, 1 << 63),
    "checksum": lambda h: h.__setitem__(100, h[100] ^ 1),
}

DEEP = 200_000
TEXTS = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "not JSON": b"{",
    "two texts": b"{} {}",
    "not UTF-8": b'{"format": "\xff"}',
    "a lone surrogate": b'{"\\ud800": 1}',
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "values without end": b"[" + b"0," * 3_000_000 + b"0]",
    "an endless number": b'{"format": ' + b"9" * 1_000_000 + b"}",
    "an endless name": b'{"' + b"x" * 10_000_000 + b'": 1}',
    **{f"bomb: {name}": bomb for name, bomb in BOMBS.items()},
    "NaN": b'{"format": NaN}',
    "Infinity": b'{"format": -Infinity}',
}

WRONG: dict[str, tuple[Any, ...]] = {
    "format 4": ("format", 4),
    "no source": ("source", ...),
    "unknown field": ("extra", 1),
    "tensors are a list": ("tensors", []),
    "a tensor is a number": (*QUERY, 7),
    "no scheme": (*QUERY, "scheme", ...),
    "scheme is null": (*QUERY, "scheme", None),
    "other scheme of other bytes": (*QUERY, "scheme", "int8"),
    "dense scheme": (*QUERY, "scheme", "f32"),
    "vector in bf16": (*NORM, "scheme", "bf16"),
    "vector in nl4": (*NORM, "scheme", "nl4"),
    "activation 7": (*QUERY, "activation", 7),
    "activation is a text": (*QUERY, "activation", "8"),
    "error is a text": (*QUERY, "error", "x"),
    "no dimensions": (*QUERY, "shape", []),
    "three dimensions": (*QUERY, "shape", [64, 1, 64]),
    "300,000 dimensions": (*QUERY, "shape", [1] * 300_000),
    "zero rows": (*QUERY, "shape", [0, 64]),
    "negative rows": (*QUERY, "shape", [-64, -64]),
    "2^63 rows": (*QUERY, "shape", [1 << 63, 64]),
    "product past 2^64": (*QUERY, "shape", [1 << 28, 1 << 28]),
    "rows are a fraction": (*QUERY, "shape", [64.5, 64]),
    "rows are true": (*QUERY, "shape", [True, 64]),
    "a dimension of 4,000 digits": (*QUERY, "shape", [10**4000, 64]),
    "other shape": (*QUERY, "shape", [65, 64]),
    "another shape of the same bytes": (*QUERY, "shape", [63, 64]),
    "vector of another length": (*NORM, "shape", [63]),
    "offset 0": (*QUERY, "extent", "offset", 0),
    "offset negative": (*QUERY, "extent", "offset", -64),
    "offset misaligned": (*QUERY, "extent", "offset", 257),
    "offset 2^63": (*QUERY, "extent", "offset", 1 << 63),
    "offset 2^64": (*QUERY, "extent", "offset", 1 << 64),
    "offset past the end": (*QUERY, "extent", "offset", 1 << 30),
    "offset a fraction": (*QUERY, "extent", "offset", 64.5),
    "offset a text": (*QUERY, "extent", "offset", "64"),
    "bytes 2^63": (*QUERY, "extent", "bytes", 1 << 63),
    "bytes negative": (*QUERY, "extent", "bytes", -1),
    "bytes one less": (*NORM, "extent", "bytes", 255),
    "checksum a number": (*QUERY, "extent", "sha256", 5),
    "tensor missing": (*QUERY, ...),
    "elsewhere, nowhere": (*QUERY, "extent", ELSEWHERE),
    "another file for nothing": ("other", FILE),
    "constant missing": ("constants", "rope.inverse_frequency", ...),
    "tables missing": ("constants", "tables.nl4", ...),
    "document past the end": ("documents", "tokenizer.json", {"offset": 1 << 40, "bytes": 9,
                                                              "sha256": ""}),
}  # fmt: skip

CONFIG: dict[str, tuple[str, Any]] = {
    "no layers": ("layers", 0),
    "one more layer": ("layers", 3),
    "2^24 layers": ("layers", 1 << 24),
    "2^63 layers": ("layers", 1 << 63),
    "hidden": ("hidden", 32),
    "no heads": ("heads", 0),
    "no key/value heads": ("kv_heads", 0),
    "heads that do not share": ("kv_heads", 3),
    "odd head size": ("head_dim", 15),
    "vast head size": ("head_dim", 1 << 20),
    "negative vocabulary": ("vocabulary", -1),
    "other vocabulary": ("vocabulary", 131),
    "context 0": ("context", 0),
    "context a text": ("context", "2048"),
    "theta a long text": ("rope_theta", "9" * 20_000_000),
    "theta a list": ("rope_theta", [1]),
    "theta too large": ("rope_theta", 10**400),
    "theta negative": ("rope_theta", -1.0),
    "theta missing": ("rope_theta", ...),
    "epsilon null": ("norm_epsilon", None),
    "epsilon 0": ("norm_epsilon", 0.0),
    "tied but with a head's sizes": ("hidden", 1 << 24),
    "biases that are not there": ("output_bias", True),
    "unknown activation": ("activation", "relu\n"),
    "unknown field": ("mystery", 1),
    "scaling without factors": ("rope_scaling", {"factor": 8.0}),
}


def put_at(whole: bytes, at: int, content: bytes) -> bytes:
    """The file with other bytes there."""
    return whole[:at] + content + whole[at + len(content) :]


def in_header(edit: Callable[[bytearray], Any], whole: bytes) -> bytes:
    """The file with another header."""
    out = bytearray(whole)
    edit(out)
    return bytes(out)


def in_other(name: str, manifest: Any) -> None:
    """A query that is said to be in another file, with its own numbers."""
    manifest["other"] = name
    manifest["tensors"]["layers.0.query"]["extent"] |= {"offset": 0, "elsewhere": True}


CASES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    **{f"header: {name}": (partial(in_header, edit), "") for name, edit in HEADERS.items()},
    **{f"text: {n}": (partial(with_manifest, manifest=text), "") for n, text in TEXTS.items()},
    **{f"manifest: {n}": (partial(edited, edit=set_at(*said)), "") for n, said in WRONG.items()},
    **{
        f"other: {n}": (partial(edited, edit=partial(in_other, name)), "")
        for n, name in OTHERS.items()
    },
    **{
        f"config: {n}": (partial(edited, edit=set_at("config", *said)), "")
        for n, said in CONFIG.items()
    },
}


class Reader(Base):
    """Small models in several schemes, one with experts."""

    file = FILE

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        path = folder / FILE
        self.wholes = [
            random_file(path, from_hugging_face(config), scheme, DOCUMENTS).read_bytes()
            for config, scheme in MODELS
        ]

    def write(self, rng: Random | None) -> None:
        """See Base."""
        content = self.wholes[0] if rng is None else self.changed(rng)
        (self.folder / FILE).write_bytes(content)

    def changed(self, rng: Random) -> bytes:
        """A file that some check has to find, or whose numbers are others."""
        whole = rng.choice(self.wholes)
        manifest = manifest_of(whole)
        chosen = rng.random()
        if chosen < 0.15:
            return changed_bytes(whole, rng, HEADER)
        if chosen < 0.3:
            return changed_bytes(whole, rng, WHERE.unpack_from(whole, 64)[0])
        if chosen < 0.4:
            return with_manifest(whole, changed_text(manifest, rng))
        if chosen < 0.5:
            at = manifest["documents"]["generation_config.json"]["offset"]
            return put_at(whole, at, as_json(changed_json(GENERATION, rng))[:ROOM].ljust(ROOM))
        part = rng.choice(("config", "tensors", "tensors", "documents", "constants"))
        manifest[part] = changed_json(manifest[part], rng)
        return with_manifest(whole, as_json(manifest) if rng.random() < 0.1 else manifest)

    def put(self, content: Callable[[bytes], bytes]) -> None:
        """What is made of the whole file."""
        super().put(content(self.wholes[0]))

    def read(self) -> None:
        """See Base."""
        path = self.folder / FILE
        with chalot.load(path, threads=1) as model:
            model.logits([0, 1, 0], last=1)
            model.sampling(seed=1)
            if "tokenizer.json" in model.file.manifest.documents:
                model.tokenizer.decode(model.tokenizer.encode("a"))
        chalot.describe(path)
