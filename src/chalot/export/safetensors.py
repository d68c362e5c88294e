"""A target of `convert`: a Hugging Face folder of plain numbers, which transformers loads.

Any source goes back to it: codes as the numbers that they stand for, under Hugging Face's names,
with the configuration and the tokenizer's documents. Rows go through in runs.

A vector that the type would round is stored as f32: norm weights may hold powers of two that were
folded in (model/calibration.py), and Gemma's are stored less 1, where rounding would cost more.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.convert import ConvertReport, check_space
from chalot.convert.conversion import Progress
from chalot.errors import SchemeError, WeightError
from chalot.export.reading import Export
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.documents import DOCUMENTS, parse_json
from chalot.formats.floats import narrowed, widened
from chalot.formats.gguf.config import CLASSES
from chalot.formats.names import hugging_face
from chalot.formats.one_by_one import name_of_family
from chalot.formats.safetensors.header import INDEX
from chalot.formats.safetensors.writer import FULL, SafetensorsWriter, TensorPlan, header
from chalot.model.config import from_hugging_face
from chalot.model.layers import TensorSpec

DEFAULT_TYPE = "bf16"
TYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}  # and as config.json names them
ARCHITECTURES = {  # by model_type
    **CLASSES,
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


class SafetensorsExport(Export):
    """One checkpoint on its way into one folder."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, progress: Progress) -> None:
        super().__init__(checkpoint, progress)
        self.types = {s.name: self._type(s, dtype) for s in self.specs}
        self.held: dict[str, list[TensorSpec]] = {}  # a tensor of the files -> what lies in it
        for spec in self.specs:
            self.held.setdefault(self.name(spec), []).append(spec)
        self.plans = [
            TensorPlan(name, self.types[s[0].name], (sum(t.shape[0] for t in s), *s[0].shape[1:]))
            for name, s in self.held.items()
        ]
        self.settings = settings(checkpoint, dtype)
        self.documents = {"config.json": json.dumps(self.settings, indent=2).encode()}
        for name in DOCUMENTS.keys() - {INDEX, "config.json"}:
            content = checkpoint.document(name)
            if content is not None:
                self.documents[name] = content

    def name(self, spec: TensorSpec) -> str:
        """What the family's own files call a tensor."""
        return name_of_family(hugging_face(spec.name), self.config.family)

    def _type(self, spec: TensorSpec, dtype: str) -> str:
        """The type asked for; f32 for a vector that it would round."""
        if spec.kind != "vector":
            return dtype
        values = self.checkpoint.float32(hugging_face(spec.name))
        try:
            return dtype if np.array_equal(widened(narrowed(values, dtype)), values) else "f32"
        except OverflowError:
            return "f32"

    def planned_bytes(self) -> int:
        """Bytes of all files, and some."""
        documents = sum(map(len, self.documents.values()))
        return documents + 2 * len(header(self.plans)) + sum(p.nbytes for p in self.plans)

    def notes(self) -> Iterator[str]:
        """A line for each thing that transformers will compute otherwise."""
        again = from_hugging_face(self.settings)
        if again.embedding_scale != self.config.embedding_scale:
            yield (
                "this family scales its embedding by sqrt(hidden), rounded to its weights' type: "
                f"{again.embedding_scale:.7g} of what is written, "
                f"{self.config.embedding_scale:.7g} of the source"
            )
        if self.config.inner_norms:
            yield (
                "what multiplies ternary matrices is not coded in 8 bits by what is written, as it "
                "is by BitNet's own classes"
            )

    def write(self, writer: SafetensorsWriter) -> None:
        """All tensors, in the writer's order, and the documents."""
        for plan in writer.order:
            parts = map(self._pieces, self.held[plan.name])
            writer.tensor(plan, itertools.chain.from_iterable(parts))
        for name, content in self.documents.items():
            writer.document(name, content)
        self.checkpoint.check_unchanged()

    def _pieces(self, spec: TensorSpec) -> Iterator[NDArray[Any]]:
        dtype = self.types[spec.name]
        for values in self.runs(spec):
            try:
                stored = narrowed(values, dtype)
            except OverflowError:
                raise WeightError(
                    f"{self.checkpoint.path}: tensor {hugging_face(spec.name)} has weights too "
                    f"large for {dtype}; choose --type f32 or bf16"
                ) from None
            yield stored
            self.note(spec, values, widened(stored))

    def stored(self, spec: TensorSpec) -> tuple[str, int]:
        """The type and bytes of a tensor."""
        dtype = self.types[spec.name]
        return dtype, TensorPlan("", dtype, spec.shape).nbytes


def settings(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """The source's config.json, of weights that are plain numbers of that type."""
    raw = checkpoint.document("config.json")
    found: dict[str, Any] = parse_json(raw or b"{}", f"{checkpoint.path}: config.json")
    for key in ("quantization_config", "dtype", "torch_dtype"):
        found.pop(key, None)
    found["torch_dtype"] = TYPES[dtype]  # every version reads this name, "dtype" only new ones
    found.setdefault("architectures", [ARCHITECTURES[found["model_type"]]])
    return found


def write_safetensors(
    checkpoint: Checkpoint, out: Path, type: str | None, progress: Progress, full: int = FULL
) -> ConvertReport:
    """An opened checkpoint as the folder `out`, in files of `full` bytes.

    Raises SchemeError for a type, WeightError for numbers that it cannot hold.
    """
    dtype = (type or DEFAULT_TYPE).lower()
    if dtype not in TYPES:
        raise SchemeError(
            f"--type {dtype!r}: safetensors are written of plain numbers; choose one of: "
            f"{', '.join(TYPES)}"
        )
    work = SafetensorsExport(checkpoint, dtype, progress)
    check_space(out, work.planned_bytes())
    with SafetensorsWriter(out, work.plans, full) as writer:
        work.write(writer)
        writer.commit()
    size = sum(p.stat().st_size for p in out.iterdir())
    return work.report(out, size, work.stored, tuple(work.notes()))
