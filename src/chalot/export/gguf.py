"""A target of `convert`: a GGUF file that llama.cpp loads.

Every matrix in blocks of the type that is asked for, in llama.cpp's order of rows; vectors as F32.
Rows go through in runs, each cut into pieces that several threads encode.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot import machine
from chalot.convert import ConvertReport, check_space
from chalot.convert.conversion import Progress
from chalot.errors import SchemeError, WeightError
from chalot.export.reading import DENSE, Export
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.documents import parse_json
from chalot.formats.gguf.blocks import decode
from chalot.formats.gguf.encode import WRITABLE, Writable, encode
from chalot.formats.gguf.metadata import architecture_metadata, lost, written
from chalot.formats.gguf.names import PERMUTED, SHIFTED, to_gguf
from chalot.formats.gguf.vocabulary import tokenizer_metadata
from chalot.formats.gguf.writer import GgufWriter, TensorPlan, Value, header
from chalot.formats.names import hugging_face
from chalot.mixture import refuse_mixture
from chalot.model.config import ModelConfig
from chalot.model.layers import KINDS, TensorSpec
from chalot.model.rope import kept

Floats = NDArray[np.float32]
PIECE = 1 << 16  # numbers that a thread encodes at once: they stay in its core's cache
DEFAULT_TYPE = "f16"
DIVISORS = "rope_freqs.weight"
READ = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def parse_types(text: str) -> dict[str, str]:
    """The type of each kind of matrix, and of "" for those that are not named.

    "q4_k", "q4_k,head=q8_0", "embedding=f16". Raises SchemeError, which lists the types there are.
    """
    chosen: dict[str, str] = {}
    for item in text.lower().split(","):
        kind, equals, name = (part.strip() for part in item.rpartition("="))
        if (equals and kind not in KINDS) or kind in chosen:
            raise SchemeError(
                f"--type {item!r}: expected a type, or KIND=TYPE, each kind once; "
                f"kinds: {', '.join(KINDS)}"
            )
        if name not in WRITABLE:
            raise SchemeError(
                f"--type {name!r}: GGUF files are not written of it; "
                f"choose one of: {', '.join(WRITABLE)}"
            )
        chosen[kind] = name
    return {"": DEFAULT_TYPE} | chosen


def type_of(spec: TensorSpec, types: Mapping[str, str], tied: bool) -> str:
    """The type that a tensor is stored as: as asked for, else as llama.cpp's quantiser chooses.

    That gives the head, and an embedding that is the head too, q6_k, or q8_0 where rows are no
    multiple of 256; and the embedding of ternary files q4_k.
    """
    if spec.kind == "vector":
        return "f32"
    name = types.get(spec.kind) or types[""]
    if spec.kind not in types and name not in (*DENSE, "q8_0"):
        if spec.kind == "head" or (spec.kind == "embedding" and tied):
            name = "q6_k"
        elif spec.kind == "embedding" and name.startswith("tq"):
            name = "q4_k"
    while spec.shape[1] % WRITABLE[name].block.weights:
        name = WRITABLE[name].instead
    return name


class GgufExport(Export):
    """One checkpoint on its way into one GGUF file."""

    def __init__(
        self, checkpoint: Checkpoint, types: Mapping[str, str], threads: int, progress: Progress
    ) -> None:
        super().__init__(checkpoint, progress)
        refuse_mixture(self.config, "GGUF", "export it as safetensors")
        self.fields = fields(self.config)
        self.row = written(self.fields)
        self.types, self.threads = types, threads
        self.kind = {s.name: type_of(s, types, self.config.tied) for s in self.specs}

    def plans(self) -> list[TensorPlan]:
        """Every tensor of the file, in its order."""
        out = [
            TensorPlan(self.gguf_name(s.name), WRITABLE[self.kind[s.name]].block, s.shape)
            for s in self.specs
        ]
        if self.scaled():
            out.insert(0, TensorPlan(DIVISORS, WRITABLE["f32"].block, (self.config.head_dim // 2,)))
        return out

    def gguf_name(self, name: str) -> str:
        """GGUF's name of a tensor."""
        found = to_gguf(hugging_face(name), self.row.name)
        assert found is not None, name  # every tensor of a written family has one
        return found

    def metadata(self, name: str, tokenizer: bool) -> tuple[dict[str, Value], list[str]]:
        """All pairs of the header, and a line for each thing that is lost."""
        notes = [*lost(self.fields, self.row), *self._other_types()]
        pairs: dict[str, Value] = {
            "general.architecture": self.row.name,
            "general.type": "model",
            "general.name": name,
            "general.file_type": WRITABLE[self.types[""]].file_type,
            "general.quantization_version": 2,
            **architecture_metadata(self.fields, self.row),
        }
        if tokenizer and self.checkpoint.document("tokenizer.json") is not None:
            more, said = self._tokenizer()
            return pairs | more, notes + said
        notes.append("the file has no tokenizer: programs can give it token ids only")
        return pairs | {"tokenizer.ggml.model": "none"}, notes

    def _tokenizer(self) -> tuple[dict[str, Value], list[str]]:
        documents: dict[str, Any] = {}
        for name in ("special_tokens_map.json", *READ):
            raw = self.checkpoint.document(name)
            parsed = {} if raw is None else parse_json(raw, f"{self.checkpoint.path}: {name}")
            documents[name] = parsed if isinstance(parsed, dict) else {}
        older = documents.pop("special_tokens_map.json")
        documents["tokenizer_config.json"] = older | documents["tokenizer_config.json"]
        jinja = self.checkpoint.document("chat_template.jinja")
        template = None if jinja is None else jinja.decode("utf-8", "replace")
        return tokenizer_metadata(documents, template, self.config.vocabulary)

    def _other_types(self) -> Iterator[str]:
        """A line on matrices that are stored as another type than asked for."""
        others: dict[tuple[str, str], list[TensorSpec]] = {}
        for spec in self.specs:
            asked = self.types.get(spec.kind) or self.types[""]
            if spec.kind != "vector" and self.kind[spec.name] != asked:
                others.setdefault((asked, self.kind[spec.name]), []).append(spec)
        for (asked, got), specs in others.items():
            kinds = ", ".join(dict.fromkeys(s.kind for s in specs))
            widths = sorted({s.shape[1] for s in specs})
            block = WRITABLE[asked].block.weights
            why = "as llama.cpp does"
            if all(w % block for w in widths):
                why = f"rows of {', '.join(map(str, widths))} are no multiple of {block}"
            yield f"{len(specs)} of {kinds} as {got} instead of {asked}: {why}"

    def write(self, writer: GgufWriter) -> None:
        """All tensors in the order of `plans`."""
        if self.scaled():
            writer.tensor(DIVISORS, [rope_divisors(self.config)])
        with ThreadPoolExecutor(self.threads) as pool:
            for spec in self.specs:
                writer.tensor(self.gguf_name(spec.name), self._pieces(spec, pool))
        self.checkpoint.check_unchanged()

    def scaled(self) -> bool:
        """Whether rope's frequencies are divided by a tensor's numbers."""
        return self.config.rope_scaling is not None and self.config.rope_scaling.kind == "llama3"

    def _pieces(self, spec: TensorSpec, pool: ThreadPoolExecutor) -> Iterator[NDArray[Any]]:
        """The blocks of a tensor in order; errors are measured on some rows of each run."""
        kind = WRITABLE[self.kind[spec.name]]
        for rows in self._runs(spec):
            step = max(1, PIECE // rows.shape[1])
            parts = [rows[at : at + step] for at in range(0, len(rows), step)]
            try:
                for part, coded in zip(parts, pool.map(encoder(kind), parts), strict=True):
                    if part is parts[0]:
                        again = decode(kind.block, coded.reshape(-1)).reshape(part.shape)
                        self.note(spec, part, again)
                    yield coded
            except OverflowError:
                raise WeightError(
                    f"{self.checkpoint.path}: tensor {hugging_face(spec.name)} has weights too "
                    f"large for {kind.block.name.lower()}; choose --type f32 or bf16"
                ) from None

    def _runs(self, spec: TensorSpec) -> Iterator[Floats]:
        """A tensor as a matrix, some rows at a time, as the architecture has it."""
        head = self.config.head_dim if self.row.name in PERMUTED and turned(spec.name) else 1
        for values in self.runs(spec, head):
            if spec.kind == "vector" and self.row.name in SHIFTED and spec.offset:
                values = values + np.float32(spec.offset)
            if head > 1:
                values = interleaved(values, head)
            yield values.reshape(len(values), -1)

    def stored(self, spec: TensorSpec) -> tuple[str, int]:
        """The type and bytes of a tensor."""
        name = self.kind[spec.name]
        return name, TensorPlan("", WRITABLE[name].block, spec.shape).nbytes


def encoder(kind: Writable) -> Callable[[Floats], NDArray[Any]]:
    """`encode` to one type."""
    return lambda rows: encode(kind, rows)


def fields(config: ModelConfig) -> dict[str, Any]:
    """All fields of a configuration as plain values, defaults too."""
    out = {name: getattr(config, name) for name in config.__struct_fields__}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        out["rope_scaling"] = {n: getattr(scaling, n) for n in scaling.__struct_fields__}
    return out


def turned(name: str) -> bool:
    """Whether rope turns what a tensor gives: queries and keys, their biases too."""
    return name.removesuffix(".bias").endswith((".query", ".key"))


def interleaved(rows: Floats, head: int) -> Floats:
    """Rows of whole heads from half-split rope (i, i + head / 2) to interleaved (2 i, 2 i + 1)."""
    halves = rows.reshape(-1, 2, head // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def rope_divisors(config: ModelConfig) -> Floats:
    """(head_dim / 2,): by what the "llama3" rule divides each frequency."""
    scaling = config.rope_scaling
    assert scaling is not None
    base, out = Decimal(config.rope_theta), []
    for pair in range(config.head_dim // 2):
        frequency = base ** (-Decimal(2 * pair) / config.head_dim)
        keep = kept(scaling, config.head_dim, base, pair, frequency)
        out.append(float(1 / ((1 - keep) / Decimal(scaling.factor) + keep)))
    return np.array(out, "<f4")


def write_gguf(
    checkpoint: Checkpoint,
    out: Path,
    type: str | None,
    name: str,
    tokenizer: bool,
    threads: int | None,
    progress: Progress,
) -> ConvertReport:
    """An opened checkpoint as a GGUF file that calls itself `name`.

    Raises SchemeError for a type, UnsupportedError for a model and TokenizerError for a tokenizer
    that GGUF cannot hold.
    """
    types = parse_types(type or DEFAULT_TYPE)
    work = GgufExport(checkpoint, types, threads or machine.default_threads(), progress)
    pairs, notes = work.metadata(name, tokenizer)
    plans = work.plans()
    begin = header(pairs, plans)
    check_space(out, len(begin) + sum(p.padded for p in plans))
    with GgufWriter(out, begin, plans) as writer:
        work.write(writer)
        writer.commit()
    return work.report(out, out.stat().st_size, work.stored, tuple(notes))
