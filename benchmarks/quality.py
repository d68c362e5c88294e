"""What each choice costs in quality on the bundled model and its outlier twin.

    python benchmarks/quality.py [--windows 60] [--peer-python PEERS/bin/python]

Every scheme, the head in 8 bits against 4, activations of 8 and 16 bits, folding and calibration on
and off; perplexity and KL to the bf16 original, which alone has a float32 cache, on held-out text,
one protocol. With --peer-python llama.cpp's types as well, by its own logits of the same windows;
its "F16" shows what another engine's arithmetic alone makes of it. Appends a JSON line to
results/quality.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from chalot.convert import convert
from chalot.convert.conversion import Conversion
from chalot.convert.refining import Refine
from chalot.demo import FOLDER, write_twin
from chalot.evaluate import PROTOCOL, compare
from chalot.load import Model
from chalot.plan import plan
from machine import HERE, provenance
from worker import Worker


@dataclass(frozen=True)
class Form:
    """How a model is stored: a scheme, or a plan of `size` bytes."""

    scheme: str
    activations: int | None = None  # forced
    calibrated: bool = True
    refine: str | None = None
    size: int | None = None


FORMS = {
    "bf16": Form("bf16"),
    "bf16, 8-bit activations": Form("bf16", 8),
    "bf16, 16-bit activations": Form("bf16", 16),
    "int8": Form("int8"),
    "int8, not calibrated": Form("int8", calibrated=False),
    "nl4": Form("nl4"),
    "nl4, int8 embedding": Form("embedding=int8"),
    "nl4, int8 attention": Form("attention=int8"),
    "nl4, 16-bit activations": Form("nl4", 16),
    "nl4, 8-bit activations": Form("nl4", 8),
    "nl4, not calibrated": Form("nl4", calibrated=False),
    "nl4, gptq": Form("nl4", refine="gptq"),
    "planned, size of Q4_0": Form("nl4", size=3_671_136),
    "planned, size of Q4_0, gptq": Form("nl4", refine="gptq", size=3_671_136),
    "planned, size of Q4_K_M, gptq": Form("nl4", refine="gptq", size=3_789_408),
}
PEER_TYPES = ("F16", "Q8_0", "Q4_K_M", "IQ4_NL", "Q4_0", "Q4_0-pure")


def make(source: Path, out: Path, form: Form) -> None:
    """Convert, planned, refined, or with calibration left out, where asked."""
    planned = None
    if form.size:
        planned = out.with_suffix(".json")
        plan(source, planned, method="measured", size=form.size)
    refine = Refine.of(form.refine) if form.refine else None
    if form.calibrated:
        convert(source, out, form.scheme, plan=planned, refine=refine)
        return
    with mock.patch.object(Conversion, "_calibration", lambda *_: None):
        convert(source, out, form.scheme)


class Peer:
    """llama.cpp as what `compare` asks of a model: logits of a window."""

    context = 1024

    def __init__(self, worker: Worker, size: int, scratch: Path) -> None:
        self.worker, self.size, self.scratch = worker, size, scratch

    def logits(self, ids: list[int]) -> np.ndarray:
        path = self.scratch / "logits.npy"
        self.worker.ask({"prompt": ids, "logits": str(path)})
        return np.load(path)

    def close(self) -> None:
        self.worker.close()


def peers(source: Path, folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Peer]]:
    """(type, model) of each of llama.cpp's types of a checkpoint."""
    folder.mkdir()
    command = [options.peer_python, "-m", "peers.llamacpp"]
    for kind in PEER_TYPES:
        file, log = folder / f"{kind}.gguf", folder / f"{kind}.log"
        made = [*command, "make", str(source), str(file), kind]
        subprocess.run(made, cwd=HERE, check=True, capture_output=True)
        limits = ["--context", str(Peer.context), "--threads", str(options.threads)]
        worker = Worker(kind, [*command, "serve", str(file), *limits], log)
        yield kind, Peer(worker, file.stat().st_size, folder)


def ours(source: Path, folder: Path, forms: list[str]) -> Iterator[tuple[str, Model]]:
    """(form, model) of chalot's own forms."""
    folder.mkdir()
    for n, form in enumerate(forms):
        path = folder / f"{n}.myai"
        make(source, path, FORMS[form])
        yield form, Model(path, context=1024, activations=FORMS[form].activations)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=60, help="of 512 held-out tokens")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM",
                        help=f"of chalot: {'; '.join(FORMS)}")  # fmt: skip
    parser.add_argument("--peer-python", help="interpreter that has llama-cpp-python and gguf")
    parser.add_argument("--threads", type=int, default=2, help="of the peers")
    parser.add_argument("--no-save", action="store_true", help="print only")
    return parser.parse_args()


def measure(
    windows: int, forms: list[str], options: argparse.Namespace | None = None
) -> tuple[list[dict[str, Any]], int]:
    """A row for each model and form, bf16 first, and how many tokens; peers if `options` ask."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_twin(FOLDER, folder / "twin")
        for name, source in (("demo", FOLDER), ("twin", folder / "twin")):
            models: dict[str, Any] = dict(ours(source, folder / f"{name}-chalot", forms))
            if options and options.peer_python:
                models |= peers(source, folder / f"{name}-peers", options)
            base = Model(models["bf16"].file.path, context=1024, kv="f32")
            text = (FOLDER / "heldout.txt").read_text("utf-8")
            ids = base.tokenizer.encode(text)[: windows * 512]
            found = compare(base, list(models.values()), ids)[1:]
            base.close()
            for (form, model), q in zip(models.items(), found, strict=True):
                size = model.file.size if isinstance(model, Model) else model.size
                row = {"model": name, "form": form, "bytes": size, "perplexity": q.perplexity}
                row |= {"kl": q.kl, "kl_error": q.kl_error, "same_top": q.same_top}
                rows.append(row)
                print(
                    f"{name:5} {form:28} {size:>11,} bytes  perplexity {q.perplexity:.4f}  "
                    f"KL {q.kl:.6f} +- {q.kl_error:.6f}  same top {q.same_top:.2%}",
                    flush=True,
                )
                model.close()
    return rows, len(ids)


def main() -> None:
    """Both models, every form."""
    options = arguments()
    forms = list(dict.fromkeys(["bf16", *options.forms]))  # bf16 is what all are held against
    rows, tokens = measure(options.windows, forms, options)
    path = Path(__file__).parent / "results" / "quality.jsonl"
    made = provenance(sys.argv[1:], ("--peer-python",))
    line = {**made, "protocol": str(PROTOCOL), "tokens": tokens, "rows": rows}
    if not options.no_save:
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
