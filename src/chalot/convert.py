"""The verb `convert`: a checkpoint becomes one `.myai` file, a tensor at a time.

Nothing larger than a layer is in memory at once. Weights are read in runs of rows, checked, folded,
encoded and written; errors are measured on the way, on some rows of each run.
"""

import hashlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from chalot import __version__, machine
from chalot.errors import FormatError, LimitError, SchemeError, WeightError
from chalot.formats.checkpoint import Checkpoint, open_checkpoint
from chalot.formats.documents import parse_json
from chalot.formats.files import quoted
from chalot.formats.myai import HEADER, MyaiFile, Source
from chalot.formats.myai_writer import MyaiWriter
from chalot.formats.names import hugging_face
from chalot.keeping import KEEP, coarse_note, keeps, kept, notes, usual_of
from chalot.kernels.backend import Backend, open_backend
from chalot.kernels.program import PAGE
from chalot.model.calibration import Calibration, Plan, ordered_sum, some_rows
from chalot.model.config import ModelConfig, from_hugging_face, inverse_frequencies
from chalot.model.layers import KINDS, TensorSpec, model_tensors
from chalot.planfile import planned_schemes, read_plan
from chalot.quant import coarse, codes, packing
from chalot.quant.carried import carried
from chalot.quant.grids import tables_of
from chalot.quant.scheme import PANEL, SCHEMES, Scheme
from chalot.refining import Refine, Refining

Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # what, done, of
DOCUMENTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
COMPUTED = ".rotary_emb.inv_freq"  # of older checkpoints: follows from config.json
RUN = 4 << 20  # numbers in memory at once
CALIBRATION_TOKENS = 128
CALIBRATION_TEXT = ("demo", "model", "calibration.txt")  # disjoint from the held-out text
DEFAULT_SCHEME = "nl4"
TERNARY = ("least-error", "absmean")  # where the scale of ternary weights comes from


