"""What a `.myai` file says of its model: the configuration, and its tensors as views."""

from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, one_line
from chalot.formats.myai import MyaiFile
from chalot.model.config import ModelConfig
from chalot.model.layers import model_tensors
from chalot.model.transformer import Weights


def read_model_config(file: MyaiFile) -> ModelConfig:
    """The configuration in a manifest. Raises FormatError where it contradicts a tensor."""
    try:
        config = msgspec.convert(file.manifest.config, ModelConfig)
    except msgspec.ValidationError as error:
        raise FormatError(f"{file.path}: configuration: {one_line(error)}") from None
    for spec in model_tensors(config):
        entry = file.manifest.tensors.get(spec.name)
        if entry is None or entry.shape != spec.shape:
            found = "nothing" if entry is None else f"shape {entry.shape}"
            raise FormatError(
                f"{file.path}: tensor {spec.name}: found {found}, expected shape {spec.shape}"
            )
    return config


def read_frequencies(file: MyaiFile, config: ModelConfig) -> NDArray[np.float32]:
    """(sets, pairs) float32: rope's frequencies. Raises FormatError where there are others."""
    sets, pairs = config.rope_shape
    return file.constant("rope.inverse_frequency", "<f4", sets * pairs).reshape(sets, pairs)


def read_weights(
    file: MyaiFile,
    config: ModelConfig,
    activations: int | None,
    looked_at: Callable[[str], None] = lambda _: None,
) -> Weights:
    """All tensors as views of the file. `activations` forces their bits, of dense matrices too.

    `looked_at` is told each tensor's name when its numbers were checked.
    """
    matrices, vectors, planes = {}, {}, {}
    for spec in model_tensors(config):
        if spec.kind == "vector":
            vectors[spec.name] = file.vector(spec.name)
        else:
            matrices[spec.name] = file.matrix(spec.name)
            if activations is not None:
                planes[spec.name] = activations // 8
            elif matrices[spec.name].scheme.is_coded:
                planes[spec.name] = file.manifest.tensors[spec.name].activation // 8
        looked_at(spec.name)
    return Weights(matrices, vectors, planes)
