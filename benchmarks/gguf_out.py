#!/usr/bin/env python3
"""GGUF files that chalot writes, as llama.cpp reads them.

    python benchmarks/gguf_out.py --peer-python PEERS/bin/python [--windows 12] [--types q4_k ...]

1. Tiny random models of every family: llama.cpp's logits of chalot's f32 file beside chalot's own.
2. The bundled model as f16: tokens of some texts, and ids that follow greedily, on both sides.
3. Each type, all matrices in it, written by chalot and by llama.cpp's quantiser from chalot's f16
   file: relative squared error of the weights; perplexity, and KL to f16, by llama.cpp's logits of
   one held-out text.

Appends a JSON line to results/gguf_out.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from chalot.convert import convert
from chalot.demo import FOLDER
from chalot.evaluate import PROTOCOL, compare
from chalot.export import export
from chalot.formats.checkpoint import open_checkpoint
from chalot.load import Model
from machine import HERE, describe_machine, provenance
from quality import Peer
from worker import Worker

sys.path.insert(0, str(HERE.parent / "tests" / "golden"))
from cases import CASES, Case, prompt, write_folder  # noqa: E402

TYPES = {  # chalot's name -> llama.cpp's, every tensor of that type
    "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k": "Q5_K_S", "q5_1": "Q5_1", "q5_0": "Q5_0",
    "q4_k": "Q4_K_S", "q4_1": "Q4_1", "q4_0": "Q4_0", "iq4_nl": "IQ4_NL", "iq4_xs": "IQ4_XS",
    "q3_k": "Q3_K_S", "q2_k": "Q2_K", "tq2_0": "TQ2_0", "tq1_0": "TQ1_0",
}  # fmt: skip
TINY = (
    *("qwen2", "qwen2-odd", "qwen2-yarn", "llama", "llama3", "llama-biases", "llama-linear"),
    *("tinyllama", "mistral-full", "qwen3", "gemma-f32", "olmo2", "smollm3", "stablelm"),
)
TEXTS = (
    "def read_lines(path):\n",
    "Once upon a time",
    "import numpy as np\n\nclass",
    "It's 3.14159 or 1,000,000.\n\n\tdef f(x): return x**2",
    "Gr\u00f6\u00dfe, na\u00efve, \u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d 1/2 \u20ac100",
    "for i in range(10):\n    ",
    "<|im_start|>user\nhi<|im_end|>",
)
GREEDY = 48  # ids after each text


def serve(file: Path, options: argparse.Namespace, *settings: str) -> Peer:
    """llama.cpp with a file."""
    command = [options.peer_python, "-m", "peers.llamacpp", "serve", str(file)]
    command += ["--context", str(Peer.context), "--threads", str(options.threads), *settings]
    worker = Worker(file.stem, command, file.with_suffix(".log"))
    return Peer(worker, file.stat().st_size, file.parent)


def usual(case: Case) -> Case:
    """A case without what llama.cpp has no place for: other scales of scores, bounds of yarn."""
    changes: dict[str, Any] = {}
    if case.name in ("gemma2", "gemma3"):
        changes = {"query_pre_attn_scalar": case.config["head_dim"]}
    if case.name == "qwen2-yarn":
        changes = {"rope_scaling": case.config["rope_scaling"] | {"beta_fast": 32.0}}
    return replace(case, config=case.config | changes)


def families(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Greatest difference of logits, as a share of their spread, and of choices."""
    for name in (*TINY, "gemma2", "gemma3"):
        case = usual(CASES[name])
        source = folder / name
        source.mkdir()
        write_folder(case, 0, source)
        export(source, folder / f"{name}.gguf", "gguf", "f32")
        convert(source, folder / f"{name}.myai", "f32")
        ids = [int(i) for i in prompt(case, 0)]
        with Model(folder / f"{name}.myai", kv="f32") as model:
            ours = model.logits(ids)
        peer = serve(
            folder / f"{name}.gguf", options, "--set", "flash", "off", "--set", "kv", "f32"
        )
        theirs = peer.logits(ids)
        peer.close()
        off = float(np.abs(ours - theirs).max() / (ours.max() - ours.min()))
        same = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
        print(f"{name:14} logits differ by {off:.1e} of their spread, same choice {same:.1%}")
        yield {"model": name, "tokens": len(ids), "difference": off, "same_choice": same}


