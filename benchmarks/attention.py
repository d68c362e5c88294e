"""Attention of one layer against naive attention: time and peak memory by length.

    python benchmarks/attention.py [--tokens 512,1024,2048,8192] [--rounds 3] [--threads 2]

In the shapes of Qwen2.5-0.5B: 14 query heads and 2 of keys and values, of 64. Ours runs a program
of embed (which hands it queries, keys and values), rope and store, attend, in chunks of 256 tokens
as prompts are read, then one token more; int8, f16 and f32 caches. Naive is numpy with its BLAS:
the whole matrix of scores of all heads in float32, softmax in place, times the values; it has no
rope and no cache to write. Every side and length runs in a process of its own. Memory is the peak
beyond queries, keys and values: of ours slots, scratch and the cache. A measurement that other
processes disturbed is tried again; the quietest counts. Appends a JSON line to
results/attention.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from machine import OthersWork, describe_machine, provenance
from report import spread

HEADS, KV_HEADS, DIM = 14, 2, 64
CHUNK = 256
SIDES = ("naive", "int8", "f16", "f32")
QUIET = 0.1  # CPUs that others may keep busy
Floats = NDArray[np.float32]


def inputs(tokens: int) -> Floats:
    """(tokens, (heads + 2 kv_heads) * head_dim): queries, keys and values of each token."""
    width = (HEADS + 2 * KV_HEADS) * DIM
    return np.random.default_rng(0).standard_normal((tokens, width), np.float32)


def by_head(x: Floats) -> tuple[Floats, Floats, Floats]:
    """Queries, keys and values (heads, tokens, head_dim)."""
    parts = np.ascontiguousarray(x.reshape(len(x), -1, DIM).transpose(1, 0, 2))
    return parts[:HEADS], parts[HEADS : HEADS + KV_HEADS], parts[HEADS + KV_HEADS :]


def naive(q: Floats, k: Floats, v: Floats) -> Floats:
    """(heads, queries, head_dim); the queries are the last tokens of the keys."""
    share, last = HEADS // KV_HEADS, q.shape[1]
    rows = q.reshape(KV_HEADS, share * last, DIM) * np.float32(DIM**-0.5)
    scores = (rows @ k.transpose(0, 2, 1)).reshape(HEADS, last, -1)
    for i in range(last):
        scores[:, i, scores.shape[2] - last + i + 1 :] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return (scores.reshape(KV_HEADS, share * last, -1) @ v).reshape(HEADS, last, DIM)


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


class Peak:
    """The growth of resident memory, at its highest, in a `with` block."""

    def __enter__(self) -> "Peak":
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
        self.before = status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = max(0, status("VmHWM") - self.before)


def timed(rounds: int, call: Callable[[], object]) -> list[float]:
    """Seconds of each round."""
    out = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        out.append(time.perf_counter() - start)
    return out


def measure_naive(tokens: int, rounds: int) -> dict[str, Any]:
    q, k, v = by_head(inputs(tokens + 1))
    prompt = [np.ascontiguousarray(part[:, :tokens]) for part in (q, k, v)]
    with Peak() as peak:
        naive(*prompt)
    one = np.ascontiguousarray(q[:, -1:])
    return {
        "prefill": timed(rounds, lambda: naive(*prompt)),
        "decode": timed(rounds * 20, lambda: naive(one, k, v)),
        "peak_bytes": peak.bytes,
    }


def measure_ours(kind: str, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    from chalot.kernels.backend import open_backend
    from chalot.kernels.program import Batch, CacheShape, Op, Part, Program, Slot
    from chalot.model.cache import PageCache, Sequence
    from chalot.quant.packing import Matrix, pack_dense
    from chalot.quant.scheme import Scheme

    x = inputs(tokens + 1)
    f32 = Scheme.parse("f32")
    matrix = Matrix(f32, (len(x), x.shape[1]), pack_dense(x, f32))
    shape = CacheShape(kind, 1, KV_HEADS, DIM)
    ops = (
        Op("embed", target=0, parts=(Part(matrix),)),
        Op("rope_store", 0),
        Op("attend", 0, 1, number=DIM**-0.5),
    )
    # frequencies of 0: rope is computed and turns nothing, so naive needs none for the same result
    frequencies = np.zeros((1, DIM // 2), np.float32)
    slots = (Slot(x.shape[1]), Slot(HEADS * DIM))
    backend = open_backend(threads=threads)

    with Peak() as peak:
        ready = backend.compile(Program(slots, ops, shape, HEADS, frequencies, 0))
        cache = PageCache(shape, tokens + 1)
        sequence = Sequence(cache)
        sequence.reserve(tokens + 1)
        pages = cache.tables([sequence])

        def run(first: int, last: int) -> None:
            at = np.arange(first, last, dtype=np.int32)
            ready.run(Batch(at, at, np.zeros(last - first, np.int32), pages), cache.arena)

        def prefill() -> None:
            for first in range(0, tokens, CHUNK):
                run(first, min(first + CHUNK, tokens))

        prefill()
    q, k, v = by_head(x)
    here = min(CHUNK, tokens)
    truth = naive(q[:, tokens - here : tokens], k[:, :tokens], v[:, :tokens])
    off = ready.slot(1, here).reshape(here, HEADS, DIM).transpose(1, 0, 2) - truth
    return {
        "prefill": timed(rounds, prefill),
        "decode": timed(rounds * 20, lambda: run(tokens, tokens + 1)),
        "peak_bytes": peak.bytes,
        "cache_bytes": cache.count * shape.page_bytes,
        "error": float(np.sqrt((off**2).mean() / (truth**2).mean())),
        "kernels": backend.name,
    }


def child(side: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """One side at one length, in a process of its own; more rounds of what is short."""
    command = [sys.executable, __file__, "--child", side, "--tokens", str(tokens)]
    rounds = options.rounds * max(1, 8192 // tokens)
    command += ["--rounds", str(rounds), "--threads", str(options.threads)]
    limits = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), str(options.threads))
    environment = {**os.environ, **limits}
    with OthersWork() as others:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    found: dict[str, Any] = json.loads(done.stdout)
    row = {"side": side, "tokens": tokens, **found, **others.result}
    row["prefill_milliseconds"] = spread([1e3 * s for s in row.pop("prefill")], 2)
    decode = row.pop("decode")
    row["decode_microseconds"] = spread([1e6 * s for s in decode], 1)
    del row["decode_microseconds"]["rounds"]
    return row


def quietest(side: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Of at most `tries` measurements the one that others disturbed least."""
    tried: list[dict[str, Any]] = []
    while len(tried) < options.tries and all(t.get("others_cpus", 0) > QUIET for t in tried):
        time.sleep(5 * len(tried))
        tried.append(child(side, tokens, options))
    return min(tried, key=lambda row: row.get("others_cpus", 0.0))


