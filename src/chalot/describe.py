"""The verb `describe`: what a model is, what it takes, and whether it fits here.

Takes a `.myai` file, a Hugging Face folder or a hub id, and reads nothing but headers: of a hub id
before any download. What is no `.myai` file yet is judged as it would be in a scheme: the one that
`convert` takes, unless another is asked for.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from chalot import machine, memory
from chalot.errors import FormatError, HubBusyError, HubOfflineError, SchemeError, UnsupportedError
from chalot.fitting import Fit, fit
from chalot.fitting import render as render_fit
from chalot.formats import hub
from chalot.formats.bitnet import as_computed
from chalot.formats.checkpoint import TensorInfo, open_checkpoint
from chalot.formats.documents import DOCUMENTS, parse_json
from chalot.formats.experts import listed
from chalot.formats.files import quoted
from chalot.formats.myai import MyaiFile
from chalot.formats.names import hugging_face
from chalot.keeping import KEEP, kept, usual_of
from chalot.kernels.backend import instruction_sets, open_backend
from chalot.kernels.program import CACHE
from chalot.library import is_ready
from chalot.load import read_model_config
from chalot.memory import Memory, Stored
from chalot.model.config import ModelConfig, from_hugging_face
from chalot.model.layers import KINDS, model_tensors
from chalot.quant.packing import stored_bytes
from chalot.quant.scheme import SCHEMES
from chalot.sources import as_path, hub_id, on_hub, resolve
from chalot.storing import DEFAULT_SCHEME, parse_schemes, planned_bytes, scheme_of
from chalot.table import pairs, rows, size
from chalot.text.byte_pairs import TABLES

USUAL_CONTEXT = 1000  # tokens of a short conversation
VECTOR = "f32"  # what vectors are stored as


@dataclass(frozen=True)
class TensorReport:
    """A tensor by chalot's name: as the source has it, and as it is, or would be, computed with."""

    name: str
    kind: str  # of KINDS, or "vector"
    shape: tuple[int, ...]
    source_type: str
    source_bytes: int
    scheme: str
    bytes: int
    activation: int | None = None  # bits, of a coded matrix
    error: float | None = None  # relative squared error against the source, where it is known
    shares: str | None = None  # the tensor whose extent it lies in, and whose bytes it has


@dataclass(frozen=True)
class KindReport:
    """All tensors of a kind."""

    kind: str
    tensors: int
    weights: int
    source_type: str
    source_bytes: int
    scheme: str
    bytes: int


@dataclass(frozen=True)
class Origin:
    """Where the description comes from. Bytes are of weights' files, or of the whole `.myai`."""

    form: str  # ".myai", "folder", "file" or "hub"
    bytes: int
    download_bytes: int | None = None  # of a hub id: weights and documents
    documents: tuple[str, ...] | None = None  # None: not known before a download
    tables: int = 0  # bytes of tokenizer.bpe
    document_bytes: int = 0  # of a checkpoint
    unused: tuple[str, ...] = ()  # tensors that the model does not need
    made_from: str | None = None  # of a .myai file: the source's name, its digest, the command
    digest: str | None = None
    command: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class Kernels:
    """Instruction sets, best first; the one that would be used here, and on how many threads."""

    known: tuple[str, ...]
    runs_here: tuple[str, ...]
    chosen: str
    threads: int


