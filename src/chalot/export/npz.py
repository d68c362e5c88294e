"""A target of `convert`: an .npz of codes with a scale and zero point per row, and its manifest.

Every matrix (embedding and head too) at 8, 4, 2 or 1 bits, vectors as float32, documents embedded,
so that NAME_manifest_q4.json is a whole model. Rows go through in runs; no tensor is in memory.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chalot import __version__
from chalot.convert import ConvertReport, check_space
from chalot.convert.batch import name_of
from chalot.convert.conversion import Progress
from chalot.errors import SchemeError
from chalot.export.reading import Export
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.documents import DOCUMENTS, parse_json
from chalot.formats.names import hugging_face
from chalot.formats.npz.writer import NpzWriter
from chalot.mixture import refuse_mixture
from chalot.model.config import ModelConfig
from chalot.model.layers import TensorSpec
from chalot.quant.rows import BITS, Rows, dequantize_rows, quantize_rows, row_bytes

ENDING = re.compile(r"_(quantized|manifest)_q\d+$")
SPARE = 700  # bytes of an array's header, its places in the listing and in the manifest


class NpzExport(Export):
    """One checkpoint on its way into one pair of files."""

    def __init__(self, checkpoint: Checkpoint, bits: int, progress: Progress) -> None:
        super().__init__(checkpoint, progress)
        refuse_mixture(self.config, "NPZ", "export it as safetensors")
        self.bits = bits

    def stored_bytes(self, spec: TensorSpec) -> int:
        """Bytes of a tensor's arrays, without their headers."""
        if spec.kind == "vector":
            return spec.shape[0] * 4
        return spec.shape[0] * (row_bytes(spec.shape[1], self.bits) + 8)

    def planned_bytes(self) -> int:
        """Bytes of both files, and some."""
        documents = sum(len(self.checkpoint.document(n) or b"") for n in DOCUMENTS)
        return documents + sum(self.stored_bytes(s) + 4 * SPARE for s in self.specs)

    def codes(self, spec: TensorSpec) -> Iterator[Rows]:
        """A matrix as codes, some rows at a time; errors are summed on the way."""
        for values in self.runs(spec):
            coded = quantize_rows(values, self.bits)
            yield coded
            self.note(spec, values, dequantize_rows(coded))

    def write(self, writer: NpzWriter, name: str, command: str) -> None:
        """All of the model. `name` and `command` go into the manifest."""
        for spec in self.specs:
            stored = hugging_face(spec.name)
            if spec.kind == "vector":
                writer.floats(stored, self.read(spec, 0, spec.shape[0]))
            else:
                writer.codes(stored, spec.shape, self.codes(spec))
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

    def stored(self, spec: TensorSpec) -> tuple[str, int]:
        """The type and bytes of a tensor."""
        return "f32" if spec.kind == "vector" else f"row{self.bits}", self.stored_bytes(spec)


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
    norm = "layernorm" if config.centred_norms else "rmsnorm"
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
        "norm": {"type": norm, "eps": config.norm_epsilon},
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
    return work.report(writer.manifest_path, made, work.stored)
