"""docs/format.md is enough to write a second reader: here is one, from that page alone.

`Reader` and what it calls use struct, json and numpy only. The tests then hold it, and the page's
own example, against chalot.
"""

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "format.md").read_text("utf-8")


def up(n: int, m: int) -> int:
    return -(-n // m) * m


class Reader:
    """Opens a file and gives every tensor as float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        assert len(self.data) >= 256
        magic, version = struct.unpack_from("<2I", self.data, 0)
        assert (magic, version) == (0x4D594149, 3)
        offset, size, whole = struct.unpack_from("<3Q", self.data, 64)
        assert whole == len(self.data) and offset >= 256 and size <= 64_000_000
        assert offset % 64 == 0 and offset + size <= whole
        raw = self.data[offset : offset + size]
        assert hashlib.sha256(raw).digest() == self.data[88:120]
        self.manifest: dict[str, Any] = json.loads(raw)
        assert self.header(offset, size) == self.data[:256]
        self.check_extents(offset)

    def header(self, offset: int, size: int) -> bytes:
        c = self.manifest["config"]
        out = bytearray(256)
        names = ("hidden", "feed_forward", "layers", "heads", "vocabulary")
        struct.pack_into("<8I", out, 0, 0x4D594149, 3, *(c[n] for n in names), 1)
        struct.pack_into("<2I", out, 32, c["kv_heads"], c["head_dim"])
        struct.pack_into("<3Q", out, 64, offset, size, len(self.data))
        out[88:120] = hashlib.sha256(self.data[offset : offset + size]).digest()
        struct.pack_into("<3I", out, 128, 0, 0, 32)
        theta = min(int(c["rope_theta"] * 100), 2**32 - 1)
        struct.pack_into("<2I", out, 144, c["context"], theta)
        return bytes(out)

    def check_extents(self, manifest_at: int) -> None:
        m = self.manifest
        shared: dict[tuple, tuple] = {}  # extent -> scheme and shape of all tensors in it
        for t in m["tensors"].values():
            what = (t["scheme"], tuple(t["shape"]))
            assert shared.setdefault(tuple(t["extent"].items()), what) == what
        extents = [dict(e) for e in shared]
        extents += [*m["documents"].values(), *m["constants"].values()]
        elsewhere = [e for e in extents if e.get("elsewhere", False)]
        extents = [e for e in extents if e not in elsewhere]
        for e in elsewhere:
            assert e["offset"] == 0 and hashlib.sha256(self.extent(e)).hexdigest() == e["sha256"]
        reached = 256
        for e in sorted(extents, key=lambda e: e["offset"]):
            assert e["offset"] % 64 == 0 and reached <= e["offset"] < reached + 64
            assert not any(self.data[reached : e["offset"]])  # gaps are zero
            reached = e["offset"] + e["bytes"]
            assert reached <= manifest_at
            assert hashlib.sha256(self.extent(e)).hexdigest() == e["sha256"]

    def extent(self, e: dict[str, Any]) -> bytes:
        if e.get("elsewhere", False):
            other = Reader(self.path.parent / self.manifest["other"])
            m = other.manifest
            all_of_it = [t["extent"] for t in m["tensors"].values()]
            all_of_it += [*m["documents"].values(), *m["constants"].values()]
            held = (x for x in all_of_it if not x.get("elsewhere", False))
            same = (x for x in held if (x["sha256"], x["bytes"]) == (e["sha256"], e["bytes"]))
            return other.extent(next(same))
        return self.data[e["offset"] : e["offset"] + e["bytes"]]

    def tensor(self, name: str) -> np.ndarray:
        t = self.manifest["tensors"][name]
        raw = self.extent(t["extent"])
        if len(t["shape"]) == 1:
            assert t["scheme"] == "f32" and len(raw) == 4 * t["shape"][0]
            return np.frombuffer(raw, "<f4")
        if t["scheme"] in ("f32", "f16", "bf16"):
            return dense(raw, t["scheme"], *t["shape"])
        return self.coded(raw, t["scheme"], *t["shape"])

    def coded(self, raw: bytes, scheme: str, rows: int, columns: int) -> np.ndarray:
        table = None
        if scheme in ("nl4", "int4", "nl3", "nl2"):
            extent = self.manifest["constants"][f"tables.{scheme}"]
            table = np.frombuffer(self.extent(extent), "i1").reshape(256, 16)
        if scheme not in ("nl4", "int4", "int8"):
            return of_others(raw, scheme, rows, columns, table)
        return coded(raw, scheme, rows, columns, table)


def dense(raw: bytes, scheme: str, rows: int, columns: int) -> np.ndarray:
    kind = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}[scheme]
    numbers = np.frombuffer(raw, kind).reshape(rows, up(columns, 16))
    if scheme == "bf16":
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    assert not numbers[:, columns:].any()
    return numbers[:, :columns].astype(np.float32)


def coded(raw: bytes, scheme: str, rows: int, columns: int, table: np.ndarray | None) -> np.ndarray:
    segment_columns = 128 if scheme == "int8" else 512
    panels, groups = up(rows, 16) // 16, up(columns, 32) // 32
    per_row = up(32 * groups, segment_columns) // segment_columns
    panel_bytes = groups * (512 if scheme == "int8" else 272)
    segments_at = up(panels * panel_bytes, 64)
    scales_at = up(segments_at + panels * per_row * 16 * 2, 64)
    assert len(raw) == scales_at + panels * 16 * 4
    segments = np.frombuffer(raw, "<f2", panels * per_row * 16, segments_at)
    scales = np.frombuffer(raw, "<f4", panels * 16, scales_at)

    r, k = np.mgrid[0:rows, 0:columns]
    j, g, c = r % 16, k // 32, k % 32
    panel = r // 16 * panel_bytes
    codes = np.frombuffer(raw, np.uint8)
    if scheme == "int8":
        at = 512 * g + 256 * (c // 16) + 64 * (j % 4) + 16 * (j // 4) + c % 16
        value = codes[panel + at].view(np.int8)
    else:
        assert table is not None
        b, i = g // 4, g % 4
        n = np.minimum(groups - 4 * b, 4)
        byte = codes[panel + 1088 * b + 256 * i + 64 * (j % 4) + 16 * (j // 4) + c % 16]
        level = codes[panel + 1088 * b + 256 * n + 16 * i + j]
        value = table[level, np.where(c < 16, byte & 15, byte >> 4)]
    segment = segments[(r // 16 * per_row + k // segment_columns) * 16 + j].astype(np.float32)
    return value.astype(np.float32) * (scales[r] * segment)


# scheme -> codes as, S, step and middle of the value, group_bytes, whole, offsets
OTHERS = {
    "int6": ("sixes", 128, 1, 32, 384, True, False),
    "nl3": ("threes", 512, 0, 0, 208, True, False),
    "nl2": ("crumbs", 512, 0, 0, 144, True, False),
    "ternary": ("trits", 512, 1, 1, 104, True, False),
    "sign": ("bits", 512, 2, 1, 64, True, False),
    "row8": ("bytes", None, 0, 0, 512, False, True),
    "row4": ("nibbles", None, 1, 8, 256, False, True),
    "row2": ("crumbs", None, 1, 2, 128, True, True),
    "row1": ("bits", None, 2, 1, 64, True, False),
}


def code_of(kind: str, data: np.ndarray, block: Any, s: Any, line: Any, y: Any) -> np.ndarray:
    at = 64 * line + y
    if kind == "bytes":
        return data[block + 256 * s + at]
    if kind == "nibbles":
        return data[block + 256 * (s // 2) + at] >> 4 * (s % 2) & 15
    if kind == "crumbs":
        return data[block + 256 * (s // 4) + at] >> 2 * (s % 4) & 3
    if kind == "bits":
        return data[block + at] >> s & 1
    if kind == "sixes":
        low = code_of("nibbles", data, block, s, line, y)
        return low | code_of("crumbs", data, block + 1024, s, line, y) << 4
    if kind == "threes":
        low = code_of("crumbs", data, block, s, line, y)
        return low | code_of("bits", data, block + 512, s, line, y) << 2
    cases = [s < 5, line < 2, s < 7]
    byte = np.select(cases, [at, 256 + at, 256 + at - 128], 384 + y % 32)
    digit = np.select(cases, [s, s - 5, s - 2], 2 * (line - 2) + y // 32)
    return (data[block + byte] * 3**digit % 256) * 3 // 256


def of_others(raw: bytes, scheme: str, rows: int, columns: int, table: Any) -> np.ndarray:
    kind, segment_columns, step, middle, group_bytes, whole, offsets = OTHERS[scheme]
    panels = up(rows, 16) // 16
    groups = up(columns, 128 if whole else 32) // 32
    per_row = up(columns, segment_columns) // segment_columns if segment_columns else 0
    panel_bytes = groups * group_bytes
    segments_at = up(panels * panel_bytes, 64)
    scales_at = up(segments_at + panels * per_row * 32, 64)
    offsets_at = up(scales_at + panels * 64, 64)
    assert len(raw) == (offsets_at + panels * 64 if offsets else scales_at + panels * 64)
    r, k = np.mgrid[0:rows, 0:columns]
    j, p = r % 16, r // 16
    data = np.frombuffer(raw, np.uint8).astype(np.int64)
    block = p * panel_bytes + k // 128 * 4 * group_bytes
    code = code_of(kind, data, block, k % 128 // 16, j % 4, 16 * (j // 4) + k % 16)
    if table is not None:
        value = table[data[block + 4 * (group_bytes - 16) + 16 * (k // 32 % 4) + j], code]
    else:
        value = step * code - middle if step else code.astype(np.uint8).view(np.int8)
    factor = np.frombuffer(raw, "<f4", panels * 16, scales_at)[r]
    if per_row:
        segments = np.frombuffer(raw, "<f2", panels * per_row * 16, segments_at)
        part = segments[(p * per_row + k // segment_columns) * 16 + j].astype(np.float32)
        factor = factor * part
    out = value.astype(np.float32) * factor
    return out + np.frombuffer(raw, "<f4", panels * 16, offsets_at)[r] if offsets else out


# ---- against chalot


def write_checkpoint(folder: Path) -> Path:
    """A tiny model with odd sizes, its weights random."""
    import tiny
    from chalot.formats.names import hugging_face
    from chalot.formats.safetensors import write
    from chalot.model.layers import model_tensors

    config = tiny.config(feed_forward=1100, rope_theta=500000.0)
    document = {
        "model_type": "qwen2",
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.feed_forward,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_epsilon,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(document))
    rng = np.random.Generator(np.random.Philox(1))
    tensors = [
        (hugging_face(t.name), "f32", t.shape, tiny.bell(rng, t.shape, 0.125))
        for t in model_tensors(config)
    ]
    write(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize(
    "scheme",
    ["nl4", "int8", "f32", "int4", *OTHERS, "attention=int8,ffn=nl4,embedding=bf16,head=f16"],
)
def test_a_second_reader_finds_the_same_floats(scheme: str, tmp_path: Path) -> None:
    import chalot
    from chalot.formats.myai import MyaiFile
    from chalot.quant import codes, packing

    path = tmp_path / "tiny.myai"
    chalot.convert(write_checkpoint(tmp_path / "source"), path, scheme)
    reader, file = Reader(path), MyaiFile(path)
    assert set(reader.manifest["tensors"]) == set(file.manifest.tensors)
    used = set()
    for name, entry in file.manifest.tensors.items():
        used.add(entry.scheme)
        if len(entry.shape) == 1:
            expected = file.vector(name)
        else:
            m = file.matrix(name)
            if m.scheme.is_coded:
                expected = codes.dequantize(packing.unpack(m.data, m.scheme, m.shape))
            else:
                expected = packing.numbers(m)[:, : m.shape[1]]
        got = reader.tensor(name)
        assert got.shape == entry.shape == tuple(reader.manifest["tensors"][name]["shape"])
        np.testing.assert_array_equal(got, expected, err_msg=name)
    assert used == {"f32"} | {part.split("=")[-1] for part in scheme.split(",")}
    assert reader.extent(reader.manifest["documents"]["config.json"]) == file.document(
        "config.json"
    )
    frequencies = reader.extent(reader.manifest["constants"]["rope.inverse_frequency"])
    assert len(frequencies) == 4 * file.manifest.config["head_dim"] // 2
    file.close()


def test_a_second_reader_finds_what_is_elsewhere(tmp_path: Path) -> None:
    import chalot

    source = write_checkpoint(tmp_path / "source")
    chalot.convert(source, tmp_path / "base.myai", "int8")
    chalot.convert(source, tmp_path / "whole.myai", "attention=nl4,ffn=int8,embedding=int8")
    part = tmp_path / "part.myai"
    scheme = "attention=nl4,ffn=int8,embedding=int8"
    chalot.convert(source, part, scheme, share=tmp_path / "base.myai")
    reader, whole = Reader(part), Reader(tmp_path / "whole.myai")
    assert len(reader.data) < len(whole.data)
    for name in whole.manifest["tensors"]:
        np.testing.assert_array_equal(reader.tensor(name), whole.tensor(name), err_msg=name)


# ---- the page's example


def block(name: str) -> str:
    found = re.search(rf"```{name}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_headers_bytes_are_what_the_page_shows() -> None:
    from chalot.formats.myai.manifest import header_bytes

    sizes = {"hidden": 160, "feed_forward": 1100, "layers": 2, "heads": 6, "kv_heads": 2}
    config = {**sizes, "head_dim": 24, "vocabulary": 301, "context": 1024, "rope_theta": 10000.0}
    where = (0x54C0, 0x1A2B, 0x54C0 + 0x1A2B, bytes(range(32)))
    header = header_bytes(config, where)
    shown = b"".join(bytes.fromhex(line[3:]) for line in block("header").splitlines())
    assert header == shown + bytes(256 - len(shown))


@pytest.mark.parametrize("scheme", ["nl4", "int8"])
def test_the_weight_is_where_the_page_says(scheme: str) -> None:
    from chalot.quant import codes, packing
    from chalot.quant.grids import named_tables
    from chalot.quant.scheme import SCHEMES

    r, k = np.mgrid[0:3, 0:40]
    w = (((40 * r + k) * 7919 % 1001 - 500) / 512).astype(np.float32)
    assert w[1, 35] == -0.328125
    extent = packing.pack(codes.quantize(w, SCHEMES[scheme])).tobytes()
    said = block(scheme)
    bytes_said = re.findall(r"= (\d+) +((?:[0-9a-f]{2} )*[0-9a-f]{2})(?= {3})", said)
    assert len(bytes_said) == (4 if scheme == "nl4" else 3)
    for at, shown in bytes_said:
        assert extent[int(at) :][: len(bytes.fromhex(shown))].hex(" ") == shown
    weight = re.findall(r"^weight .* (-[\d.]+)$", said, re.MULTILINE)
    table = named_tables("nl4") if scheme == "nl4" else None
    got = coded(extent, scheme, 3, 40, table)
    assert got[1, 35] == np.float32(weight[0])
