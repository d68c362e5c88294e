"""`.myai` files of version 2 for tests, written from the format's description alone."""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def rows8(weights: Floats) -> tuple[bytes, bytes, Floats]:
    """int8 codes and row scales, and what they stand for."""
    scale = (np.abs(weights).max(axis=1) / np.float32(127)).astype("<f4")
    q = np.rint(weights / scale[:, None]).astype(np.int8)
    return q.tobytes(), scale.tobytes(), q.astype(np.float32) * scale[:, None]


def rows4(weights: Floats, group: int) -> tuple[bytes, bytes, Floats]:
    """int4 codes (low nibble first) and scales of groups, and what they stand for."""
    rows, columns = weights.shape
    count = -(-columns // group)
    padded = np.zeros((rows, count * group), np.float32)
    padded[:, :columns] = weights
    grouped = padded.reshape(rows, count, group)
    scale = (np.abs(grouped).max(axis=2) / np.float32(7)).astype("<f4")
    q = np.clip(np.rint(grouped / np.maximum(scale, 1e-30)[:, :, None]), -8, 7)
    value = (q.astype(np.float32) * scale[:, :, None]).reshape(rows, -1)[:, :columns]
    nibbles = (q.reshape(rows, -1)[:, :columns] + 8).astype(np.uint8)
    packed = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    return packed.tobytes(), scale.tobytes(), value


def header(**changes: int) -> bytes:
    """256 bytes for the sizes of `write`, with some changed."""
    fields = {
        **{"magic": 0x4D594149, "version": 2, "dim": 64, "hidden": 96, "layers": 2, "heads": 4},
        **{"vocabulary": 130, "flags": 3, "experts": 0, "top_k": 0, "group": 32, "unused": 0},
        **{"context": 256, "theta": 1_000_000},
        **changes,
    }
    values = list(fields.values())
    out = bytearray(256)
    struct.pack_into("<8I", out, 0, *values[:8])
    struct.pack_into("<6I", out, 128, *values[8:])
    return bytes(out)


def write(
    path: Path, router: bool = False, depth: bool = False, other: bool = False, **changes: int
) -> dict[str, Floats]:
    """A file of random weights; returns the weights it stands for, by Hugging Face's names.

    With `experts` all are alike, but for the last one if `other`.
    """
    head = header(**changes)
    _, _, dim, hidden, layers, _, vocabulary, _ = struct.unpack_from("<8I", head)
    experts, _, group = struct.unpack_from("<3I", head, 128)
    rng, out = np.random.default_rng(0), bytearray(head)
    meant: dict[str, Floats] = {}

    def random(*shape: int) -> Floats:
        return (rng.standard_normal(shape, np.float32) * np.float32(0.2)).astype(np.float32)

    def vector(name: str) -> None:
        meant[name] = random(dim) + np.float32(1)
        out.extend(meant[name].tobytes())

    def matrix(name: str, rows: int, columns: int) -> None:
        data, scales, meant[name] = rows8(random(rows, columns))
        out.extend(data + scales)

    matrix("model.embed_tokens.weight", vocabulary, dim)
    for i in range(layers):
        p = f"model.layers.{i}."
        vector(p + "input_layernorm.weight")
        three = [rows8(random(dim, dim)) for _ in range(3)]
        for name, (_, _, value) in zip("qkv", three, strict=True):
            meant[f"{p}self_attn.{name}_proj.weight"] = value
        out += b"".join(data for data, _, _ in three) + b"".join(s for _, s, _ in three)
        matrix(p + "self_attn.o_proj.weight", dim, dim)
        vector(p + "post_attention_layernorm.weight")
        if router:
            out += random(max(experts, 1) * (dim + 1)).tobytes()
        both, down = rows4(random(2 * hidden, dim), group), rows4(random(dim, hidden), group)
        meant[p + "mlp.gate_proj.weight"] = both[2][:hidden]
        meant[p + "mlp.up_proj.weight"] = both[2][hidden:]
        meant[p + "mlp.down_proj.weight"] = down[2]
        blob = both[0] + both[1] + down[0] + down[1]
        out += blob * max(experts, 1)
        if other:
            out[-1] ^= 1
        if depth:
            out += random(dim * 32 + 65).tobytes()
    vector("model.norm.weight")
    matrix("lm_head.weight", vocabulary, dim)
    path.write_bytes(out)
    return meant
