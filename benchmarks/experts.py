#!/usr/bin/env python3
"""A mixture of experts: time against bytes read, for one token, for batches, and with few kept.

    python benchmarks/experts.py FOLDER [--layers 2] [--rounds 5]

FOLDER keeps the model: layers in the shapes of Qwen1.5-MoE-A2.7B (60 experts of 1,408, four for a
token, a shared one of 5,632), of random weights, in nl4, with a small vocabulary. A pass of several
tokens reads each expert that one of them chose once; its bytes are those of the experts that were
taken and of all else. With `--experts-resident` the rest is dropped and comes back by page faults,
from the page cache or the disk beneath: what that costs here says little of another disk.

Random routers choose evenly; trained ones do not quite. Prints tables and appends one line to
results/experts.jsonl.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import chalot
from chalot.formats.names import hugging_face
from chalot.formats.safetensors import write
from chalot.model.config import from_hugging_face
from chalot.model.layers import model_tensors
from machine import HERE, OthersWork, describe_machine, provenance

SHAPE = {
    "model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 4096, "qkv_bias": True,
    "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60,
    "num_experts_per_tok": 4, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": False, "norm_topk_prob": False,
}  # fmt: skip
PASSES = (1, 4, 16, 64, 256)
RESIDENT = (None, 60, 30, 8, 0)
TOKENS = 24


def make(folder: Path, layers: int) -> Path:
    """The model in nl4; made once."""
    out = folder / f"moe-{layers}.myai"
    if out.exists():
        return out
    source = folder / f"moe-{layers}"
    source.mkdir(parents=True, exist_ok=True)
    config = SHAPE | {"num_hidden_layers": layers}
    (source / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(0)
    noise = (draw.standard_normal(1 << 22, np.float32) * np.float32(0.02)).view(np.uint32) >> 16

    def values(shape: tuple[int, ...], norm: bool) -> np.ndarray:
        if norm:
            return np.full(shape, 0x3F80, "<u2")
        start = int(draw.integers(0, noise.size))
        return np.roll(np.resize(noise, shape).reshape(-1), start).astype("<u2").reshape(shape)

    tensors = model_tensors(from_hugging_face(config))
    write(
        source / "model.safetensors",
        [
            (
                hugging_face(t.name),
                "bf16",
                t.shape,
                lambda t=t: values(t.shape, t.name.endswith("norm")),
            )
            for t in tensors
        ],
    )
    chalot.convert(source, out, "nl4")
    (source / "model.safetensors").unlink()
    return out


def passes(path: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a pass of so many tokens, and the bytes that it reads."""
    rows = []
    with chalot.load(path, context=4096) as model:
        found = chalot.describe(path).mixture
        assert found is not None
        per_expert = found.expert_bytes // (found.layers * found.experts)
        rest = found.token_bytes - per_expert * found.layers * found.top
        for count in PASSES:
            seconds, taken = [], []
            for r in range(rounds + 1):
                ids = np.random.default_rng([count, r]).integers(0, 4096, count)
                before = [np.array(n) for n in model.engine.runnable.taken]
                start = time.perf_counter()
                model.logits(ids, last=1)
                seconds.append(time.perf_counter() - start)
                after = model.engine.runnable.taken
                taken.append(
                    sum(
                        int((b - a > 0).sum())
                        for a, b in zip(before, after, strict=True)
                        if len(a) > 1  # and not the shared one
                    )
                )
            took, of = median(seconds[1:]), median(taken[1:])
            read = rest + per_expert * of
            rows.append({"tokens": count, "seconds": took, "experts": of, "bytes": read})
    return rows


def kept(path: Path, resident: int | None) -> dict[str, Any]:
    """Seconds a token while decoding, with so many experts of a layer kept."""
    with chalot.load(path, context=1024, experts_resident=resident) as model:
        with model.session(temperature=1, seed=0, draft=False) as session:
            session.prefill([1, 2, 3])
            session.step()
            seconds = []
            for _ in range(TOKENS):
                start = time.perf_counter()
                session.step()
                seconds.append(time.perf_counter() - start)
            text = session.tokens[-8:]
        read = model.experts.report()
        assert read is not None
        said = {"taken": read.counted, "touched": read.touched_bytes, "kept": read.kept_bytes}
    return {"resident": resident, "seconds": median(seconds), **said, "text": text}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    path = make(arguments.folder, arguments.layers)
    found = chalot.describe(path).mixture
    with OthersWork() as others:
        batches = passes(path, arguments.rounds)
        memory = [kept(path, n) for n in RESIDENT]
    print(f"{'tokens':>6} {'ms':>8} {'ms each':>8} {'experts':>8} {'MB read':>8} {'GB/s':>6}")
    for row in batches:
        ms, read = row["seconds"] * 1e3, row["bytes"] / 1e6
        print(
            f"{row['tokens']:>6} {ms:>8.2f} {ms / row['tokens']:>8.2f} {row['experts']:>8.0f} "
            f"{read:>8.1f} {read / ms:>6.2f}"
        )
    print(f"\n{'kept':>6} {'ms a token':>10} {'MB touched':>10} {'MB kept':>8}")
    for row in memory:
        name = "all" if row["resident"] is None else row["resident"]
        print(
            f"{name:>6} {row['seconds'] * 1e3:>10.2f} {row['touched'] / 1e6:>10.1f} "
            f"{row['kept'] / 1e6:>8.1f}"
        )
    same = len({tuple(row["text"]) for row in memory}) == 1
    print(f"one text with all of them: {'yes' if same else 'NO'}")
    line = provenance(sys.argv[1:], ("folder",)) | {"machine": describe_machine(), **others.result}
    line |= {"mixture": vars(found), "passes": batches, "memory": memory, "same_text": same}
    with (HERE / "results" / "experts.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
