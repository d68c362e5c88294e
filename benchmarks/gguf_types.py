"""What becomes of GGUF's types when chalot runs them: the figures of docs/gguf.md.

    python benchmarks/gguf_types.py --peer-python PEERS/bin/python [--windows 20]

The bundled model goes to each type by llama.cpp's quantiser (all matrices to that one type, every
weight as important as any other), and the file is converted: to f32, which has what the file has;
to what `keep` takes; and to some schemes beside it. Of each are said the relative squared error
that converting added to the file's weights, the KL of its logits to llama.cpp's own of the same
file, and the KL to the original model, which has a float32 cache. llama.cpp rounds activations of
such files to 8 bits and has a float16 cache, so the f32 row is the distance between two programs,
not of chalot from the truth. Appends a JSON line to results/gguf_types.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from chalot.convert import ConvertReport, convert
from chalot.convert.keeping import KEEP
from chalot.demo import FOLDER
from chalot.evaluate import PROTOCOL, Quality, compare
from chalot.formats.gguf import GgufFile
from chalot.load import Model
from machine import HERE, provenance
from quality import Peer
from worker import Worker

TYPES = {  # GGUF's type -> llama.cpp's file type of nothing else; "": peers/gguf_pure.py makes it
    "F16": "F16", "BF16": "BF16-pure", "Q8_0": "Q8_0-pure", "Q6_K": "Q6_K-pure",
    "Q5_K": "Q5_K_S-pure", "Q5_1": "Q5_1-pure", "Q5_0": "Q5_0-pure", "Q4_K": "Q4_K_S-pure",
    "Q4_1": "Q4_1-pure", "Q4_0": "Q4_0-pure", "IQ4_NL": "IQ4_NL-pure", "IQ4_XS": "IQ4_XS-pure",
    "MXFP4": "", "Q3_K": "Q3_K_S-pure", "IQ3_S": "", "IQ3_XXS": "", "Q2_K": "Q2_K-pure",
    "IQ2_S": "", "IQ2_XS": "", "IQ2_XXS": "", "TQ1_0": "TQ1_0-pure", "TQ2_0": "TQ2_0-pure",
}  # fmt: skip
BESIDE = ("int8", "int6", "nl4", "int4")


def make(kind: str, folder: Path, python: str) -> Path:
    """The bundled model in one type."""
    out = folder / f"{kind}.gguf"
    command = [python, "-m", "peers.llamacpp", "make", str(FOLDER), str(out), TYPES[kind]]
    if not TYPES[kind]:
        command = [python, "peers/gguf_pure.py", str(folder / "F16.gguf"), str(out), kind]
    subprocess.run(command, cwd=HERE, check=True, capture_output=True)
    return out


def held(path: Path) -> str:
    """The types of a file's matrices."""
    with GgufFile(path) as file:
        return ", ".join(sorted({t.dtype for t in file.tensors.values() if len(t.shape) == 2}))


def added(report: ConvertReport) -> float:
    """Relative squared error of all matrices together, weighted by their number of weights."""
    kinds = [k for k in report.kinds if k.kind != "vector"]
    return sum(k.error * k.weights for k in kinds) / sum(k.weights for k in kinds)


class Remembered:
    """A model whose logits are asked for several times."""

    def __init__(self, model: Any) -> None:
        self.model, self.context = model, model.context
        self.known: dict[tuple[int, ...], Any] = {}

    def logits(self, ids: list[int]) -> Any:
        key = tuple(ids)
        if key not in self.known:
            self.known[key] = self.model.logits(ids)
        return self.known[key]


def rows(
    kind: str, folder: Path, base: Any, ids: list[int], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each scheme that the type is converted to."""
    path = make(kind, folder, options.peer_python)
    reports = {form: convert(path, folder / f"{form}.myai", form) for form in ("f32", KEEP)}
    kept = reports[KEEP].kinds[0].scheme
    for form in options.beside:
        if form != kept:  # which is there already
            reports[form] = convert(path, folder / f"{form}.myai", form)
    models = [Model(folder / f"{form}.myai", context=1024) for form in reports]
    limits = ["--context", "1024", "--threads", str(options.threads)]
    serve = [options.peer_python, "-m", "peers.llamacpp", "serve", str(path), *limits]
    peer = Peer(Worker(kind, serve, folder / "peer.log"), path.stat().st_size, folder)
    with closing(peer):
        theirs: Any = Remembered(peer)
        ours: list[Any] = [Remembered(model) for model in models]
        against_peer = compare(theirs, ours, ids)[1:]
        against_base = compare(base, [*ours, theirs], ids)[1:]
    types = held(path)

    def row(
        scheme: str, size: int, error: float | None, q: Quality, to_peer: Quality | None
    ) -> Any:
        found = {"type": kind, "holds": types, "scheme": scheme, "bytes": size, "added": error}
        found |= {"kl_original": q.kl, "kl_original_error": q.kl_error, "perplexity": q.perplexity}
        if to_peer is not None:
            found |= {"kl_peer": to_peer.kl, "kl_peer_error": to_peer.kl_error}
        return found

    yield row("llama.cpp", peer.size, None, against_base[-1], None)
    for (form, report), model, p, b in zip(
        reports.items(), models, against_peer, against_base[:-1], strict=True
    ):
        said = f"{form} ({kept})" if form == KEEP else form
        yield row(said, report.bytes, added(report), b, p)
        model.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=20, help="of 512 held-out tokens")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), metavar="TYPE")
    parser.add_argument("--beside", nargs="*", default=list(BESIDE), help="schemes beside keep")
    parser.add_argument("--peer-python", required=True, help="has llama-cpp-python and gguf")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    parser.add_argument("--no-save", action="store_true", help="print only")
    return parser.parse_args()


def main() -> None:
    """Every type, every scheme."""
    options = arguments()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        convert(FOLDER, folder / "base.myai", "bf16")
        with closing(Model(folder / "base.myai", context=1024, kv="f32")) as base:
            text = (FOLDER / "heldout.txt").read_text("utf-8")
            ids = base.tokenizer.encode(text)[: options.windows * 512]
            original = Remembered(base)
            make("F16", folder, options.peer_python)
            for kind in options.types:
                for row in rows(kind, folder, original, ids, options):
                    found.append(row)
                    peer = f"{row['kl_peer']:.5f}" if "kl_peer" in row else "-"
                    lost = "-" if row["added"] is None else f"{row['added']:.2g}"
                    print(
                        f"{kind:7} {row['scheme']:22} {row['bytes']:>11,} bytes  added {lost:8} "
                        f"KL to llama.cpp {peer:8} to the original {row['kl_original']:.5f}  "
                        f"perplexity {row['perplexity']:.3f}",
                        flush=True,
                    )
    made = provenance(sys.argv[1:], ("--peer-python",))
    line = {**made, "protocol": str(PROTOCOL), "tokens": len(ids), "rows": found}
    if not options.no_save:
        with (HERE / "results" / "gguf_types.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