@dataclass(frozen=True)
class KindReport:
    """What storing one kind of tensor cost. `error` is relative squared error."""

    kind: str
    scheme: str
    tensors: int
    weights: int
    bytes: int
    error: float
    wide: int  # tensors that ask for 16-bit activations
    folded: int  # tensors whose columns were balanced
    source_error: float | None = None  # what was lost when the source was quantised
    product_errors: tuple[float, float] | None = None  # before and after refinement: refining.py


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` made."""

    path: str
    bytes: int
    weights: int
    bits_per_weight: float
    kinds: tuple[KindReport, ...]
    notes: tuple[str, ...] = ()  # what a user should know, a line each
    validation: Any = None  # a ValidateReport, where the files were compared with their source


def parse_schemes(text: str) -> dict[str, Scheme]:
    """The scheme of each kind of tensor: "nl4" for all, or "attention=int8,ffn=nl4".

    A kind that is not named takes the default; a head that is not named goes with the embedding.
    "keep" gives the default too: see `schemes_for`. Raises SchemeError for unknown kinds or
    schemes.
    """
    if text.strip().lower() == KEEP:
        text = DEFAULT_SCHEME
    if "=" not in text:
        return dict.fromkeys(KINDS, Scheme.parse(text))
    chosen: dict[str, Scheme] = {}
    for item in text.split(","):
        kind, _, name = (part.strip() for part in item.partition("="))
        if kind not in KINDS or kind in chosen:
            raise SchemeError(
                f"{item!r}: expected KIND=SCHEME, each kind once; kinds: {', '.join(KINDS)}"
            )
        chosen[kind] = Scheme.parse(name)
    default = Scheme.parse(DEFAULT_SCHEME)
    chosen.setdefault("head", chosen.get("embedding", default))
    return {kind: chosen.get(kind, default) for kind in KINDS}


def schemes_for(
    text: str | None, checkpoint: Checkpoint, plan: Path | None = None
) -> dict[str, Scheme]:
    """Schemes by kind, and by tensor where a plan or a source in codes names its own.

    Without a text, as is usual for such a source. Raises SchemeError or FormatError.
    """
    text = text or usual_of(checkpoint.tensors, DEFAULT_SCHEME)
    schemes = parse_schemes(text)
    config = read_config(checkpoint)
    if text.strip().lower() == KEEP:
        schemes |= kept(checkpoint.tensors, config)
    if plan is not None:
        schemes |= planned_schemes(read_plan(plan, config), checkpoint, config)
    return schemes


def scheme_of(schemes: Mapping[str, Scheme], spec: TensorSpec) -> Scheme:
    """A matrix's own scheme, else that of its kind."""
    return schemes.get(spec.name) or schemes[spec.kind]


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


def planned_bytes(config: ModelConfig, schemes: Mapping[str, Scheme]) -> int:
    """Bytes that the file will need, without its documents."""
    total = HEADER
    for spec in model_tensors(config):
        if spec.kind == "vector":
            total += spec.shape[0] * 4
        else:
            total += packing.stored_bytes(scheme_of(schemes, spec), spec.shape[0], spec.shape[1])
        total += packing.ALIGNMENT + 300  # alignment, and its place in the manifest
    return total


def calibration_ids(checkpoint: Checkpoint, config: ModelConfig) -> list[int]:
    """Some 128 tokens of the bundled text; counted ids where the checkpoint has no tokenizer."""
    raw = checkpoint.document("tokenizer.json")
    if raw is not None:
        from chalot.text.tokenizer import Tokenizer

        text = resources.files("chalot").joinpath(*CALIBRATION_TEXT).read_text("utf-8")
        tokenizer = Tokenizer.from_documents(raw, None, None, None)
        found = [i for i in tokenizer.encode(text[:2000]) if i < config.vocabulary]
        if found:
            return found[:CALIBRATION_TOKENS]
    return [(i * 7919) % config.vocabulary for i in range(CALIBRATION_TOKENS)]


class Conversion:
    """One checkpoint on its way into one file."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        schemes: Mapping[str, Scheme],
        backend: Backend,
        progress: Progress,
        balance: Mapping[str, Scheme] | None = None,
        ternary: str = TERNARY[0],
        refine: Refine | None = None,
    ) -> None:
        """`balance` folds channels as these schemes, of kinds, would have it: of dense files.

        `ternary` "absmean" gives ternary matrices one scale each, BitNet's, and leaves them as they
        are otherwise: a model that was trained with that scale has it for these very weights.
        """
        self.checkpoint = checkpoint
        self.config = read_config(checkpoint)
        check_shapes(self.config, checkpoint)
        self.specs = model_tensors(self.config)
        matrices = [s for s in self.specs if s.kind != "vector"]
        self.schemes = {s.name: scheme_of(schemes, s) for s in matrices}
        self.balanced = {s.name: scheme_of(balance or schemes, s) for s in matrices}
        self.absmean = ternary == "absmean"
        if self.absmean:
            own = {n for n, s in self.schemes.items() if s.fit == "ternary"}
            self.balanced |= dict.fromkeys(own, SCHEMES["f32"])
        self.offsets = {s.name: np.float32(s.offset) for s in self.specs if s.offset}
        held = checkpoint.tensors
        self.kept = {n for n, s in self.schemes.items() if keeps(held[hugging_face(n)], s)}
        self.backend = backend
        self.progress = progress
        self.digest = hashlib.sha256()
        self.plan = Plan()
        self.refining: Refining | None = None
        if refine is not None:
            self.refining = Refining(refine, checkpoint, self.config, self.schemes, backend)
        self.errors: dict[str, tuple[float, float]] = {}
        self.taken: set[str] = set()  # tensors that have the source's own codes
        self.done = 0
        self.total = sum(int(np.prod(s.shape)) for s in self.specs)

    def read(self, name: str, first: int = 0, last: int | None = None) -> Floats:
        """Rows of a tensor as it is computed with. Raises WeightError for NaN or Inf."""
        values = self.checkpoint.float32(hugging_face(name), first, last)
        if not np.isfinite(values).all():
            raise WeightError(
                f"{self.checkpoint.path}: tensor {hugging_face(name)} has NaN or Inf among its "
                "weights; take another checkpoint"
            )
        return values + self.offsets[name] if name in self.offsets else values

    def write(self, writer: MyaiWriter) -> None:
        """All tensors, in the order in which a forward pass meets them."""
        frequencies = inverse_frequencies(self.config)
        calibration = self._calibration(frequencies)
        planned = -1
        later = None  # a tied embedding: it is refined as a head, by what comes last
        for spec in self.specs:
            layer = int(spec.name.split(".")[1]) if spec.name.startswith("layers.") else None
            if calibration is not None and layer is not None and layer > planned:
                calibration.layer(layer, self.read, self._source_scheme(layer))
                planned = layer
            if self.refining is not None and spec.name == "embedding" and self.config.tied:
                later = spec
                self._digest(spec)
                continue
            if self.refining is not None and spec.name == "head":
                assert calibration is not None
                self.refining.head(calibration.head_inputs(self.read("final_norm")))
            self._tensor(writer, spec)
        if calibration is not None:  # the head's activations are known only now
            head = "embedding" if self.config.tied else "head"
            rows = np.concatenate(
                [self.read(head, int(i), int(i) + 1) for i in some_rows(self.config.vocabulary)]
            )
            calibration.head(head, self.read("final_norm"), rows)
            if head in writer.tensors:
                writer.tensors[head] = msgspec.structs.replace(
                    writer.tensors[head], activation=8 * self.plan.planes.get(head, 1)
                )
        if later is not None:
            assert calibration is not None and self.refining is not None
            self.refining.head(calibration.head_inputs(self.read("final_norm")))
            digest = self.digest.copy()  # which has it already
            self._tensor(writer, later)
            self.digest = digest
        writer.constants["rope.inverse_frequency"] = writer.extent([frequencies.astype("<f4")])
        for s in SCHEMES.values():
            tables = tables_of(s)
            if tables is not None and s in self.schemes.values():
                writer.constants[f"tables.{s}"] = writer.extent([tables])
        for name in DOCUMENTS:
            raw = self.checkpoint.document(name)
            if raw is not None:
                writer.documents[name] = writer.extent([raw])
        self._tokenizer_tables(writer)
        self.checkpoint.check_unchanged()

    def _tokenizer_tables(self, writer: MyaiWriter) -> None:
        """What opens faster than tokenizer.json, where there is such a thing."""
        raw = self.checkpoint.document("tokenizer.json")
        if raw is not None:
            from chalot.text.byte_pairs import TABLES
            from chalot.text.tokenizer import compiled

            tables = compiled(raw)
            if tables is not None:
                writer.documents[TABLES] = writer.extent([tables])

    def _calibration(self, frequencies: Floats) -> Calibration | None:
        if not any(s.is_coded for s in self.balanced.values()):
            return None
        ids = calibration_ids(self.checkpoint, self.config)[:PAGE]
        if self.refining is not None:
            ids = self.refining.ids
        hidden = np.concatenate([self.read("embedding", i, i + 1) for i in ids])
        hidden *= np.float32(self.config.embedding_scale)
        calibration = Calibration(
            self.config, self.balanced, self.backend, frequencies, hidden, self.kept
        )
        if self.refining is not None:
            calibration.watch = self.refining.watch
        calibration.plan = self.plan
        return calibration

    def _source_scheme(self, layer: int) -> Scheme:
        """The dense scheme that holds a layer's weights as the source stores them."""
        dtype = self.checkpoint.tensors[hugging_face(f"layers.{layer}.query")].dtype
        same = all(
            self.checkpoint.tensors[hugging_face(f"layers.{layer}.{n}")].dtype == dtype
            for n in ("key", "value", "output", "gate", "up", "down")
        )
        return SCHEMES[dtype if same and dtype in packing.DENSE else "f32"]

    def _digest(self, spec: TensorSpec) -> None:
        """Let the source's digest have a matrix that is written later."""
        self.digest.update(f"{spec.name} {spec.shape}".encode())
        size = max(PANEL, RUN // spec.shape[1])
        for first in range(0, spec.shape[0], size):
            values = self.read(spec.name, first, min(first + size, spec.shape[0]))
            self.digest.update(np.ascontiguousarray(values).data)

    def _tensor(self, writer: MyaiWriter, spec: TensorSpec) -> None:
        self.digest.update(f"{spec.name} {spec.shape}".encode())
        if spec.kind == "vector":
            values = self.read(spec.name)
            self.digest.update(values.data)
            values = self.plan.apply(spec.name, values, 0)
            writer.tensor(spec.name, "f32", spec.shape, [values.astype("<f4")])
            self._advance(spec, values.size)
            return
        planes = self.plan.planes.get(spec.name, 1)
        scheme = self.schemes[spec.name]
        writer.tensor(spec.name, str(scheme), spec.shape, self._pieces(spec), planes * 8)
        lost, had = self.errors[spec.name]
        writer.note_error(spec.name, float(f"{lost / max(had, 1e-30):.3g}"))

    def _unit(self, spec: TensorSpec) -> np.float32 | None:
        """The one scale of a matrix; None where each row and segment has its own.

        What is ternary already keeps its scales: the mean would count its zeros.
        """
        held = self.checkpoint.tensors[hugging_face(spec.name)].scheme
        fit = self.schemes[spec.name].fit
        if not self.absmean or fit != "ternary" or held == "ternary":
            return None
        rows, columns = spec.shape
        size = max(PANEL, RUN // columns)
        return coarse.absmean(
            self.plan.apply(spec.name, self.read(spec.name, first, min(first + size, rows)), first)
            for first in range(0, rows, size)
        )

    def _runs(self, spec: TensorSpec) -> Iterator[Floats]:
        """The tensor's rows, folded, in runs that are a multiple of a panel."""
        rows, columns = spec.shape
        size = max(PANEL, RUN // columns // PANEL * PANEL)
        with ThreadPoolExecutor(1) as beside:
            for first in range(0, rows, size):
                values = self.read(spec.name, first, min(first + size, rows))
                digested = beside.submit(self.digest.update, np.ascontiguousarray(values).data)
                yield self.plan.apply(spec.name, values, first)
                digested.result()
                self._advance(spec, values.size)

    def _pieces(self, spec: TensorSpec) -> Iterator[NDArray[np.generic]]:
        """The bytes of a matrix's extent in order: panels, then the other parts of its layout."""
        scheme = self.schemes[spec.name]
        lost, had, at, unit = 0.0, 0.0, 0, self._unit(spec)
        behind: list[list[NDArray[np.uint8]]] = []  # of each part but the panels
        for values in self._runs(spec):
            sample = values[:PANEL]
            if not scheme.is_coded:
                data = packing.pack_dense(values, scheme)
                yield data
                shape = (len(sample), values.shape[1])
                part = data[: packing.stored_bytes(scheme, *shape)]
                again = packing.numbers(packing.Matrix(scheme, shape, part))[:, : shape[1]]
            else:
                layout = packing.Layout(scheme, *values.shape)
                data = self._encoded(spec, at, values, unit)
                yield data[layout.parts[0]]
                # a view would keep all
                behind.append([data[part].copy() for part in layout.parts[1:]])
                few = packing.Layout(scheme, len(sample), values.shape[1])
                part = packing.take_panels(data, layout, few)
                again = codes.dequantize(packing.unpack(part, scheme, (few.rows, few.columns)))
            at += len(values)
            lost += ordered_sum(again - sample)
            had += ordered_sum(sample)
        self.errors[spec.name] = lost, had
        if scheme.is_coded:
            whole = packing.Layout(scheme, spec.shape[0], spec.shape[1])
            for i, (before, after) in enumerate(pairwise(whole.parts)):
                yield np.zeros(after.start - before.stop, np.uint8)
                yield from (of_run[i] for of_run in behind)

    def _encoded(
        self, spec: TensorSpec, first: int, values: Floats, unit: np.float32 | None
    ) -> NDArray[np.uint8]:
        """The extent of some rows: a source's own codes where they are of this form already."""
        scheme, name = self.schemes[spec.name], hugging_face(spec.name)
        held = getattr(self.checkpoint, "codes", None)  # of NpzModel
        is_same = self.checkpoint.tensors[name].scheme == str(scheme)
        if held is not None and is_same and spec.name not in self.plan.columns:
            rows = held(name, first, first + len(values))
            rows = replace(rows, scale=self.plan.apply_rows(spec.name, rows.scale, first))
            found = carried(rows, scheme)
            if found is not None:
                self.taken.add(spec.name)
                return packing.pack(found)
        if unit is not None:
            return packing.pack(codes.quantize(values, scheme, unit))
        data = self.backend.encode(values, scheme)
        if self.refining is None:
            return data
        return self.refining.encoded(spec, values, data, self.plan.columns.get(spec.name))

    def _advance(self, spec: TensorSpec, weights: int) -> None:
        self.done += weights
        self.progress(spec.name, self.done, self.total)

    def is_as_it_was(self, name: str) -> bool:
        """Whether a matrix was not quantised, or not again."""
        scheme, info = self.schemes[name], self.checkpoint.tensors[hugging_face(name)]
        same = keeps(info, scheme) and not self.errors[name][0]
        return not scheme.is_coded or same

    def kinds(self, writer: MyaiWriter) -> Iterator[KindReport]:
        """A row for each kind of tensor there is."""
        for kind in (*KINDS, "vector"):
            names = [s.name for s in self.specs if s.kind == kind]
            if not names:
                continue
            entries = [writer.tensors[n] for n in names]
            lost = sum(self.errors.get(n, (0.0, 0.0))[0] for n in names)
            had = sum(self.errors.get(n, (0.0, 0.0))[1] for n in names)
            yield KindReport(
                kind,
                ", ".join(sorted({e.scheme for e in entries})),
                len(names),
                sum(int(np.prod(e.shape)) for e in entries),
                sum(e.extent.bytes for e in entries),
                lost / had if had else 0.0,
                sum(e.activation == 16 for e in entries),
                sum(n in self.plan.columns for n in names),
                source_error(self.checkpoint, {n: self.errors.get(n, (0.0, 0.0)) for n in names}),
                self.refining.gain(names) if self.refining is not None else None,
            )


def convert(
    source: str | Path,
    out: str | Path,
    scheme: str | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    name: str | None = None,
    plan: str | Path | None = None,
    balance: str | None = None,
    ternary: str = TERNARY[0],
    refine: Refine | None = None,
) -> ConvertReport:
    """Convert a Hugging Face folder, a hub id or a model's file to `out`, a `.myai` file.

    `scheme` is a name ("nl4", "int8", "bf16", "f16", "f32") or "KIND=SCHEME,..." with the kinds
    embedding, head, attention and ffn; or "keep", by which weights that are quantised already take
    the scheme that loses least of them. None is "keep" for those, else "nl4". `command` and `name`
    are what the file says of its making and of its source. `plan` is a file of `chalot plan`, whose
    tensors go by it and not by `scheme`. `balance` folds channels of a dense file as another scheme
    would have it. `ternary` is where the scale of ternary weights comes from: "least-error", or
    BitNet's "absmean" of a matrix. `refine` finds better codes at the same bytes. Peak memory is
    that of a layer and its largest tensor (chalot.fitting). The file appears whole or not at all.
    Raises a ChalotError for anything wrong with source or target.
    """
    from chalot.sources import called, resolve

    parse_schemes(scheme or DEFAULT_SCHEME)  # before anything is downloaded
    asked = [] if scheme is None else ["--scheme", scheme]
    asked += [] if plan is None else ["--plan", str(plan)]
    said = command or shlex.join(["chalot", "convert", str(source), *asked])
    name = name or called(source)
    checkpoint = open_checkpoint(resolve(source, progress))
    try:
        schemes = schemes_for(scheme, checkpoint, None if plan is None else Path(plan))
        balanced = parse_schemes(balance) if balance else None
        watch = progress or (lambda *_: None)
        return write_myai(
            checkpoint, Path(out), schemes, name, said, threads, watch, balanced, ternary, refine
        )
    finally:
        checkpoint.close()


def write_myai(
    checkpoint: Checkpoint,
    out: Path,
    schemes: Mapping[str, Scheme],
    name: str,
    command: str,
    threads: int | None,
    progress: Progress,
    balance: Mapping[str, Scheme] | None = None,
    ternary: str = TERNARY[0],
    refine: Refine | None = None,
) -> ConvertReport:
    """An opened checkpoint as a `.myai` file. `name` and `command` go into its manifest."""
    backend = open_backend(threads=threads)
    work = Conversion(checkpoint, schemes, backend, progress, balance, ternary, refine)
    check_ternary(ternary, work.schemes)
    if work.config.tied and schemes["head"] != schemes["embedding"]:
        raise SchemeError(
            f"head={schemes['head']}, embedding={schemes['embedding']}: this model's "
            "head is its embedding; give both one scheme"
        )
    check_space(
        out,
        planned_bytes(work.config, schemes)
        + sum(len(checkpoint.document(n) or b"") for n in DOCUMENTS),
    )
    said = command if refine is None else f"{command}  # {refine}"
    with MyaiWriter(out) as writer:
        work.progress("", 0, work.total)  # the source is good, and there is a place for it
        work.write(writer)
        writer.finish(
            msgspec.to_builtins(work.config),
            Source(name, work.digest.hexdigest(), said, __version__),
            lambda partial: check_text(checkpoint, partial),
        )
        kinds = tuple(work.kinds(writer))
    stored = sum(k.bytes for k in kinds)
    others = {n: s for n, s in work.schemes.items() if n not in work.taken}
    becomes = {n: None if work.is_as_it_was(n) else str(s) for n, s in others.items()}
    noted = [*notes(checkpoint.path, checkpoint.tensors, becomes)]
    if any(schemes[kind].is_coarse for kind in KINDS):  # and no plan's choice
        noted += coarse_note(work.schemes, work.errors)
    if refine is not None:
        noted.append(f"refined: {refine}")
    return ConvertReport(
        str(out), out.stat().st_size, work.total, stored * 8 / work.total, kinds, tuple(noted)
    )


def check_ternary(ternary: str, schemes: Mapping[str, Scheme]) -> None:
    """Raise SchemeError for a scale that is not known, or that no matrix would have."""
    if ternary not in TERNARY:
        raise SchemeError(f"--ternary {ternary}: not known; choose one of: {', '.join(TERNARY)}")
    if ternary != TERNARY[0] and not any(s.fit == "ternary" for s in schemes.values()):
        found = ", ".join(sorted({str(s) for s in schemes.values()}))
        raise SchemeError(
            f"--ternary {ternary}: nothing would be ternary, found {found}; "
            "add --scheme ternary, or leave --ternary out"
        )


def source_error(checkpoint: Checkpoint, sizes: Mapping[str, tuple[float, float]]) -> float | None:
    """The mean error that a source's tensors have, where all that are in codes say so.

    `sizes` has each tensor's (error, sum of squares) of this conversion, by chalot's names.
    """
    infos = {n: checkpoint.tensors[hugging_face(n)] for n in sizes}
    if any(i.error is None for i in infos.values()):
        return None
    had = sum(size for _, size in sizes.values())
    lost = sum((infos[n].error or 0.0) * size for n, (_, size) in sizes.items())
    return lost / had if had else None


def check_space(out: Path, need: int) -> None:
    """Raise LimitError if the disk that will hold `out` has fewer than `need` bytes free."""
    free = machine.disk_free(out.absolute().parent)
    if free < need:
        raise LimitError(
            f"{out}: needs {need:,} bytes, the disk has {free:,} free; "
            "free some space or choose another place"
        )


def check_text(checkpoint: Checkpoint, partial: Path) -> None:
    """Open what was written, and raise TokenizerError if its tokenizer or template changed."""
    from chalot.text.byte_pairs import TABLES
    from chalot.text.tokenizer import check_same, from_source

    file = MyaiFile(partial)
    try:
        if checkpoint.document("tokenizer.json") is not None:
            check_same(from_source(checkpoint), from_source(file, file.document(TABLES)))
    finally:
        file.close()
