"""What up-cycled mixtures cost and give: bytes a token, KL to the source, tokens a second.

    python benchmarks/upcycle.py [--windows 40] [--speed FOLDER] [--scheme nl4]

The bundled model: dense, as copies (equal, and with noise), and sliced in several ways, all in one
scheme. KL to the source in f32 on held-out text; slices are chosen by the bundled calibration text.
`--speed` is a checkpoint of larger shapes (make_models.py), random weights do: it is made into the
same mixtures, and decoding is measured for all of them in turn, round after round. Speed of the
bundled model says little: its layers are too small to wait for memory. Appends a JSON line to
results/upcycle.jsonl; --table prints the last run as Markdown.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chalot.bench import weight_bytes
from chalot.convert import convert
from chalot.demo import FOLDER
from chalot.evaluate import PROTOCOL, compare
from chalot.load import Model
from chalot.upcycle import Settings, upcycle
from machine import HERE, OthersWork, describe_machine, provenance

RESULTS = HERE / "results" / "upcycle.jsonl"
FORMS: dict[str, Settings | None] = {"dense": None, "8 copies, top 2": Settings()} | {
    "8 copies, top 2, noise 0.01": Settings(noise=0.01),
    **{
        f"8 slices, {shared} shared, top {top}": Settings(top=top, shared=shared, slices=True)
        for shared, top in ((2, 6), (2, 5), (2, 4), (2, 3), (2, 2), (2, 1), (0, 4), (4, 1), (4, 2))
    },
}
FAST = ("dense", "8 copies, top 2", "8 slices, 2 shared, top 6", "8 slices, 2 shared, top 4",
        "8 slices, 2 shared, top 2")  # fmt: skip
TOKENS = 32  # of a round
ROUNDS = 7


def make(source: Path, form: str, path: Path, scheme: str) -> Path:
    """One form of a model as a file."""
    asked = FORMS[form]
    if asked is None:
        convert(source, path, scheme)
    else:
        upcycle(source, path, asked, scheme=scheme)
    return path


def quality(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """KL and bytes of every form of the bundled model."""
    convert(FOLDER, folder / "base.myai", "f32")
    base = Model(folder / "base.myai", context=1024, kv="f32")
    ids = base.tokenizer.encode((FOLDER / "heldout.txt").read_text("utf-8"))
    models = []
    for number, form in enumerate(FORMS):
        path = make(FOLDER, form, folder / f"{number}.myai", options.scheme)
        models.append(Model(path, context=1024))
    found = compare(base, models, ids[: options.windows * PROTOCOL.window])[1:]
    rows = []
    for form, model, q in zip(FORMS, models, found, strict=True):
        row = {"form": form, "file_bytes": model.file.size, "token_bytes": weight_bytes(model)}
        rows.append(row | {"kl": q.kl, "kl_error": q.kl_error, "same_top": q.same_top})
    for model in (base, *models):
        model.close()
    return rows


def decode(path: Path, threads: int | None) -> float:
    """Tokens a second of one round, behind 64 tokens."""
    with Model(path, context=256, threads=threads) as model, model.session(seed=0) as session:
        session.prefill([i * 97 % model.config.vocabulary for i in range(64)])
        session.step()
        start = time.perf_counter()
        for _ in range(TOKENS):
            session.step()
        return TOKENS / (time.perf_counter() - start)


def speed(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Tokens a second of some forms of a larger model, in turn."""
    source = Path(options.speed)
    paths = {
        form: make(source, form, folder / f"fast-{number}.myai", options.scheme)
        for number, form in enumerate(FAST)
    }
    rounds: dict[str, list[float]] = {form: [] for form in FAST}
    for _ in range(ROUNDS):
        for form, path in paths.items():
            rounds[form].append(decode(path, options.threads))
    rows = []
    for form, path in paths.items():
        with Model(path, context=256) as model:
            row = {"form": form, "token_bytes": weight_bytes(model), "file_bytes": model.file.size}
        rows.append(row | {"tokens_per_second": rounds[form]})
    return rows


def table(run: dict[str, Any]) -> str:
    """The run as Markdown."""
    fast = {row["form"]: row for row in run["speed"]}
    dense = fast["dense"]["tokens_per_second"] if fast else []
    head = "form | file MB | MB a token | KL to the source | same top"
    lines = [f"| {head} | larger: MB a token | tokens/s | of dense |", "|---" + "|---:" * 7 + "|"]
    for row in run["quality"]:
        cells = [row["form"], f"{row['file_bytes'] / 1e6:.2f}", f"{row['token_bytes'] / 1e6:.2f}"]
        cells += [f"{row['kl']:.4f} +- {row['kl_error']:.4f}", f"{row['same_top']:.1%}"]
        other = fast.get(row["form"])
        if other:
            each = other["tokens_per_second"]
            ratios = [a / b for a, b in zip(each, dense, strict=True)]
            cells += [f"{other['token_bytes'] / 1e6:.0f}", f"{statistics.median(each):.1f}"]
            cells.append(f"{statistics.median(ratios):.2f}")
        lines.append(f"| {' | '.join(cells + ['-'] * (8 - len(cells)))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=40, help="of 512 held-out tokens")
    parser.add_argument("--speed", metavar="FOLDER", help="a checkpoint of larger shapes")
    parser.add_argument("--scheme", default="nl4")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--table", action="store_true", help="print the last run's table")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULTS.read_text().splitlines()[-1])))
        return
    with tempfile.TemporaryDirectory() as scratch, OthersWork() as others:
        folder = Path(scratch)
        run = {"quality": quality(options, folder), "speed": []}
        if options.speed:
            run["speed"] = speed(options, folder)
    run = provenance(sys.argv[1:], ("--speed",)) | describe_machine() | others.result | run
    run |= {"protocol": str(PROTOCOL), "tokens": options.windows * PROTOCOL.window}
    run |= {"scheme": options.scheme}
    if not options.no_save:
        with RESULTS.open("a") as file:
            file.write(json.dumps(run) + "\n")
    print(table(run))


if __name__ == "__main__":
    main()
