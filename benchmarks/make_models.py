#!/usr/bin/env python3
"""Checkpoints of random weights in the exact shapes of known models, to measure speed and memory.

    python benchmarks/make_models.py FOLDER [NAME ...]      # NAME: a row of SHAPES

Each is a Hugging Face folder: config.json, tokenizer.json, model.safetensors and the two small
configurations beside them. Matrices and biases are normal(0, 0.02) cut to bf16, norms are 1. The
tokenizer is a byte-level BPE with the Qwen2 pre-tokenizer and made-up merges up to the real
vocabulary's size, because that size decides how long it takes to load. BitNet's matrices are
random -1, 0 and 1, four a byte, with a scale of one number each.

Time and bytes depend on shapes only, so these stand in for a download of gigabytes. They say
nothing about quality: text is noise, and so is any loss measured on them.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Shape:
    """What decides a decoder's bytes and products, and the constants its configuration needs."""

    family: str  # "qwen2" has biases on q, k and v; "bitnet" packed matrices and more norms
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    tied: bool
    positions: int
    theta: float
    eps: float


SHAPES = {
    "qwen2.5-0.5b": Shape("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True, 32768, 1e6, 1e-6),
    "qwen2.5-1.5b": Shape("qwen2", 1536, 28, 12, 2, 128, 8960, 151936, True, 32768, 1e6, 1e-6),
    "tinyllama-1.1b": Shape("llama", 2048, 22, 32, 4, 64, 5632, 32000, False, 2048, 1e4, 1e-5),
    "bitnet-2b": Shape("bitnet", 2560, 30, 20, 5, 128, 6912, 128256, True, 4096, 5e5, 1e-5),
    # Seconds to convert, more than is made again without a word: for faults.py.
    "six-layers": Shape("qwen2", 896, 6, 14, 2, 64, 4864, 32000, True, 32768, 1e6, 1e-6),
    # Seconds instead of minutes, to try the benchmarks themselves.
    "tiny": Shape("qwen2", 256, 2, 4, 2, 64, 512, 2048, True, 4096, 1e6, 1e-6),
    "tiny-llama": Shape("llama", 256, 2, 4, 2, 64, 512, 2048, False, 2048, 1e4, 1e-5),
    "tiny-bitnet": Shape("bitnet", 256, 2, 4, 2, 64, 512, 2048, True, 4096, 5e5, 1e-5),
}

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ARCHITECTURES = {"bitnet": "BitNetForCausalLM"}  # others are named like their family
PACKED = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
ROWS_A_BYTE = 4
# Four weights + 1, two bits each, in every way: (81,) bytes
FOURS = sum(np.arange(81) // 3**i % 3 << 2 * i for i in range(4)).astype(np.uint8)
UNUSED_TAIL = 293  # Qwen2.5: 151,936 rows, of which the last 293 are special tokens or padding
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_alphabet() -> list[str]:
    """The 256 visible characters that byte-level BPE writes bytes as (GPT-2's table)."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = (byte for byte in range(256) if byte not in visible)
    stand_in = {byte: 256 + i for i, byte in enumerate(moved)}
    return [chr(stand_in.get(byte, byte)) for byte in range(256)]


def vocabulary_and_merges(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """`size` pieces: the bytes, then every run of lower-case letters, a space before it or not."""
    pieces = byte_alphabet()
    letters = pieces[ord("a") : ord("z") + 1]
    merges: list[tuple[str, str]] = []
    # `runs` grows while it is read: each run is extended by each letter, shorter runs first.
    runs = [*letters, pieces[ord(" ")]]
    for left in runs:
        room = size - len(pieces) - len(merges)
        if room == 0:
            break
        for letter in letters[:room]:
            merges.append((left, letter))
            runs.append(left + letter)
    return {piece: i for i, piece in enumerate(pieces + runs[27:])}, merges


def tokenizer_json(shape: Shape) -> dict[str, Any]:
    first = shape.vocabulary - UNUSED_TAIL
    ids, merges = vocabulary_and_merges(first)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": first + i, "content": text, "special": True, **flags}
            for i, text in enumerate(SPECIAL)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**split, "invert": False}, {**byte_level, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }


def configuration(shape: Shape) -> dict[str, Any]:
    first = shape.vocabulary - UNUSED_TAIL
    return {
        "architectures": [
            ARCHITECTURES.get(shape.family, f"{shape.family.capitalize()}ForCausalLM")
        ],
        "model_type": shape.family,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.feed_forward,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "relu2" if shape.family == "bitnet" else "silu",
        **({"quantization_config": PACKED} if shape.family == "bitnet" else {}),
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "torch_dtype": "bfloat16",
        "bos_token_id": first,
        "eos_token_id": first + 2,
    }


def weights(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, dimensions) of every tensor, in Hugging Face's names and file order."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (shape.hidden,)
        if shape.family == "bitnet":
            yield f"{prefix}.self_attn.attn_sub_norm.weight", (query,)
            yield f"{prefix}.mlp.ffn_sub_norm.weight", (shape.feed_forward,)
        for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            yield f"{prefix}.self_attn.{name}.weight", (rows, shape.hidden)
            if shape.family == "qwen2":
                yield f"{prefix}.self_attn.{name}.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (shape.hidden, query)
        yield f"{prefix}.post_attention_layernorm.weight", (shape.hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (shape.feed_forward, shape.hidden)
        yield f"{prefix}.mlp.up_proj.weight", (shape.feed_forward, shape.hidden)
        yield f"{prefix}.mlp.down_proj.weight", (shape.hidden, shape.feed_forward)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def stored(shape: Shape) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, type, dimensions) of every tensor of the file."""
    for name, dimensions in weights(shape):
        if shape.family == "bitnet" and name.endswith("_proj.weight"):
            yield name, "U8", (dimensions[0] // ROWS_A_BYTE, dimensions[1])
            yield name + "_scale", "BF16", (1,)
        else:
            yield name, "BF16", dimensions


def random_bytes(count: int, rng: np.random.Generator) -> Iterator[bytes]:
    """`count` bytes of four ternary weights each."""
    piece = 4 << 20
    for start in range(0, count, piece):
        yield FOURS[rng.integers(0, 81, min(piece, count - start), np.uint8)].tobytes()


def random_bf16(count: int, norm: bool, rng: np.random.Generator) -> Iterator[bytes]:
    """`count` bf16 values in pieces of 16 MB of float32, so that memory stays small."""
    piece = 4 << 20
    for start in range(0, count, piece):
        size = min(piece, count - start)
        values = np.ones(size, np.float32)
        if not norm:
            values = rng.standard_normal(size, np.float32) * np.float32(0.02)
        yield (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def write_safetensors(path: Path, shape: Shape) -> None:
    header, end = {}, 0
    for name, kind, dimensions in stored(shape):
        start, end = end, end + (1 if kind == "U8" else 2) * int(np.prod(dimensions))
        header[name] = {"dtype": kind, "shape": dimensions, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    rng = np.random.default_rng(1)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, kind, dimensions in stored(shape):
            count = int(np.prod(dimensions))
            if name.endswith("_scale"):
                pieces = iter([(np.array([0.02], np.float32).view("<u4") >> 16).astype("<u2")])
            else:
                norm = "norm" in name
                pieces = random_bytes(count, rng) if kind == "U8" else random_bf16(count, norm, rng)
            for piece in pieces:
                file.write(piece)


def make(name: str, folder: Path) -> Path:
    """Write model `name` to `folder`/`name` unless it is already there; the weights come last."""
    shape, target = SHAPES[name], folder / name
    done = target / "model.safetensors"
    if done.exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    config = configuration(shape)
    documents = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        },
        "tokenizer.json": tokenizer_json(shape),
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "bos_token": None,
            "eos_token": SPECIAL[2],
            "pad_token": SPECIAL[0],
            "add_bos_token": False,
            "add_prefix_space": False,
            "chat_template": TEMPLATE,
        },
    }
    for file, content in documents.items():
        (target / file).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    partial = done.with_suffix(".partial")
    write_safetensors(partial, shape)
    return partial.replace(done).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Write random checkpoints in known shapes.")
    parser.add_argument("folder", type=Path, help="each model becomes a folder in here")
    parser.add_argument("names", nargs="*", default=["qwen2.5-0.5b"], metavar="NAME",
                        help=f"one of: {', '.join(SHAPES)} (default: qwen2.5-0.5b)")  # fmt: skip
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in SHAPES:
            parser.error(f"no shape is called {name!r}; there are: {', '.join(SHAPES)}")
        print(make(name, arguments.folder))


if __name__ == "__main__":
    main()
