"""Fits FastEWQ's tree: EWQ's decisions guessed from the configuration, on models held out.

    python benchmarks/fast_ewq.py [--model FOLDER ...] [--depth 2] [--no-save]

EWQ (softmax, X = 1) runs over the bundled model, its twin, and each FOLDER (of several sizes, from
tools/train_demo_model.py). A tree is fitted on all but one model and asked about that one, in
turn; beside it the level that is commonest in the others. The tree of all models goes to
src/chalot/plan/fast_ewq.json, the record to results/fast_ewq.jsonl. Models of random weights are
asked about too, apart: their blocks differ by chance alone, so no tree can know.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from chalot.convert.conversion import Conversion
from chalot.convert.storing import Storing, parse_schemes
from chalot.demo import FOLDER, write_twin
from chalot.formats.checkpoint import Checkpoint, open_checkpoint
from chalot.kernels.backend import open_backend
from chalot.model.config import ModelConfig
from chalot.model.layers import model_tensors
from chalot.plan import ewq
from chalot.plan.fast_ewq import FEATURES, Branch, Fitted, Leaf, Tree, commonest, features, leaf
from chalot.quant.entropy import LEVELS
from chalot.quant.scheme import SCHEMES
from machine import HERE, provenance

RESULTS = HERE / "results" / "fast_ewq.jsonl"
DATA = HERE.parent / "src" / "chalot" / "plan" / "fast_ewq.json"
SCHEMES_OF_LEVELS = ewq.levels_of([SCHEMES[n] for n in ("bf16", "int8", "nl4")])
LEAST = 6  # blocks of a leaf
RANDOM = ((64, 6), (128, 12), (256, 8), (192, 24))  # hidden, layers

Rows = tuple[np.ndarray, np.ndarray]  # (blocks, features), (blocks,) levels by number


def labelled(config: ModelConfig, read: ewq.Read) -> Rows:
    """EWQ's decisions on a model."""
    found = ewq.analyse(read, list(model_tensors(config)), "softmax", 1.0, None, SCHEMES_OF_LEVELS)
    asked = [[features(config, i)[n] for n in FEATURES] for i in range(config.layers)]
    return np.array(asked), np.array([LEVELS.index(level) for level in found.decision.levels])


def conversion(checkpoint: Checkpoint) -> Conversion:
    """What reads its tensors."""
    return Conversion(checkpoint, Storing(parse_schemes("nl4")), open_backend(), lambda *_: None)


def of_folder(folder: Path) -> Rows:
    """A checkpoint's."""
    checkpoint = open_checkpoint(folder)
    try:
        work = conversion(checkpoint)
        return labelled(work.config, work.read)
    finally:
        checkpoint.close()


def of_chance(base: ModelConfig, hidden: int, layers: int, seed: int) -> Rows:
    """A model as it is before training: every weight normal, of deviation 0.02."""
    config = msgspec.structs.replace(
        base, hidden=hidden, layers=layers, heads=hidden // 64, kv_heads=1, feed_forward=3 * hidden
    )
    rng = np.random.Generator(np.random.Philox(seed))
    shapes = {t.name: t.shape for t in model_tensors(config)}
    kept: dict[str, np.ndarray] = {}

    def read(name: str, first: int, last: int | None) -> np.ndarray:
        if name not in kept:
            kept.clear()
            kept[name] = (rng.standard_normal(shapes[name]) * 0.02).astype(np.float32)
        return kept[name][first:last]

    return labelled(config, read)


def impurity(counts: np.ndarray) -> float:
    """Gini's, times the blocks."""
    total = counts.sum()
    return float(total - (counts**2).sum() / total) if total else 0.0