@dataclass(frozen=True)
class Description:
    """What a model is. `bytes` and `bits_per_weight` are of tensors as they are computed with."""

    source: str
    origin: Origin
    architecture: dict[str, Any]  # the fields of chalot.model.config.ModelConfig
    parameters: int  # by name; tensors that share an extent count each
    stored_parameters: int  # those count once
    bytes: int
    file_bytes: int  # of the .myai file, or of the one that a conversion would write
    bits_per_weight: float
    kinds: tuple[KindReport, ...]
    tensors: tuple[TensorReport, ...]
    kernels: Kernels
    memory_available: int | None
    memory_at: tuple[Memory, ...] = ()
    scheme: str | None = None  # by which what is no .myai file yet is judged
    fit: Fit | None = None  # of such a source: every scheme, and the best

    def memory(self, context: int, kv: str = CACHE, whole: bool = False) -> Memory:
        """Resident bytes of a process that has loaded the model and filled `context` tokens.

        `kv` is the type of cached keys and values, `whole` whether the file is locked in memory or
        not mapped (--mlock, --no-mmap). Raises ContextError beyond the model's context.
        """
        config = msgspec.convert(self.architecture, ModelConfig)
        stored = {
            t.name: Stored(SCHEMES[t.scheme], (t.activation or 8) // 8)
            for t in self.tensors
            if len(t.shape) == 2
        }
        embedding = next(t.bytes for t in self.tensors if t.name == "embedding")
        documents = self.origin.documents
        text = documents is None or "tokenizer.json" in documents
        return memory.estimate(
            config,
            stored,
            self.bytes,
            embedding,
            context,
            kv,
            text,
            self.origin.tables,
            self.file_bytes if whole else 0,
        )

    def fits(self, context: int) -> bool | None:
        """Whether that fits what is free now, with the tokenizer; None where nobody knows."""
        free = self.memory_available
        return None if free is None else self.memory(context).total_with_text <= free


def describe(
    source: str | Path,
    scheme: str | None = None,
    context: int | None = None,
    folder: Path | None = None,
) -> Description:
    """Describe a `.myai` file, a Hugging Face folder, another model's file, or a hub id.

    `scheme` is how a checkpoint is judged ("nl4", "ffn=nl4,attention=int8"; "keep" where weights
    are quantised already); a `.myai` file has its own. `memory_at` has 0, 1,000 and all positions,
    and `context` if it is given; `fit` has every scheme, for a file in `folder`
    (default: the current one). Raises FormatError, UnsupportedError, SchemeError, ContextError,
    HubError.
    """
    path, place = as_path(source), (context, folder)
    if path.is_file() and is_ready(path):
        if scheme is not None:
            raise SchemeError(f"{source}: is converted already; --scheme is for checkpoints")
        found = _of_myai(path)
    elif (named := hub_id(source)) is not None:
        try:
            remote = on_hub(source, hub.headers)
        except (HubOfflineError, HubBusyError):
            copy = hub.kept(named)  # downloaded earlier
            if copy is None:
                raise
            return describe(copy, scheme, context, folder)
        sizes = remote.weight_bytes, remote.download_bytes
        origin = Origin("hub", *sizes, document_bytes=remote.document_bytes)
        tensors = as_computed(remote.tensors, remote.document("config.json"), named)
        tensors = listed(tensors, named)
        found = _of_checkpoint(named, origin, tensors, remote.document, scheme, place)
    else:
        checkpoint = open_checkpoint(resolve(path))
        try:
            held = sum(info.nbytes for info in checkpoint.tensors.values())
            there = {n: d for n in DOCUMENTS if (d := checkpoint.document(n)) is not None}
            form, length = "folder" if path.is_dir() else "file", sum(map(len, there.values()))
            origin = Origin(form, held, documents=tuple(there), document_bytes=length)
            found = _of_checkpoint(
                str(source),
                origin,
                checkpoint.tensors,
                checkpoint.document,
                scheme,
                (context, folder),
            )
        finally:
            checkpoint.close()
    full = found.architecture["context"]
    wanted = {0, min(USUAL_CONTEXT, full), full} | (set() if context is None else {context})
    shown = tuple(found.memory(n) for n in sorted(wanted))
    return dataclasses.replace(found, memory_at=shown)


def _of_myai(path: Path) -> Description:
    file = MyaiFile(path)
    try:
        config = read_model_config(file)
        manifest, shared = file.manifest, file.aliases
        tensors = []
        for spec in model_tensors(config):
            e = manifest.tensors[spec.name]
            coded = SCHEMES[e.scheme].is_coded
            here, bits = (e.scheme, e.extent.bytes), e.activation if coded else None
            tensors.append(
                TensorReport(
                    spec.name,
                    spec.kind,
                    e.shape,
                    *here,
                    *here,
                    bits,
                    e.error,
                    shared.get(spec.name),
                )
            )
        origin = Origin(
            ".myai",
            file.size,
            documents=tuple(manifest.documents),
            tables=manifest.documents[TABLES].bytes if TABLES in manifest.documents else 0,
            unused=tuple(manifest.tensors.keys() - {t.name for t in tensors}),
            made_from=manifest.source.name,
            digest=manifest.source.digest,
            command=manifest.source.command,
            version=manifest.source.version,
        )
        return _description(str(path), origin, config, tensors, file.size)
    finally:
        file.close()


def _of_checkpoint(
    source: str,
    origin: Origin,
    found: Mapping[str, TensorInfo],
    document: Callable[[str], bytes | None],
    scheme: str | None,
    place: tuple[int | None, Path | None],
) -> Description:
    """A folder, a file or a hub id. Raises FormatError where tensors contradict config.json."""
    scheme = scheme or usual_of(found, DEFAULT_SCHEME)
    schemes = parse_schemes(scheme)
    raw = document("config.json")
    if raw is None:
        raise FormatError(f"{source}: config.json is missing; is this a model's folder?")
    parsed = parse_json(raw, f"{source}: config.json")
    if not isinstance(parsed, dict):
        raise FormatError(f"{source}: config.json: expected an object")
    config = from_hugging_face(parsed)
    if scheme == KEEP:
        schemes |= kept(found, config)
    tensors = []
    for spec in model_tensors(config):
        name = hugging_face(spec.name)
        info = found.get(name)
        if info is None or info.shape != spec.shape:
            has = "is missing" if info is None else f"has shape {info.shape}"
            raise FormatError(f"{source}: tensor {name} {has}; config.json asks for {spec.shape}")
        if info.dtype not in SCHEMES and not info.scheme:
            raise UnsupportedError(
                f"{source}: tensor {name} is {info.dtype}; chalot reads bf16, f16 and f32: "
                "use the model's original, not yet quantised checkpoint"
            )
        here = (spec.name, spec.kind, spec.shape, info.dtype, info.nbytes)
        if spec.kind == "vector":
            tensors.append(TensorReport(*here, VECTOR, spec.shape[0] * 4))
        else:
            s = scheme_of(schemes, spec)
            need = stored_bytes(s, spec.shape[0], spec.shape[1])
            tensors.append(TensorReport(*here, str(s), need, 8 if s.is_coded else None))
    needed = {hugging_face(t.name) for t in tensors}
    origin = dataclasses.replace(origin, unused=tuple(sorted(found.keys() - needed)))
    report = _description(source, origin, config, tensors, planned_bytes(config, schemes))
    is_remote = origin.download_bytes is not None
    judged = fit(
        config,
        found,
        context=place[0],
        folder=place[1],
        documents=origin.document_bytes,
        text=origin.documents is None or "tokenizer.json" in origin.documents,
        hub_id=source if is_remote else None,
        download_bytes=origin.download_bytes or 0,
    )
    return dataclasses.replace(report, scheme=scheme, fit=judged)


def _description(
    source: str, origin: Origin, config: ModelConfig, tensors: list[TensorReport], file_bytes: int
) -> Description:
    parameters = sum(prod(t.shape) for t in tensors)
    held = [t for t in tensors if t.shares is None]
    stored, total = sum(prod(t.shape) for t in held), sum(t.bytes for t in held)
    sets = instruction_sets()
    backend = open_backend()
    kernels = Kernels(
        tuple(name for name, _ in sets),
        tuple(name for name, runs in sets if runs),
        backend.name,
        backend.threads,
    )
    kinds = [_kind(kind, [t for t in tensors if t.kind == kind]) for kind in (*KINDS, "vector")]
    return Description(
        source,
        origin,
        {**msgspec.structs.asdict(config), **msgspec.to_builtins(config)},
        parameters,
        stored,
        total,
        file_bytes,
        total * 8 / stored,
        tuple(k for k in kinds if k.tensors),
        tuple(tensors),
        kernels,
        machine.memory_available(),
    )


def _kind(kind: str, tensors: list[TensorReport]) -> KindReport:
    return KindReport(
        kind,
        len(tensors),
        sum(prod(t.shape) for t in tensors),
        _names(t.source_type for t in tensors),
        sum(t.source_bytes for t in tensors if t.shares is None),
        _names(t.scheme for t in tensors),
        sum(t.bytes for t in tensors if t.shares is None),
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))