def greedy(model: Any, ids: list[int]) -> list[int]:
    """Ids that follow, each the most likely."""
    out = list(ids)
    for _ in range(GREEDY):
        out.append(int(np.argmax(model.logits(out)[-1])))
    return out[len(ids) :]


def texts(folder: Path, peer: Peer) -> dict[str, Any]:
    """Whether f16 files of both sides agree in tokens and greedy ids; chalot's cache is float16."""
    convert(FOLDER, folder / "f16.myai", "f16")
    tokens = ids = 0
    with Model(folder / "f16.myai", kv="f16") as model:
        for text in TEXTS:
            ours = model.tokenizer.encode(text)
            tokens += ours == peer.worker.ask({"text": text})["ids"]
            ids += greedy(model, ours) == greedy(peer, ours)
    print(f"same tokens of {tokens} of {len(TEXTS)} texts, same {GREEDY} greedy ids after {ids}")
    return {"texts": len(TEXTS), "same_tokens": tokens, "greedy": GREEDY, "same_ids": ids}


def error(file: Path) -> float:
    """Relative squared error of all matrices."""
    lost = had = 0.0
    source, made = open_checkpoint(FOLDER), open_checkpoint(file)
    for name, info in source.tensors.items():
        if len(info.shape) == 2:
            x = source.float32(name).astype(np.float64)
            lost += float(((made.float32(name) - x) ** 2).sum())
            had += float((x**2).sum())
    source.close()
    made.close()
    return lost / had


def types(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Both sides' files of every type, measured by llama.cpp."""
    base = serve(folder / "F16.gguf", options)
    with Model(folder / "f16.myai") as model:
        text = (FOLDER / "heldout.txt").read_text("utf-8")
        ids = model.tokenizer.encode(text)[: options.windows * 512]
    for name in options.types:
        start = time.perf_counter()
        export(FOLDER, folder / f"{name}.gguf", "gguf", f"{name},embedding={name}")
        seconds = time.perf_counter() - start
        command = [options.peer_python, "-m", "peers.llamacpp", "make", str(FOLDER)]
        theirs = folder / f"{TYPES[name]}-peer.gguf"
        made = [*command, str(theirs), f"{TYPES[name]}-pure"]
        subprocess.run(made, cwd=HERE, check=True, capture_output=True)
        files = {"chalot": folder / f"{name}.gguf", "llama.cpp": theirs}
        peers = [serve(f, options) for f in files.values()]
        plain, *found = compare(base, peers, ids)  # type: ignore[arg-type]
        row: dict[str, Any] = {"type": name, "seconds": seconds, "f16": plain.perplexity}
        for (side, file), q, peer in zip(files.items(), found, peers, strict=True):
            peer.close()
            row[side] = {
                "bytes": file.stat().st_size, "error": error(file), "perplexity": q.perplexity,
                "kl": q.kl, "kl_error": q.kl_error,
            }  # fmt: skip
            lost = row[side]["error"]
            print(
                f"{name:7} {side:10} {file.stat().st_size:>11,} bytes  error {lost:.6f}"
                f"  perplexity {q.perplexity:9.4f}  KL {q.kl:.6f} +- {q.kl_error:.6f}",
                flush=True,
            )
        yield row
    base.close()


def main() -> None:
    """All three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="it has llama-cpp-python and gguf")
    parser.add_argument("--windows", type=int, default=12, help="of 512 held-out tokens")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny = list(families(folder, options))
        export(FOLDER, folder / "F16.gguf", "gguf", "f16")  # peers/llamacpp.py starts from it
        peer = serve(folder / "F16.gguf", options)
        same = texts(folder, peer)
        peer.close()
        rows = list(types(folder, options))
    line = {
        **provenance(sys.argv[1:], ("--peer-python",)), "machine": describe_machine(),
        "protocol": str(PROTOCOL), "families": tiny, "texts": same, "types": rows,
    }  # fmt: skip
    if not options.no_save:
        with (HERE / "results" / "gguf_out.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