def fit(x: np.ndarray, y: np.ndarray, depth: int) -> Tree:
    """The split that leaves least impurity, again and again."""
    counts = np.bincount(y, minlength=3)
    best: tuple[float, int, float] | None = None
    for f in range(x.shape[1]) if depth else ():
        values = np.unique(x[:, f])
        for at in (values[1:] + values[:-1]) / 2:
            below = x[:, f] <= at
            if min(below.sum(), (~below).sum()) < LEAST:
                continue
            left = sum(impurity(np.bincount(y[m], minlength=3)) for m in (below, ~below))
            if left < (best[0] if best else impurity(counts) - 1e-9):
                best = left, f, float(at)
    if best is None:
        return Leaf((int(counts[0]), int(counts[1]), int(counts[2])))
    _, f, at = best
    below = x[:, f] <= at
    parts = fit(x[below], y[below], depth - 1), fit(x[~below], y[~below], depth - 1)
    return Branch(FEATURES[f], round(at, 4), *parts)


def right(tree: Tree, rows: Rows) -> int:
    """Blocks for which the tree says what EWQ does."""
    asked = [dict(zip(FEATURES, map(float, row), strict=True)) for row in rows[0]]
    return sum(commonest(leaf(tree, a)) == int(y) for a, y in zip(asked, rows[1], strict=True))


def joined(parts: list[Rows]) -> Rows:
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def held_out(models: dict[str, Rows], depth: int) -> list[dict[str, Any]]:
    """Each model in turn, by a tree and by the commonest level of the others."""
    out = []
    for name, rows in models.items():
        # a model and its twin differ in nothing that a tree sees: both are held out
        others = joined([r for n, r in models.items() if n.split()[0] != name.split()[0]])
        out.append(
            {
                "model": name,
                "blocks": len(rows[1]),
                "levels": [LEVELS[i] for i in rows[1]],
                "tree": right(fit(*others, depth), rows),
                "majority": right(fit(*others, 0), rows),
            }
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="*", default=[], type=Path, help="further folders")
    parser.add_argument("--depth", type=int, default=2, help="of the tree (default: 2)")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    models = {"bundled": of_folder(FOLDER)}
    with tempfile.TemporaryDirectory() as scratch:
        write_twin(FOLDER, Path(scratch) / "twin")
        models["bundled twin"] = of_folder(Path(scratch) / "twin")
    models |= {folder.name: of_folder(folder) for folder in options.model}
    rows = held_out(models, options.depth)
    tree, blocks = (
        fit(*joined(list(models.values())), options.depth),
        sum(r["blocks"] for r in rows),
    )
    shares = {k: sum(r[k] for r in rows) / blocks for k in ("tree", "majority")}
    better = [r["tree"] - r["majority"] for r in rows]  # blocks of a model are no single draws
    shares["error"] = float(np.std(better, ddof=1) * np.sqrt(len(rows)) / blocks)
    checkpoint = open_checkpoint(FOLDER)
    base = conversion(checkpoint).config
    chance = [of_chance(base, *size, seed) for size in RANDOM for seed in range(5)]
    total = sum(len(y) for _, y in chance)
    of_random = {
        "blocks": total,
        "tree": sum(right(tree, r) for r in chance) / total,
        "majority": sum(right(fit(*joined(chance), 0), r) for r in chance) / total,
    }
    for r in rows:
        said = "".join(level[0] for level in r["levels"])  # low, middle, raw
        print(f"{r['model']:14} {said:24} tree {r['tree']:3}, majority {r['majority']:3} right")
    print(f"held out, of {blocks} blocks: {shares}")
    print(f"random weights: {of_random}")
    fitted = Fitted(
        tree, len(models), blocks, *(round(shares[k], 3) for k in ("tree", "majority", "error"))
    )
    print(msgspec.json.encode(fitted.tree).decode())
    if not options.no_save:
        DATA.write_bytes(msgspec.json.format(msgspec.json.encode(fitted), indent=1) + b"\n")
        run = {
            **provenance([Path(a).name for a in sys.argv[1:]], ()),
            "depth": options.depth,
            "held_out": rows,
            **shares,
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps({**run, "random": of_random}) + "\n")


if __name__ == "__main__":
    main()
