"""A checkpoint of text and images as the language model in it: its tensors and settings alone.

    config.json        what its `text_config` says, with what stands around it of tokens and types
    language_model.model.*, model.language_model.*    as model.* of the language model
    all else but the head                             left out, with one warning

Sources: transformers 5, models/gemma3/configuration_gemma3.py, conversion_mapping.py.
"""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError
from chalot.formats.checkpoint import Checkpoint, TensorInfo
from chalot.formats.documents import parse_json
from chalot.formats.files import quoted
from chalot.formats.view import CheckpointView

PARTS = {"gemma3": ("gemma3_text", "Gemma3ForCausalLM")}  # model_type -> its language model's
AROUND = (  # settings that hold for the language model too
    *("torch_dtype", "dtype", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
Documents = Callable[[str], bytes | None]


def settings_of(config: bytes | None, where: object) -> dict[str, Any] | None:
    """The language model's settings; None where config.json is of no such checkpoint."""
    said = parse_json(config, where) if config is not None else None
    text = said.get("text_config") if isinstance(said, dict) else None
    kind = said.get("model_type") if isinstance(said, dict) else None
    if not isinstance(text, dict) or not isinstance(kind, str) or kind not in PARTS:
        return None
    assert isinstance(said, dict)
    family, architecture = PARTS[kind]
    around = {key: said[key] for key in AROUND if key in said}
    return around | text | {"model_type": family, "architectures": [architecture]}


def documents(held: Documents, where: object) -> Documents:
    """The documents of a checkpoint, config.json being the language model's."""

    def document(name: str) -> bytes | None:
        found = held(name)
        if name != "config.json":
            return found
        settings = settings_of(found, f"{where}: {name}")
        return found if settings is None else json.dumps(settings, indent=2).encode()

    return document


def places(tensors: Mapping[str, TensorInfo], where: object) -> dict[str, str]:
    """The language model's tensors by their own names -> by those in the files.

    Raises FormatError where two have one name.
    """
    out: dict[str, str] = {}
    for held in tensors:
        prefix = next((p for p in PREFIXES if held.startswith(p)), None)
        if prefix is None:
            continue
        name = PREFIXES[prefix] + held.removeprefix(prefix)
        if name in out:
            raise FormatError(f"{where}: holds tensor {quoted(name)} twice, by two names")
        out[name] = held
    return out


def listed(
    tensors: Mapping[str, TensorInfo], config: bytes | None, where: object
) -> Mapping[str, TensorInfo]:
    """Tensors of headers as `taken` gives them."""
    if settings_of(config, f"{where}: config.json") is None:
        return tensors
    return {n: tensors[held]._replace(name=n) for n, held in places(tensors, where).items()}


class TextPart(CheckpointView):
    """A `Checkpoint` over another: the language model in it."""

    def __init__(self, held: Checkpoint) -> None:
        """Raises FormatError as `places`."""
        self._places = places(held.tensors, held.path)
        infos = {n: held.tensors[p]._replace(name=n) for n, p in self._places.items()}
        super().__init__(held, infos)
        self._documents = documents(held.document, held.path)
        logging.getLogger(__name__).warning(
            "%s: a model of text and images; its language model alone is read, without %d tensors",
            *(held.path, len(held.tensors) - len(infos)),
        )

    def raw(self, name: str) -> NDArray[Any]:
        """See Checkpoint."""
        self.end(name, 0, None)
        return self.held.raw(self._places[name])

    def float32(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """See Checkpoint."""
        last = self.end(name, first, last)
        return self.held.float32(self._places[name], first, last)

    def document(self, name: str) -> bytes | None:
        """See Checkpoint."""
        return self._documents(name)


def taken(held: Checkpoint) -> Checkpoint:
    """The language model in a checkpoint; the checkpoint itself where it is one."""
    found = settings_of(held.document("config.json"), f"{held.path}: config.json")
    return held if found is None else TextPart(held)
