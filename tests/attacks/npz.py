"""An .npz and its manifest: what that says, the arrays' headers, the zip file's records."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from attacks.changes import changed_bytes, changed_text
from attacks.reader import Reader as Base
from chalot.formats.checkpoint import open_checkpoint

NPZ, MANIFEST = "m_quantized_q4.npz", "m_manifest_q4.json"
ENTRY = {
    **{"name": "w", "shape": [4, 6], "bit_width": 4, "q": "q", "q_scales": "s"},
    **{"q_zero_point": "z", "quantization": {"type": "perrow_int", "bits": 4, "method": "x"}},
}
GOOD = {"format_version": "2", "weights": [ENTRY]}
ARRAYS = {
    "q": np.zeros((4, 3), np.uint8),
    "s": np.ones(4, np.float32),
    "z": np.zeros(4, np.float32),
}


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


def good(method: int = zipfile.ZIP_STORED, **other: bytes) -> bytes:
    members = {f"{name}.npy": npy(array) for name, array in ARRAYS.items()}
    return zipped(members | {f"{name}.npy": content for name, content in other.items()}, method)


def pair(folder: Path, manifest: Any = GOOD, arrays: bytes | None = None) -> Path:
    raw = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(raw)
    (folder / NPZ).write_bytes(good() if arrays is None else arrays)
    return folder / MANIFEST


def read_all(path: Path) -> None:
    found = open_checkpoint(path)
    try:
        for name, info in found.tensors.items():
            found.float32(name, 0, min(info.shape[0], 100))
        for name in ("tokenizer.json", "config.json"):
            found.document(name)
    finally:
        found.close()


def changed(**fields: object) -> dict[str, Any]:
    return {**GOOD, "weights": [{**ENTRY, **fields}]}


MANIFESTS = {  # name -> (manifest, part of the message)
    "not json": (b"{]", "is not JSON"),
    "utf-8": (b'{"\xc3": 1}', "is not UTF-8"),
    "deep": (b'{"a":' * 100_000, "nested too deeply"),
    "twice": (b'{"weights":[],"weights":[]}', "is there twice"),
    "no weights": ({}, "has no weights"),
    "a config": ({"model_type": "llama"}, "has no weights"),
    "weights": ({"weights": "w"}, "expected a list or an object"),
    "version": ({**GOOD, "format_version": 3}, "format_version '3'"),
    "version list": ({**GOOD, "format_version": [2]}, "format_version"),
    "entry": ({"weights": [7]}, "no object with a name"),
    "name": (changed(name=7), "no object with a name"),
    "name twice": ({"weights": [ENTRY, ENTRY]}, "'w' is there twice"),
    "shape": (changed(shape="46"), "shape is not"),
    "shape 0": (changed(shape=[0, 6]), "shape is not"),
    "shape negative": (changed(shape=[-4, -6]), "shape is not"),
    "shape huge": (changed(shape=[1 << 62, 4]), "shape is not"),
    "shape bool": (changed(shape=[True, 6]), "shape is not"),
    "shape rank": (changed(shape=[2, 2, 6]), "shape is not"),
    "other shape": (changed(shape=[4, 7]), "expected 4 bytes a row"),
    "more rows": (changed(shape=[16777216, 6]), "expected 3 bytes a row"),
    "bits": (changed(bit_width=3), "'3' bits"),
    "bits huge": (changed(bit_width=10**400), "bits; expected"),
    "kind": (changed(quantization={"type": "gptq"}), "quantised as 'gptq'"),
    "quantization": (changed(quantization=[4]), "expected an object"),
    "axis": (changed(scale_axis={"index": 1}), "scales of axis"),
    "q": (changed(q=None), "not names of arrays"),
    "q list": (changed(q=["q"]), "not names of arrays"),
    "no scales": (changed(q_scales=None), "q_scales or q_zero_point is missing"),
    "missing array": (changed(q="absent"), "array 'absent' is missing"),
    "a path": (changed(q="../../etc/passwd"), "is missing"),
    "codes for scales": (changed(q_scales="q"), "expected one number"),
    "vector of codes": (changed(shape=[4]), "neither floats nor codes"),
    "document": ({**GOOD, "metadata": {"documents": {"x": "q"}}}, "document 'x' is not known"),
    "document type": ({**GOOD, "metadata": {"documents": {"config.json": 1}}}, "is not known"),
    "document of codes": (
        {**GOOD, "metadata": {"documents": {"tokenizer.json": "s"}}},
        "expected at most 128,000,000 bytes",
    ),
    "weights file": ({**GOOD, "metadata": {"weights_file": "../x.npz"}}, "plain name"),
    "weights file absolute": ({**GOOD, "npz": "/etc/passwd"}, "plain name"),
    "other bytes": ({**GOOD, "metadata": {"weights_bytes": 5}}, "its manifest says 5"),
    "metadata": ({**GOOD, "metadata": [1]}, "expected an object"),
    "architecture": ({**GOOD, "architecture": 7}, "expected an object"),
}


def pickled() -> bytes:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch /tmp/chalot-was-here",)

    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    start = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
    return start + pickle.dumps([Bomb()])


def with_header(text: str, content: bytes = bytes(12)) -> bytes:
    raw = text.encode()
    return b"\x93NUMPY\1\0" + len(raw).to_bytes(2, "little") + raw + content


def said(descr: object = "|u1", fortran: object = False, shape: object = (4, 3)) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': {fortran!r}, 'shape': {shape!r}, }}\n"


HEADERS = {
    "pickle": (pickled(), "an array of objects, a pickle"),
    "objects in fields": (with_header(said([("a", "|O")])), "is not what numpy writes"),
    "code": (with_header("__import__('os').system('x')\n"), "is not what numpy writes"),
    "deep": (with_header("(" * 3000), "is not what numpy writes"),
    "minus": (with_header("-" * 4000 + "1"), "is not what numpy writes"),
    "too long": (with_header(" " * 60000), "a header of 60,000 bytes"),
    "no magic": (b"PK\3\4" + bytes(200), "is no numpy array"),
    "version": (b"\x93NUMPY\x09\0" + bytes(200), "is no numpy array"),
    "cut": (b"\x93NUMPY\1", "is no numpy array"),
    "cut header": (b"\x93NUMPY\1\0\xff\0{", "a header of 255 bytes"),
    "columns first": (with_header(said(fortran=True)), "stored by columns"),
    "big-endian": (with_header(said(">f4"), bytes(48)), "numbers of type '>f4'"),
    "complex": (with_header(said("<c8"), bytes(96)), "numbers of type '<c8'"),
    "unknown": (with_header(said("|V2"), bytes(24)), "numbers of type '|V2'"),
    "no endian": (with_header(said("|f4"), bytes(48)), "numbers of type '|f4'"),
    "negative": (with_header(said(shape=(-4, -3))), "is not what numpy writes"),
    "huge": (with_header(said(shape=(10**30, 3))), "none of an array"),
    "overflow": (with_header(said(shape=(1 << 40, 1 << 40))), "takes"),
    "rank": (with_header(said(shape=(1,) * 40)), "none of an array"),
    "longer": (with_header(said(), bytes(13)), "takes"),
    "shorter": (with_header(said(), bytes(11)), "takes"),
    "other type": (with_header(said("<f8"), bytes(96)), "found shape (4, 3), expected (4, 6)"),
    "wide codes": (with_header(said("<i4"), bytes(48)), "neither floats nor codes"),
    "empty": (b"", "is no numpy array"),
}


def patched(content: bytes, signature: bytes, offset: int, value: bytes, which: int = 0) -> bytes:
    """The zip file with some bytes of its `which`-th record of a kind changed."""
    at = -1
    for _ in range(which + 1):
        at = content.index(signature, at + 1)
    return content[: at + offset] + value + content[at + offset + len(value) :]


LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
ZIPS = {
    "empty": (zipped({}), "array 'q' is missing"),
    "nothing": (b"PK\3\4", "is no whole zip file"),
    "method": (patched(good(), CENTRAL, 10, b"\x0c\0"), "packed by another method"),
    "encrypted": (patched(good(), CENTRAL, 8, b"\1\0"), "encrypted"),
    "offset": (patched(good(), CENTRAL, 42, b"\xff\xff\xff\x7f"), "m_quantized"),
    "same bytes": (patched(good(), CENTRAL, 42, bytes(4), 1), "run into what follows"),
    "longer than there is": (patched(good(), CENTRAL, 20, b"\0\0\0\x10" * 2), "run into"),
    "contradiction": (patched(good(), CENTRAL, 24, b"\x99\0\0\0"), "zip bomb"),
    "local name": (patched(good(), LOCAL, 26, b"\xff\xff"), "run into what follows"),
    "directory": (patched(good(), END, 12, b"\xff\xff\xff\x7f"), "is no whole zip file"),
    "checksum": (patched(good(), CENTRAL, 16, b"\1\2\3\4"), "wrong checksum"),
    "damaged": (good().replace(b"\0\0\x80\x3f" * 4, b"\0\0\x80\x40" * 4), "wrong checksum"),
}

CASES = {
    **{
        f"manifest: {name}": ((manifest, good()), said)
        for name, (manifest, said) in MANIFESTS.items()
    },
    **{f"array: {name}": ((GOOD, good(q=array)), said) for name, (array, said) in HEADERS.items()},
    **{f"zip: {name}": ((GOOD, content), said) for name, (content, said) in ZIPS.items()},
}


class Reader(Base):
    """A pair whose weights are codes of 4 bits."""

    file = "m_"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.zips = [good(method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]

    def write(self, rng: Random | None) -> None:
        """See Base."""
        manifest, arrays = json.dumps(GOOD).encode(), self.zips[0]
        chosen = 1.0 if rng is None else rng.random()
        if rng is not None:
            if chosen < 0.4:
                manifest = changed_text(GOOD, rng)
            elif chosen < 0.7:
                arrays = changed_bytes(rng.choice(self.zips), rng)
            else:
                name = rng.choice(list(ARRAYS))
                arrays = good(rng.choice((0, 8)), **{name: changed_bytes(npy(ARRAYS[name]), rng)})
        pair(self.folder, manifest, arrays)

    def put(self, content: Any) -> None:
        """A manifest and arrays."""
        pair(self.folder, *content)

    def read(self) -> None:
        """See Base."""
        read_all(self.folder / MANIFEST)