# ---- as text


def render(report: Description, verbose: bool = False) -> str:
    """The report as text; with `verbose` every tensor."""
    parts = [_facts(report), _kind_table(report), _memory_table(report)]
    if report.fit is not None:
        parts.append(render_fit(report.fit))
    if verbose:
        parts.insert(2, _tensor_table(report))
    return "\n\n".join(parts)


def _facts(report: Description) -> str:
    a, o, k = report.architecture, report.origin, report.kernels
    facts = [
        ("source", f"{report.source} ({o.form}, {size(o.bytes)})"),
        ("family", a["family"]),
        ("parameters", f"{report.parameters:,}{_shared(report)}"),
        ("layers", f"{a['layers']}, hidden {a['hidden']:,}, feed-forward {a['feed_forward']:,}"),
        ("heads", f"{a['heads']} of {a['head_dim']}, {a['kv_heads']} of keys and values"),
        ("vocabulary", f"{a['vocabulary']:,}{', tied' if a['tied'] else ''}"),
        ("context", f"{a['context']:,} tokens"),
        ("weights", f"{size(report.bytes)}, {report.bits_per_weight:.2f} bits each"),
    ]
    if o.form != ".myai":
        facts.append(("converted", f"about {size(report.file_bytes)} with these schemes"))
    if o.download_bytes is not None:
        facts.append(("download", size(o.download_bytes)))
    if o.made_from is not None:
        facts.append(("made from", f"{quoted(o.made_from)}, weights {(o.digest or '')[:16]}"))
        facts.append(("made by", f"chalot {o.version}: {quoted(o.command, 200)}"))
    if o.documents is not None:
        facts.append(("documents", ", ".join(o.documents) or "none: token ids only"))
    if o.unused:
        first = ", ".join(quoted(name) for name in o.unused[:3])
        more = f" and {len(o.unused) - 3} more" if len(o.unused) > 3 else ""
        facts.append(("not used", f"{first}{more}"))
    others = [name for name in k.runs_here if name != k.chosen]
    facts.append(("kernels", f"{k.chosen} on {k.threads} threads; also run: {', '.join(others)}"))
    return pairs(facts)


