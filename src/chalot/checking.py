"""A checkpoint's configuration, and its tensors held against it."""

import numpy as np

from chalot.errors import FormatError
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.documents import parse_json
from chalot.formats.files import quoted
from chalot.formats.names import hugging_face
from chalot.model.config import ModelConfig, from_hugging_face
from chalot.model.layers import model_tensors

RUN = 4 << 20  # numbers in memory at once
COMPUTED = ".rotary_emb.inv_freq"  # of older checkpoints: follows from config.json


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """The model a checkpoint holds. Raises FormatError or UnsupportedError."""
    raw = checkpoint.document("config.json")
    where = f"{checkpoint.path}: config.json"
    if raw is None:
        raise FormatError(f"{where} is missing; is this a model's folder?")
    parsed = parse_json(raw, where)
    if not isinstance(parsed, dict):
        raise FormatError(f"{where}: expected an object")
    return from_hugging_face(parsed)


def check_shapes(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise FormatError where tensors are missing, too many, or contradict the configuration."""
    known = {hugging_face("head")} if config.tied else set()
    for spec in model_tensors(config):
        name = hugging_face(spec.name)
        known.add(name)
        found = checkpoint.tensors.get(name)
        if found is None:
            raise FormatError(
                f"{checkpoint.path}: tensor {name} is missing; the configuration asks for it"
            )
        if found.shape != spec.shape:
            raise FormatError(
                f"{checkpoint.path}: tensor {name} has shape {found.shape}, "
                f"config.json asks for {spec.shape}"
            )
    unknown = sorted(
        name for name in checkpoint.tensors.keys() - known if not name.endswith(COMPUTED)
    )
    if unknown:
        shown = ", ".join(map(quoted, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        raise FormatError(
            f"{checkpoint.path}: {len(unknown)} tensors are not in the model that config.json "
            f"describes ({shown}); take the config.json that belongs to these weights"
        )
    if config.tied and hugging_face("head") in checkpoint.tensors:
        check_tied_head(checkpoint)


def check_tied_head(checkpoint: Checkpoint) -> None:
    """Raise FormatError if a head that should be the embedding is stored, and differs from it."""
    tied, head = (checkpoint.tensors[hugging_face(n)] for n in ("embedding", "head"))
    same, rows = tied.shape == head.shape, tied.shape[0]
    size = max(1, RUN // tied.shape[1])
    for first in range(0, rows, size) if same else ():
        a, b = (checkpoint.float32(t.name, first, min(first + size, rows)) for t in (tied, head))
        same = same and np.array_equal(a, b)
    if not same:
        raise FormatError(
            f"{checkpoint.path}: {head.name} differs from {tied.name}, to which config.json ties "
            "it; set tie_word_embeddings to false to use it, or take the tensor out"
        )
