"""GGUF files for tests: any header, right or wrong, and a tiny model whole."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
NUMBERS = {np.dtype(c): n for n, c in ((0, "u1"), (1, "i1"), (4, "<u4"), (5, "<i4"), (6, "<f4"))}


class Raw(bytes):
    """A value already written, its type in front."""


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(found: Any) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(found, Raw):
        return found
    if isinstance(found, bool):
        return struct.pack("<IB", BOOL, found)
    if isinstance(found, int):
        return struct.pack("<II", U32, found)
    if isinstance(found, float):
        return struct.pack("<If", F32, found)
    if isinstance(found, (str, bytes)):
        return struct.pack("<I", STRING) + text(found)
    if isinstance(found, np.ndarray):
        head = struct.pack("<IIQ", ARRAY, NUMBERS[found.dtype], len(found))
        return head + found.tobytes()
    items = b"".join(text(item) for item in found)
    return struct.pack("<IIQ", ARRAY, STRING, len(found)) + items


def info(name: str | bytes, dimensions: Sequence[int], kind: int, offset: int) -> bytes:
    """A tensor's info; dimensions in GGUF's order, columns first."""
    rank = len(dimensions)
    return text(name) + struct.pack(f"<I{rank}QIQ", rank, *dimensions, kind, offset)


def pack(
    metadata: Mapping[str, Any] | Sequence[tuple[str, Any]] = (),
    tensors: Sequence[tuple[str, np.ndarray, int, Sequence[int]]] = (),
    *,
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
    infos: Sequence[bytes] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of (name, bytes, type, dimensions) tensors; `counts` and `infos` may lie."""
    pairs = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    body, made = b"", []
    for name, stored, kind, dimensions in tensors:
        body += bytes(-len(body) % alignment)
        made.append(info(name, dimensions, kind, len(body)))
        body += stored.tobytes()
    made = made if infos is None else list(infos)
    tensor_count, pair_count = counts
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(made) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    head += b"".join(text(key) + value(found) for key, found in pairs) + b"".join(made)
    return head + bytes(-len(head) % alignment) + body


HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, FEED, WORDS = 32, 2, 4, 2, 8, 64, 40


def model_metadata(architecture: str = "llama", **changed: Any) -> dict[str, Any]:
    """What a tiny model's header says of it."""
    found = {
        "general.architecture": architecture,
        f"{architecture}.context_length": 64,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.feed_forward_length": FEED,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0,
    }
    return found | changed


def interleaved(weight: np.ndarray, head: int) -> np.ndarray:
    """Rows of q or k as llama-family files have them, by reshaping."""
    halves = weight.reshape(-1, 2, head // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def model_tensors(tied: bool = True, seed: int = 1) -> dict[str, np.ndarray]:
    """GGUF's name -> float32 values in Hugging Face's order."""
    draw = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return draw.normal(0, 0.1, (rows, columns)).astype(np.float32)

    def vector() -> np.ndarray:
        return draw.normal(1, 0.1, HIDDEN).astype(np.float32)

    found = {"token_embd.weight": matrix(WORDS, HIDDEN), "output_norm.weight": vector()}
    if not tied:
        found["output.weight"] = matrix(WORDS, HIDDEN)
    for n in range(LAYERS):
        found |= {
            f"blk.{n}.attn_norm.weight": vector(),
            f"blk.{n}.ffn_norm.weight": vector(),
            f"blk.{n}.attn_q.weight": matrix(HEADS * HEAD, HIDDEN),
            f"blk.{n}.attn_k.weight": matrix(KV_HEADS * HEAD, HIDDEN),
            f"blk.{n}.attn_v.weight": matrix(KV_HEADS * HEAD, HIDDEN),
            f"blk.{n}.attn_output.weight": matrix(HIDDEN, HEADS * HEAD),
            f"blk.{n}.ffn_gate.weight": matrix(FEED, HIDDEN),
            f"blk.{n}.ffn_up.weight": matrix(FEED, HIDDEN),
            f"blk.{n}.ffn_down.weight": matrix(HIDDEN, FEED),
        }
    return found


def entries(
    tensors: Mapping[str, np.ndarray], permuted: bool = True
) -> list[tuple[str, np.ndarray, int, Sequence[int]]]:
    """float32 tensors for `pack`, with q and k interleaved if `permuted`."""
    out = []
    for name, weight in tensors.items():
        turned = permuted and (".attn_q." in name or ".attn_k." in name)
        stored = interleaved(weight, HEAD) if turned else weight
        out.append((name, stored, 0, tuple(reversed(weight.shape))))
    return out


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
