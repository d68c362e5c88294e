#!/usr/bin/env python3
"""What `chalot describe` says a model will take of memory, beside what a process really takes.

    python benchmarks/memory.py MODEL.myai ... [--contexts 0,300,1000] [--out FILE.jsonl]
    python benchmarks/memory.py FOLDER ... [--schemes nl4,int8,bf16]

Each measurement is a process of its own: it loads the file, fills the context with random token
ids, draws one more, and reads its resident memory (Rss of /proc/self/smaps_rollup, file pages
included; the file is read beforehand, so that it lies in the page cache). With --text the tokenizer
is opened too. 0 is a model that was loaded and has computed one token. A folder is converted, to
the schemes one after another, and what `describe` says of that is held against the peak (ru_maxrss)
and the length of the file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

INSIDE = """
import sys
from pathlib import Path
import numpy as np
import chalot
path, context, kv, text = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
with chalot.load(path, kv=kv) as model:
    ids = np.random.default_rng(0).integers(0, model.config.vocabulary, max(context, 1))
    session = model.session(seed=1)
    session.prefill([int(i) for i in ids])
    session.step()
    if text:
        model.tokenizer.encode("Hello, world")
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024)
"""

CONVERTS = """
import resource, sys
import chalot
report = chalot.convert(*sys.argv[1:4])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, report.bytes)
"""


def converting(folder: str, schemes: list[str]) -> list[dict[str, Any]]:
    """A row for each scheme: peak and file, predicted and measured."""
    import chalot

    said = chalot.describe(folder).fit
    assert said is not None
    options, out = {o.scheme: o for o in said.options}, []
    for scheme in schemes:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-c", CONVERTS, folder, f"{scratch}/x.myai", scheme]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, length = map(int, done.stdout.split())
        o = options[scheme]
        row = {"scheme": scheme, "predicted": o.converting, "measured": peak}
        row |= {"off": round(o.converting / peak - 1, 4)}
        row |= {"file_predicted": o.file_bytes, "file_measured": length}
        out.append(row)
        print(
            f"{Path(folder).name:32} to {scheme:6} predicted {o.converting / 1e6:8.1f} MB  "
            f"measured {peak / 1e6:8.1f} MB  {o.converting / peak - 1:+.1%}   "
            f"file {o.file_bytes / length - 1:+.2%}"
        )
    return out


def measured(path: str, context: int, kv: str, text: bool) -> int:
    """Resident bytes of a process that did all this."""
    command = [sys.executable, "-c", INSIDE, path, str(context), kv, str(text)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare(path: str, contexts: list[int], kv: str, text: bool) -> list[dict[str, Any]]:
    """A row for each context: predicted, measured, and by how much they differ."""
    import chalot

    with Path(path).open("rb") as file:
        while file.read(1 << 24):
            pass
    report = chalot.describe(path)
    out = []
    full = report.architecture["context"]
    for context in sorted({min(n, full) for n in contexts}):
        said = report.memory(context, kv)
        predicted = said.total_with_text if text else said.total
        found = measured(path, context, kv, text)
        off = predicted / found - 1
        row = {"context": context, "predicted": predicted, "measured": found, "off": round(off, 4)}
        out.append(row | {"kv": kv, "text": text})
        print(
            f"{Path(path).name:32} {context:6} tokens  {kv}  {'text' if text else 'ids ':4}  "
            f"predicted {predicted / 1e6:8.1f} MB  measured {found / 1e6:8.1f} MB  {off:+.1%}"
        )
    return out


def main() -> None:
    """Print the table, and append a line to --out."""
    from machine import describe_machine, provenance

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--schemes", default="nl4,int8,bf16", help="to convert a folder to")
    parser.add_argument("--contexts", default="0,1,300,1000")
    parser.add_argument("--kv", default="int8", choices=("int8", "f16", "f32"))
    parser.add_argument("--text", action="store_true", help="open the tokenizer too")
    parser.add_argument("--out", help="a .jsonl file to append to")
    given = parser.parse_args()
    contexts = [int(n) for n in given.contexts.split(",")]
    found = {}
    for m in given.models:
        if Path(m).is_dir():
            found[Path(m).name] = converting(m, given.schemes.split(","))
        else:
            found[Path(m).name] = compare(m, contexts, given.kv, given.text)
    if given.out:
        names = [Path(a).name if a in given.models else a for a in sys.argv[1:]]
        made = provenance(names, ("--out",))
        line = {"what": "memory", **made, "machine": describe_machine(), "models": found}
        with Path(given.out).open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
