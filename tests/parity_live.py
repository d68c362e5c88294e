"""chalot against transformers, live: `python tests/parity_live.py [MODEL_FOLDER...]`.

Needs chalot, torch and transformers (5 or newer). The tiny checkpoints of `golden/cases.py` are
made from other seeds, saved once more by transformers in its own spelling, in shards, and by chalot
as safetensors, from its own f32 file, and as a mixture of copies that transformers runs. A folder
given as argument is compared over 300 tokens of its own text, or of the bundled one.

Differences are the greatest over all tokens, as a share of the logits' spread. Exits with 1 if one
passes 1e-3, with weights as stored and a float32 cache, or if a choice of token differs where the
choice is clear. The float16 cache is shown, not judged.
"""

import importlib.resources
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

import chalot
from chalot.errors import ChalotError
from chalot.export.safetensors import write_safetensors
from chalot.formats.checkpoint import open_checkpoint
from chalot.upcycle import Settings, upcycle

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from cases import CASES, Case, golden, prompt, write_folder  # noqa: E402
from generate import activations_as_numbers, logits, open_model  # noqa: E402

BAR = 1e-3
SEEDS = (1, 2)
TOKENS = 300  # of a model's folder
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class Row(NamedTuple):
    """One comparison; differences as shares of the logits' spread."""

    what: str
    tokens: int
    f32_cache: float
    f16_cache: float
    clear: int  # tokens whose choice is clear: the next best is further off than twice the bar
    other: int  # of these, how many chalot chooses otherwise


def choices(truth: NDArray[np.float32], top: NDArray[np.integer]) -> tuple[int, int]:
    """How many tokens' most likely follower is clear, and how many of these `top` has otherwise."""
    best = np.sort(truth, axis=1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > 2 * BAR * (truth.max() - truth.min())
    return int(clear.sum()), int((clear & (top != truth.argmax(axis=1))).sum())


def compare(what: str, folder: Path, scheme: str, ids: list[int], other: Path | None = None) -> Row:
    """chalot's logits of the folder's weights, and transformers' of these or of the other's."""
    with activations_as_numbers():  # BitNet's, as the golden files have them
        truth = logits(open_model(other or folder), ids)  # (tokens, vocabulary)
    spread = float(truth.max() - truth.min())
    found: dict[str, NDArray[np.float32]] = {}
    with tempfile.TemporaryDirectory() as made:
        chalot.convert(folder, Path(made) / "model.myai", scheme=scheme)
        for kv in ("f32", "f16"):
            with chalot.load(Path(made) / "model.myai", kv=kv, context=len(ids)) as model:
                found[kv] = model.logits(ids)
    off = [float(np.abs(found[kv] - truth).max()) / spread for kv in ("f32", "f16")]
    return Row(what, len(ids), off[0], off[1], *choices(truth, found["f32"].argmax(axis=1)))


def stale(case: Case) -> Row:
    """The golden file against transformers as it is now; chalot takes no part."""
    numbers = activations_as_numbers()
    with numbers, tempfile.TemporaryDirectory() as made, np.load(golden(case)) as file:
        folder = write_folder(case, 0, Path(made))
        now = logits(open_model(folder), file["ids"].tolist())
        off = float(np.abs(now[file["positions"]] - file["logits"]).max() / file["spread"])
        return Row(f"{case.name}, as recorded", len(now), off, 0.0, *choices(now, file["top"]))


def resaved(case: Case, folder: Path) -> Path:
    """The checkpoint as transformers writes it: its spelling of config.json, shards, an index."""
    model = open_model(folder, DTYPES[case.stored])
    model.save_pretrained(folder / "again", max_shard_size="300KB")
    return folder / "again"


def exported(case: Case, folder: Path) -> Path:
    """The checkpoint as chalot writes it, through a file of its own, in files of 300 kB."""
    chalot.convert(folder, folder / "own.myai", scheme="f32")
    checkpoint = open_checkpoint(folder / "own.myai")
    write_safetensors(checkpoint, folder / "out", case.scheme, lambda *_: None, 300_000)
    checkpoint.close()
    return folder / "out"


def mixture(case: Case, folder: Path) -> Path | None:
    """A mixture of equal copies, which is the same function; None where the family has none."""
    try:
        upcycle(folder, folder / "mixture", Settings(4), to="safetensors", type=case.scheme)
    except ChalotError:
        return None
    return folder / "mixture"


def text_of(folder: Path) -> list[int]:
    """Ids of the text beside a model, or of the bundled one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = folder / "calibration.txt"
    if not text.exists():
        bundled = importlib.resources.files("chalot.demo.model")
        return tokenizer.encode(bundled.joinpath("calibration.txt").read_text("utf-8"))[:TOKENS]
    return tokenizer.encode(text.read_text("utf-8"))[:TOKENS]


def rows(folders: list[Path]) -> Iterator[Row]:
    """Every comparison."""
    for case in CASES.values():
        yield stale(case)
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as made:
                folder = write_folder(case, seed, Path(made))
                ids = prompt(case, seed)
                yield compare(f"{case.name}, seed {seed}", folder, case.scheme, ids)
                if seed == SEEDS[0]:
                    if "quantization_config" not in case.config:  # those it cannot save
                        again = resaved(case, folder)
                        yield compare(f"{case.name}, saved again", again, case.scheme, ids)
                    # two say bf16 and hold f32; their embedding is scaled as they say
                    if case.name not in ("gemma2-long", "gemma3-new"):
                        ours = exported(case, folder)
                        yield compare(f"{case.name}, exported", folder, case.scheme, ids, ours)
                    if (copies := mixture(case, folder)) is not None:
                        yield compare(f"{case.name}, copied", folder, case.scheme, ids, copies)
    for folder in folders:
        yield compare(f"{folder.name} (folder)", folder, "f32", text_of(folder))


def main(folders: list[Path]) -> int:
    """Print the table as it grows; 1 if anything is past the bar."""
    if int(transformers.__version__.split(".")[0]) < 5:
        sys.exit(f"transformers {transformers.__version__}: rope_parameters need 5 or newer")
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, bar {BAR:g}")
    print(
        f"{'checkpoint':32} {'tokens':>6} {'f32 cache':>10} {'f16 cache':>10} {'other/clear':>12}"
    )
    worst, failed = 0.0, []
    for row in rows(folders):
        good = row.f32_cache <= BAR and row.other == 0  # false for NaN
        f16 = f"{row.f16_cache:.1e}" if row.f16_cache else "-"
        print(
            f"{row.what:32} {row.tokens:6} {row.f32_cache:10.1e} {f16:>10} "
            f"{row.other:>6}/{row.clear:<5} {'' if good else 'FAILED'}".rstrip(),
            flush=True,
        )
        worst = max(worst, row.f32_cache)
        if not good:
            failed.append(row.what)
    print(f"greatest difference {worst:.1e} of the spread; {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main([Path(a) for a in sys.argv[1:]]))