def _shared(report: Description) -> str:
    """What is stored, where tensors share extents."""
    if report.stored_parameters == report.parameters:
        return ""
    return f"; {report.stored_parameters:,} are stored, others are the same and share their bytes"


def _kind_table(report: Description) -> str:
    converted = report.origin.form == ".myai"
    head = ["kind", "tensors", "weights", "stored as", "bytes"]
    table = [head if converted else [*head, "becomes", "bytes"]]
    for k in report.kinds:
        row = [k.kind, str(k.tensors), f"{k.weights:,}", k.source_type, f"{k.source_bytes:,}"]
        table.append(row if converted else [*row, k.scheme, f"{k.bytes:,}"])
    return rows(table)


def _tensor_table(report: Description) -> str:
    table = [["tensor", "shape", "stored as", "scheme", "bytes", "activations", "error"]]
    for t in report.tensors:
        shape = " x ".join(str(n) for n in t.shape)
        bits = "-" if t.activation is None else str(t.activation)
        error = "-" if t.error is None else f"{t.error:.2g}"
        table.append([t.name, shape, t.source_type, t.scheme, f"{t.bytes:,}", bits, error])
    return rows(table)


def _memory_table(report: Description) -> str:
    head = ["memory at", "weights", "cache", "working set", "tokenizer", "in all", "fits here"]
    table, free = [head], report.memory_available
    for m in report.memory_at:
        fits = "unknown" if free is None else "yes" if m.total_with_text <= free else "no"
        parts = (m.weights - m.unread, m.cache, m.buffers + m.baseline, m.tokenizer)
        cells = [size(n) for n in (*parts, m.total_with_text)]
        table.append([f"{m.context:,} tokens", *cells, fits])
    known = "unknown" if free is None else f"{size(free)} are free"
    return (
        f"{rows(table)}\n{known}. Weights are mapped: other processes share them. Token ids alone "
        f"need no tokenizer. --mlock and --no-mmap take all of the file, {size(report.file_bytes)}."
    )
