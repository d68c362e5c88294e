"""Small checkpoints as folders: the bundled model's tokenizer, weights of one's own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from chalot.demo import FOLDER
from chalot.formats.names import hugging_face
from chalot.model.config import from_hugging_face
from chalot.model.layers import model_tensors
from safetensors_files import entry, pack

Weights = dict[str, np.ndarray]
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
}


def write_checkpoint(
    folder: Path,
    change: Callable[[Weights], None] = lambda _: None,
    seed: int = 0,
    **config: object,
) -> Path:
    """A Qwen2 whose blocks' weights differ in size; `change` may alter them first."""
    folder.mkdir(parents=True)
    document = {**json.loads((FOLDER / "config.json").read_text()), **SHAPE, **config}
    rng = np.random.Generator(np.random.Philox(seed))
    weights: Weights = {}
    for spec in model_tensors(from_hugging_face(document)):
        size = 0.04 + 0.03 * int(spec.name.split(".")[1]) if "layers." in spec.name else 0.05
        values = rng.standard_normal(spec.shape) * size + spec.name.endswith("norm")
        weights[spec.name] = values.astype(np.float32)
    change(weights)
    header, at = {}, 0
    for name, values in weights.items():
        header[hugging_face(name)] = entry(at, at + values.nbytes, list(values.shape))
        at += values.nbytes
    content = pack(header, b"".join(v.tobytes() for v in weights.values()))
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text(json.dumps(document))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((FOLDER / name).read_bytes())
    return folder
