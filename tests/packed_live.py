"""Packed checkpoints against the tools' own reading: `python tests/packed_live.py`.

Needs torch, transformers and compressed-tensors. A tiny Qwen2 is quantised by compressed-tensors
itself, in each form that chalot reads, and saved; transformers loads it and dequantises; chalot
reads the same folder. Exits with 1 if a weight differs by more than its float's rounding.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams

from chalot.formats.checkpoint import open_checkpoint

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from cases import CASES, write_folder  # noqa: E402

WAYS = {
    "pack-quantized, groups of 32": ("pack-quantized", 4, "group", 32, True),
    "pack-quantized, zero points": ("pack-quantized", 4, "group", 32, False),
    "pack-quantized, rows": ("pack-quantized", 8, "channel", None, True),
    "int-quantized, rows": ("int-quantized", 8, "channel", None, True),
    "int-quantized, zero points": ("int-quantized", 8, "channel", None, False),
}


def quantized(source: Path, place: Path, way: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """The model saved in that way at `place`; returns what its weights stand for."""
    form, bits, strategy, size, symmetric = way
    model = transformers.AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32)
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": size,
               "symmetric": symmetric}  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format=form,
        quantization_status="initialized",
    )  # fmt: skip
    apply_quantization_config(model, config)
    for module in model.modules():
        if not hasattr(module, "weight_scale"):
            continue
        w = module.weight.data
        parts = w.reshape(len(w), -1, size or w.shape[1])
        scale, zero = calculate_qparams(
            parts.amin(-1), parts.amax(-1), module.quantization_scheme.weights
        )
        module.weight_scale.data, module.weight_zero_point.data = scale, zero
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(place)
    compressor.update_config(place)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        place, quantization_config=transformers.CompressedTensorsConfig(run_compressed=False)
    )
    return {name: p.detach().float().numpy() for name, p in again.named_parameters()}


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        source = write_folder(CASES["qwen2"], 0, Path(folder) / "source")
        for name, way in WAYS.items():
            place = Path(folder) / name.replace(" ", "-")
            expected = quantized(source, place, way)
            said = json.loads((place / "config.json").read_text())["quantization_config"]
            checkpoint = open_checkpoint(place)
            worst, count = 0.0, 0
            for tensor, info in checkpoint.tensors.items():
                if not info.scheme:
                    continue
                truth = expected[tensor]
                difference = np.abs(checkpoint.float32(tensor) - truth).max() / np.abs(truth).max()
                worst, count = max(worst, float(difference)), count + 1
            checkpoint.close()
            bad = worst > 2e-3 or not count  # scales may be bf16, and products with them
            bad = bad or said["format"] != way[0]
            failed += bad
            verdict = "FAILED" if bad else "ok"
            print(f"{name:32} {said['format']:16} {count} matrices, worst {worst:.1e} {verdict}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
