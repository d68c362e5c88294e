"""What is said of a model: records that `describe` fills, and their text."""

from dataclasses import dataclass
from typing import Any

import msgspec

from chalot.describe import memory
from chalot.describe.fitting import Fit
from chalot.describe.fitting import render as render_fit
from chalot.describe.memory import Memory, Stored
from chalot.describe.region_bytes import RegionReport, region_table
from chalot.formats.files import quoted
from chalot.kernels.program import CACHE
from chalot.mixture import MixtureReport
from chalot.model.config import ModelConfig
from chalot.quant.scheme import SCHEMES
from chalot.table import pairs, rows, size
from chalot.typed import COUNT, check_types


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
    other: str = ""  # of a .myai file: the file beside it that holds so many bytes of it
    elsewhere: int = 0


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
    file_bytes: int  # of the .myai file with what is elsewhere, or of what would be written
    bits_per_weight: float
    kinds: tuple[KindReport, ...]
    tensors: tuple[TensorReport, ...]
    kernels: Kernels
    memory_available: int | None
    memory_at: tuple[Memory, ...] = ()
    scheme: str | None = None  # by which what is no .myai file yet is judged
    regions: tuple[RegionReport, ...] = ()
    fit: Fit | None = None  # of such a source: every scheme, and the best
    mixture: MixtureReport | None = None

    def memory(self, context: int, kv: str = CACHE, whole: bool = False) -> Memory:
        """Resident bytes of a process that has loaded the model and filled `context` tokens.

        `kv` is the type of cached keys and values, `whole` whether the file is locked in memory or
        not mapped (--mlock, --no-mmap). Raises ContextError beyond the model's context.
        """
        check_types(context=(context, COUNT))
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
            self.mixture.expert_bytes if self.mixture and self.mixture.distinct > 1 else 0,
        )

    def fits(self, context: int) -> bool | None:
        """Whether that fits what is free now, with the tokenizer; None where nobody knows."""
        free = self.memory_available
        return None if free is None else self.memory(context).total_with_text <= free


# ---- as text


def render(report: Description, verbose: bool = False) -> str:
    """The report as text; with `verbose` every tensor."""
    parts = [_facts(report), _kind_table(report)]
    parts += [region_table(report.regions), _memory_table(report)]
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
        *mixture_facts(report.mixture),
        ("heads", f"{a['heads']} of {a['head_dim']}, {a['kv_heads']} of keys and values"),
        ("vocabulary", f"{a['vocabulary']:,}{', tied' if a['tied'] else ''}"),
        ("context", f"{a['context']:,} tokens"),
        ("weights", f"{size(report.bytes)}, {report.bits_per_weight:.2f} bits each"),
    ]
    if o.elsewhere:
        facts.append(("elsewhere", f"{size(o.elsewhere)}, in {quoted(o.other)} beside it"))
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


def mixture_facts(found: MixtureReport | None) -> list[tuple[str, str]]:
    """Lines of a mixture; none of a dense model."""
    if found is None:
        return []
    shared = f", and a shared one of {found.shared_width:,}" if found.shared_width else ""
    return [
        (
            "experts",
            f"{found.experts} of width {found.width:,} in {found.layers} layers, "
            f"a token takes {found.top}{shared}"
            + ("; all are one" if found.distinct == 1 < found.experts else ""),
        ),
        (
            "a token",
            f"uses {found.active_parameters:,} parameters, reads {size(found.token_bytes)}; "
            f"all experts are {size(found.expert_bytes)}",
        ),
    ]


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
