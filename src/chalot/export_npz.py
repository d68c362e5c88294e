"""A target of `convert`: an .npz of codes with a scale and zero point per row, and its manifest.

Every matrix (embedding and head too) at 8, 4, 2 or 1 bits, vectors as float32, documents embedded,
so that NAME_manifest_q4.json is a whole model. Rows go through in runs; no tensor is in memory.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot import __version__
from chalot.batch import name_of
from chalot.convert import (
    DOCUMENTS,
    RUN,
    ConvertReport,
    KindReport,
    Progress,
    check_shapes,
    check_space,
    read_config,
)
from chalot.errors import SchemeError, WeightError
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.documents import parse_json
from chalot.formats.names import hugging_face
from chalot.formats.npz_writer import NpzWriter
from chalot.model.config import ModelConfig
from chalot.model.layers import KINDS, TensorSpec, model_tensors
from chalot.quant.rows import BITS, Rows, dequantize_rows, quantize_rows, row_bytes

ENDING = re.compile(r"_(quantized|manifest)_q\d+$")
SPARE = 700  # bytes of an array's header, its places in the listing and in the manifest


class NpzExport:
    """One checkpoint on its way into one pair of files."""

    def __init__(self, checkpoint: Checkpoint, bits: int, progress: Progress) -> None:
        self.checkpoint = checkpoint
        self.bits = bits
        self.progress = progress
        self.config = read_config(checkpoint)
        check_shapes(self.config, checkpoint)
        self.specs = model_tensors(self.config)
        self.total = sum(int(np.prod(s.shape)) for s in self.specs)
        self.done = 0
        self.lost: dict[str, tuple[float, float]] = {}  # kind -> squared error, squared weights

    def stored_bytes(self, spec: TensorSpec) -> int:
        """Bytes of a tensor's arrays, without their headers."""
        if spec.kind == "vector":
            return spec.shape[0] * 4
        return spec.shape[0] * (row_bytes(spec.shape[1], self.bits) + 8)

    def planned_bytes(self) -> int:
        """Bytes of both files, and some."""
        documents = sum(len(self.checkpoint.document(n) or b"") for n in DOCUMENTS)
        return documents + sum(self.stored_bytes(s) + 4 * SPARE for s in self.specs)

    def read(self, name: str, first: int, last: int) -> NDArray[np.float32]:
        """Rows of a tensor. Raises WeightError for NaN or Inf."""
        values = self.checkpoint.float32(name, first, last)
        if not np.isfinite(values).all():
            raise WeightError(
                f"{self.checkpoint.path}: tensor {name} has NaN or Inf among its weights; take "
                "another checkpoint"
            )
        self.done += values.size
        self.progress(name, self.done, self.total)
        return values

    def runs(self, name: str, spec: TensorSpec) -> Iterator[Rows]:
        """A matrix as codes, some rows at a time; errors are summed on the way."""
        rows, columns = spec.shape
        size = max(1, RUN // columns)
        for first in range(0, rows, size):
            values = self.read(name, first, min(first + size, rows))
            coded = quantize_rows(values, self.bits)
            yield coded
            lost, had = self.lost.get(spec.kind, (0.0, 0.0))
            missing = dequantize_rows(coded) - values
            lost += float(np.vdot(missing, missing))  # of the report, in no file
            self.lost[spec.kind] = lost, had + float(np.vdot(values, values))

    def write(self, writer: NpzWriter, name: str, command: str) -> None:
        """All of the model. `name` and `command` go into the manifest."""
        for spec in self.specs:
            stored = hugging_face(spec.name)
            if spec.kind == "vector":
                writer.floats(stored, self.read(stored, 0, spec.shape[0]))
            else:
                writer.codes(stored, spec.shape, self.runs(stored, spec))
        for document in DOCUMENTS:
            content = self.checkpoint.document(document)
            if content and document != "config.json":
                writer.document(document, content)
        self.checkpoint.check_unchanged()
        raw = parse_json(self.checkpoint.document("config.json") or b"{}", "config.json")
        raw.pop("quantization_config", None)  # of the source's weights, not of these
        metadata = {"config": raw, "command": command, "chalot": __version__}
        writer.finish(
            model_of(self.config, name), architecture_of(self.config, self.bits), metadata
        )

    def kinds(self) -> Iterator[KindReport]:
        """A row for each kind of tensor there is."""
        for kind in (*KINDS, "vector"):
            specs = [s for s in self.specs if s.kind == kind]
            if not specs:
                continue
            lost, had = self.lost.get(kind, (0.0, 0.0))
            scheme = "f32" if kind == "vector" else f"row{self.bits}"
            weights = sum(int(np.prod(s.shape)) for s in specs)
            stored = sum(map(self.stored_bytes, specs))
            error = lost / had if had else 0.0
            yield KindReport(kind, scheme, len(specs), weights, stored, error, 0, 0)


def model_of(config: ModelConfig, name: str) -> dict[str, Any]:
    """What the newer form says of a model."""
    return {
        "name": name,
        "family": config.family,
        "context_length": config.context,
        "hidden_dim": config.hidden,
        "num_layers": config.layers,
        "num_heads": config.heads,
    }


def architecture_of(config: ModelConfig, bits: int) -> dict[str, Any]:
    """What the older form says; `kv_groups` is the number of key/value heads."""
    variants = {1: "mqa", config.heads: "mha"}
    return {
        "context_length": config.context,
        "hidden_size": config.hidden,
        "intermediate_size": config.feed_forward,
        "num_layers": config.layers,
        "vocab_size": config.vocabulary,
        "attention": {
            "variant": variants.get(config.kv_heads, "gqa"),
            "num_heads": config.heads,
            "kv_groups": config.kv_heads,
            "head_dim": config.head_dim,
        },
        "activation": config.activation,
        "norm": {"type": "rmsnorm", "eps": config.norm_epsilon},
        "rope": {"base_theta": config.rope_theta},
    }


def write_npz(
    checkpoint: Checkpoint, folder: Path, source: str, bits: str, command: str, progress: Progress
) -> ConvertReport:
    """Both files in `folder`; the report's path is the manifest's.

    Raises SchemeError for other widths, and any other ChalotError as `convert` does.
    """
    if bits not in map(str, BITS):
        raise SchemeError(f"--bits {bits}: npz has none of that width; choose one of 8, 4, 2, 1")
    work = NpzExport(checkpoint, int(bits), progress)
    name = ENDING.sub("", name_of(source)) or "model"
    check_space(folder, work.planned_bytes())
    with NpzWriter(folder, name, int(bits)) as writer:
        work.write(writer, name, command)
    made = sum(p.stat().st_size for p in (writer.npz_path, writer.manifest_path))
    kinds = tuple(work.kinds())
    each = sum(k.bytes for k in kinds) * 8 / work.total
    return ConvertReport(str(writer.manifest_path), made, work.total, each, kinds)
