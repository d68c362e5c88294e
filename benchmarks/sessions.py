#!/usr/bin/env python3
"""Long texts: a saved session against reading the prompt again, and what a window costs.

    python benchmarks/sessions.py MODEL.myai [--tokens 4096] [--rounds 5] [--skip-windows]

First `--tokens` tokens are read, saved and restored, each in turn; the file is in the page cache.
Beside them parts of restoring: a plain read of the file, its checksum alone, and mapping it with
every page touched. Then, with the window of 1,024, decoding at the text's end against decoding with
everything in view. Last the bundled model, made for 1,024 tokens: perplexity of 8,192 held-out
tokens, the first 1,024 left out, read as one stream by window and sinks, and as disjoint texts of
the whole context. Prints tables, appends a line to results/sessions.jsonl.
"""

import argparse
import hashlib
import json
import mmap
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from chalot.convert import convert
from chalot.demo import FOLDER
from chalot.evaluate import log_softmax
from chalot.load import Model
from machine import HERE, OthersWork, describe_machine, provenance
from report import spread

SHAPES = ((None, None), (960, 4), (512, 4), (512, 0), (128, 4), (128, 0))


def timed(call: Callable[[], Any], times: list[float]) -> Any:
    """What the call gives; its seconds go to `times`."""
    start = time.perf_counter()
    out = call()
    times.append(time.perf_counter() - start)
    return out


def touch(path: Path) -> int:
    """Map a file privately and look at every page."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        array = np.frombuffer(view, np.uint8)
        total = int(array[::4096].sum())
        del array
    return total


def saving(path: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of each way to have `tokens` tokens in the cache."""
    names = ("prefill", "save", "restore", "next token", "plain read", "checksum", "map and touch")
    times: dict[str, list[float]] = {name: [] for name in names}
    rng = np.random.Generator(np.random.Philox(1))
    with tempfile.TemporaryDirectory() as folder:
        kept, buffer = Path(folder) / "text.session", bytearray()
        for _ in range(rounds):
            with Model(path, context=tokens + 256) as model:
                ids = rng.integers(0, model.config.vocabulary, tokens).tolist()
                session = model.session(temperature=0)
                timed(partial(session.prefill, ids), times["prefill"])
                timed(partial(model.save_session, session, kept), times["save"])
                expected = [session.step() for _ in range(4)]
            with Model(path, context=tokens + 256) as model:
                again = timed(partial(model.load_session, kept), times["restore"])
                first = timed(again.step, times["next token"])
                assert [first, *(again.step() for _ in range(3))] == expected
            size = kept.stat().st_size
            buffer = buffer or bytearray(size)
            with kept.open("rb", buffering=0) as file:
                timed(partial(file.readinto, buffer), times["plain read"])
            timed(partial(hashlib.sha256, buffer), times["checksum"])
            timed(partial(touch, kept), times["map and touch"])
    return {"tokens": tokens, "bytes": size, "seconds": {n: spread(t, 4) for n, t in times.items()}}


def decoding(path: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a token at the end of a text, and pages it holds."""
    out: dict[str, Any] = {}
    for name, window in (("all in view", None), ("window 1,024", 1024)):
        with Model(path, context=None if window else tokens + 256, window=window) as model:
            ids = (np.arange(tokens) * 37 % 1000).tolist()
            with model.session(temperature=0, draft=False) as session:
                session.prefill(ids)
                times: list[float] = []
                for _ in range(rounds * 8):
                    timed(session.step, times)
                held = [n for n in session.sequence.pages if n >= 0]
        out[name] = {
            "milliseconds": spread([t * 1000 for t in times], 3),
            "pages": len(held),
            "bytes": len(held) * model.engine.cache.shape.page_bytes,
        }
    return out


def windows(tokens: int) -> list[dict[str, Any]]:
    """Loss a token of one long stream, for each window."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.myai"
        convert(FOLDER, path, "int8")
        found = []
        for size, sinks in SHAPES:
            with Model(path, window=size, sinks=sinks) as model:
                text = (FOLDER / "heldout.txt").read_text("utf-8")
                ids = model.tokenizer.encode(text)[: tokens + 1]
                stream = [ids[:-1]] if size else [ids[i : i + 1024] for i in range(0, tokens, 1024)]
                losses: list[float] = []
                for part in stream:
                    at = len(losses)
                    for logits in model.logits_in_parts(part):
                        truth = ids[at + 1 :][: len(logits)]
                        losses += (-log_softmax(logits)[np.arange(len(truth)), truth]).tolist()
                        at += len(logits)
            behind = losses[1024:]
            found.append(
                {
                    "window": size,
                    "sinks": sinks,
                    "perplexity": float(np.exp(np.mean(behind))),
                    "error": float(np.std(behind) / len(behind) ** 0.5),  # of the loss
                    "last_quarter": float(np.exp(np.mean(losses[-(tokens // 4) :]))),
                }
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-windows", action="store_true")
    arguments = parser.parse_args()
    with OthersWork() as others:
        result = {
            "saving": saving(arguments.model, arguments.tokens, arguments.rounds),
            "decoding": decoding(arguments.model, arguments.tokens, arguments.rounds),
        }
        if not arguments.skip_windows:
            result["windows"] = windows(8192)
    kept = result["saving"]
    print(f"{kept['tokens']:,} tokens, {kept['bytes']:,} bytes")
    for name, seconds in kept["seconds"].items():
        print(f"  {name:14} {seconds['median']:8.4f} s")
    for name, d in result["decoding"].items():
        print(f"  {name:14} {d['milliseconds']['median']:8.2f} ms a token, {d['bytes']:,} bytes")
    for w in result.get("windows", []):
        name = f"{w['window']} + {w['sinks']}" if w["window"] else "texts of 1,024"
        print(f"  {name:14} perplexity {w['perplexity']:7.3f}, last {w['last_quarter']:7.3f}")
    line = {
        **provenance(sys.argv[1:], ("model",)),
        "machine": describe_machine() | others.result,
        "model": arguments.model.name,
        **result,
    }
    with (HERE / "results" / "sessions.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
