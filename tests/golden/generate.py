"""Record transformers' logits of the tiny checkpoints: `python tests/golden/generate.py [CASE...]`.

Needs torch and transformers (and accelerate for BitNet), and nothing of chalot. A case's file
holds `ids`, its text and the 24 tokens that transformers adds greedily; `logits` in float32 at
`positions`; `top`, the most likely token after every position; `spread`, the greatest logit less
the least; and the folder's `digest`.

BitNet's are recorded twice: with activations as numbers, by which chalot's reading is judged to the
last digits; and as transformers computes, with eight bits for each token, as `coded`.
"""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # BitNet's small functions ask for a compiler
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
    if "quantization_config" in model.config.to_dict():  # of which some stay as they are stored
        model.to(dtype)
        for module in model.modules():
            if type(module).__name__ == "BitLinear":
                module.dtype = dtype
    config = json.loads((folder / "config.json").read_text())
    embedding = model.get_input_embeddings()
    if "bfloat16" in (config.get("dtype"), config.get("torch_dtype")) and hasattr(
        embedding, "embed_scale"
    ):  # rounded to the weights' type in each forward pass: here to the type they were made for
        embedding.embed_scale.data = embedding.embed_scale.to(torch.bfloat16).float()
    return model.eval()


@contextmanager
def activations_as_numbers() -> Iterator[None]:
    """BitNet without eight-bit activations."""
    from transformers.integrations import bitnet

    with (
        mock.patch.object(bitnet.ActQuant, "apply", lambda x: x),
        mock.patch.object(bitnet.BitLinear, "activation_quant", lambda self, x: (x, 1.0)),
    ):
        yield


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
        with activations_as_numbers():
            ids = greedy(model, prompt(case, seed), NEW_TOKENS)
            found = logits(model, ids)
        coded = {}
        if "quantization_config" in case.config:
            coded["coded"] = logits(model, ids)[case.positions]
        return coded | {
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