def show(rows: list[dict[str, Any]]) -> None:
    """The table of docs/performance.md."""
    print("| tokens | attention | prefill, ms | one token, us | peak, MB | error |")
    print("|---:|---|---:|---:|---:|---:|")
    for row in rows:
        prefill, decode = row["prefill_milliseconds"], row["decode_microseconds"]
        error = f"{row['error']:.4f}" if "error" in row else "-"
        print(
            f"| {row['tokens']:,} | {row['side']} | {prefill['median']:,.1f} "
            f"({prefill['min']:,.1f}-{prefill['max']:,.1f}) | {decode['median']:,.0f} "
            f"| {row['peak_bytes'] / 1e6:,.1f} | {error} |"
        )


def main() -> None:
    """All sides in turn at each length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="512,1024,2048,8192", help="lengths")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tries", type=int, default=5, help="while others keep the machine busy")
    parser.add_argument("--no-save", action="store_true", help="only print")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    lengths = [int(n) for n in options.tokens.split(",")]
    if options.child == "naive":
        print(json.dumps(measure_naive(lengths[0], options.rounds)))
        return
    if options.child:
        found = measure_ours(options.child, lengths[0], options.rounds, options.threads)
        print(json.dumps(found))
        return
    rows = [quietest(side, tokens, options) for tokens in lengths for side in SIDES]
    show(rows)
    busy = max(row.get("others_cpus", 0.0) for row in rows)
    print(f"others kept up to {busy} CPUs busy", file=sys.stderr)
    line = {**provenance(sys.argv[1:], ()), "machine": describe_machine()}
    line |= {"numpy": np.__version__, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM}
    line |= {"threads": options.threads, "rows": rows}
    if not options.no_save:
        with (Path(__file__).parent / "results" / "attention.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
