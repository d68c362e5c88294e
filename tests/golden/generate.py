"""Record transformers' logits of the tiny checkpoints: `python tests/golden/generate.py [CASE...]`.

Needs torch and transformers, and nothing of chalot. A case's file holds `ids`, its text and the 24
tokens that transformers adds greedily; `logits` in float32 at `positions`; `top`, the most likely
token after every position; `spread`, the greatest logit less the least; and the folder's `digest`.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from cases import CASES, NEW_TOKENS, Case, digest, golden, prompt, write_folder
from numpy.typing import NDArray


def open_model(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The folder's model as transformers sees it. Raises ValueError if a tensor has no place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    wrong = {k: v for k, v in report.items() if v}
    if wrong:
        raise ValueError(f"{folder}: {wrong}")
    return model.eval()


@torch.inference_mode()
def logits(model: torch.nn.Module, ids: list[int]) -> NDArray[np.float32]:
    """(tokens, vocabulary) float32."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def greedy(model: torch.nn.Module, ids: list[int], new: int) -> list[int]:
    """The text and `new` tokens more, each the most likely; all is computed anew for each."""
    ids = list(ids)
    for _ in range(new):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return ids


def record(case: Case, seed: int = 0) -> dict[str, NDArray[np.generic]]:
    """What the golden file of a case holds."""
    with tempfile.TemporaryDirectory() as made:
        folder = write_folder(case, seed, Path(made))
        model = open_model(folder)
        ids = greedy(model, prompt(case, seed), NEW_TOKENS)
        found = logits(model, ids)
        return {
            "ids": np.array(ids, np.int16),
            "positions": np.array(case.positions, np.int16),
            "logits": found[case.positions],
            "top": found.argmax(axis=1).astype(np.int16),
            "spread": np.float32(found.max() - found.min()),
            "digest": np.array(digest(folder)),
        }


def main(names: list[str]) -> None:
    """Write the golden files of the named cases, or of all."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for case in [CASES[n] for n in names] or CASES.values():
        np.savez_compressed(golden(case), **record(case))
        print(f"{case.name}: {golden(case).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
