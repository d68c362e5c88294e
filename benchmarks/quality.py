"""What each choice costs in quality on the bundled model and its outlier twin.

    python benchmarks/quality.py [--windows 60]

Every scheme, the head in 8 bits against 4, activations of 8 and 16 bits, folding and calibration on
and off; perplexity and KL to the bf16 original on held-out text, one protocol. Appends a JSON line
to results/quality.jsonl.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from chalot.convert import Conversion, convert
from chalot.demo import FOLDER, write_twin
from chalot.evaluate import PROTOCOL, compare
from chalot.load import Model
from machine import provenance

# name -> (scheme, forced activation bits, calibrated)
FORMS: dict[str, tuple[str, int | None, bool]] = {
    "bf16": ("bf16", None, True),
    "bf16, 8-bit activations": ("bf16", 8, True),
    "bf16, 16-bit activations": ("bf16", 16, True),
    "int8": ("int8", None, True),
    "int8, not calibrated": ("int8", None, False),
    "nl4": ("nl4", None, True),
    "nl4, int8 embedding": ("embedding=int8", None, True),
    "nl4, int8 attention": ("attention=int8", None, True),
    "nl4, 16-bit activations": ("nl4", 16, True),
    "nl4, 8-bit activations": ("nl4", 8, True),
    "nl4, not calibrated": ("nl4", None, False),
}


def make(source: Path, out: Path, scheme: str, calibrated: bool) -> None:
    """Convert, with calibration left out where asked."""
    if calibrated:
        convert(source, out, scheme)
        return
    with mock.patch.object(Conversion, "_calibration", lambda *_: None):
        convert(source, out, scheme)


def main() -> None:
    """Both models, every form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=60, help="of 512 held-out tokens")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_twin(FOLDER, folder / "twin")
        for name, source in (("demo", FOLDER), ("twin", folder / "twin")):
            models = []
            for n, (scheme, bits, calibrated) in enumerate(FORMS.values()):
                path = folder / f"{name}{n}.myai"
                make(source, path, scheme, calibrated)
                models.append(Model(path, context=1024, activations=bits))
            text = (FOLDER / "heldout.txt").read_text("utf-8")
            ids = models[0].tokenizer.encode(text)[: options.windows * 512]
            for form, model, q in zip(
                FORMS, models, compare(models[0], models, ids)[1:], strict=True
            ):
                size = model.file.size
                row = {"model": name, "form": form, "bytes": size, "perplexity": q.perplexity}
                row |= {"kl": q.kl, "kl_error": q.kl_error, "same_top": q.same_top}
                rows.append(row)
                print(
                    f"{name:5} {form:28} {size:>11,} bytes  perplexity {q.perplexity:.4f}  "
                    f"KL {q.kl:.6f} +- {q.kl_error:.6f}  same top {q.same_top:.2%}",
                    flush=True,
                )
                model.close()
    path = Path(__file__).parent / "results" / "quality.jsonl"
    path.parent.mkdir(exist_ok=True)
    line = {**provenance(sys.argv[1:], ()), "protocol": PROTOCOL, "tokens": len(ids), "rows": rows}
    line["command"] = f"python benchmarks/quality.py --windows {options.windows}"
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
