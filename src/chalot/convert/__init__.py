"""The verb `convert`: a checkpoint becomes one `.myai` file."""

import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from chalot import __version__, machine
from chalot.calibration_text import few_ids
from chalot.checking import read_config
from chalot.convert.conversion import Conversion, KindReport, Progress
from chalot.convert.keeping import coarse_note, notes
from chalot.convert.refining import Refine
from chalot.convert.storing import (
    DEFAULT_SCHEME,
    DOCUMENTS,
    TERNARY,
    Storing,
    check_ternary,
    making,
    parse_schemes,
    planned_bytes,
    schemes_for,
    with_regions,
)
from chalot.errors import LimitError, OutputError, SchemeError, out_of_memory
from chalot.formats.checkpoint import Checkpoint, open_checkpoint
from chalot.formats.files import check_plain_name, quoted
from chalot.formats.myai import MyaiFile
from chalot.formats.myai.manifest import Source
from chalot.formats.myai.writer import MyaiWriter
from chalot.formats.new_file import partial_of
from chalot.kernels.backend import open_backend
from chalot.model.layers import KINDS
from chalot.typed import MAY_COUNT, MAY_PATH, MAY_TEXT, PATH, check_types


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
    experts: int | None = None,
    regions: str | None = None,
    share: str | Path | None = None,
) -> ConvertReport:
    """Convert a Hugging Face folder, a hub id or a model's file to `out`, a `.myai` file.

    `scheme` is a name ("nl4", "int8", "bf16", "f16", "f32") or "KIND=SCHEME,..." with the kinds
    embedding, head, attention and ffn; or "keep", by which weights that are quantised already take
    the scheme that loses least of them. None is "keep" for those, else "nl4". `command` and `name`
    are what the file says of its making and of its source. `plan` is a file of `chalot plan`, whose
    tensors go by it and not by `scheme`. `balance` folds channels of a dense file as another scheme
    would have it. `ternary` is where the scale of ternary weights comes from: "least-error", or
    BitNet's "absmean" of a matrix. `refine` finds better codes at the same bytes. `regions` names
    the layers ("shallow=0-5,deep=6-17,fact=18-23"). Of a mixture's `experts` so many of each layer
    stay, those that chalot's text takes most. What `share` holds already, another `.myai` file in
    the folder of `out`, is not written again, but read there (docs/format.md). Tensors of a
    `.myai` source whose scheme stays are copied as they are. Peak memory is that of a layer and its
    largest tensor (chalot.describe.fitting). The file appears whole or not at all; what an
    interrupted call finished stays beside it, and the same call goes on from there
    (docs/reliability.md).
    Raises a ChalotError for anything wrong with source or target.
    """
    from chalot.sources import called, resolve

    check_types(
        source=(source, PATH),
        out=(out, PATH),
        scheme=(scheme, MAY_TEXT),
        threads=(threads, MAY_COUNT),
        plan=(plan, MAY_PATH),
        experts=(experts, MAY_COUNT),
        share=(share, MAY_PATH),
        refine=(refine, ("a chalot.convert.refining.Refine or None", (Refine, type(None)))),
    )
    parse_schemes(scheme or DEFAULT_SCHEME)  # before anything is downloaded
    other = None if share is None else Path(share).expanduser()
    with sharing(other, Path(out)):
        pass
    asked = [] if scheme is None else ["--scheme", scheme]
    asked += [] if plan is None else ["--plan", str(plan)]
    asked += [] if experts is None else ["--experts", str(experts)]
    said = command or shlex.join(["chalot", "convert", str(source), *asked])
    name = name or called(source)
    found = resolve(source, progress)
    check_place(Path(out), found)
    checkpoint = open_checkpoint(found)
    try:
        some = with_experts(checkpoint, experts, threads, plan is not None)
        notes: list[str] = []
        schemes = schemes_for(
            scheme, some, None if plan is None else Path(plan), notes.append, regions
        )
        balanced = parse_schemes(balance) if balance else None
        how = Storing(schemes, balanced, ternary, refine, notes, other, regions)
        watch = progress or (lambda *_: None)
        return write_myai(some, Path(out), how, name, said, threads, watch)
    finally:
        checkpoint.close()


def with_experts(
    checkpoint: Checkpoint, experts: int | None, threads: int | None, planned: bool
) -> Checkpoint:
    """The checkpoint, with so many of each layer's experts if that is asked for.

    Raises SchemeError for a number that cannot be, and beside a plan.
    """
    if experts is None:
        return checkpoint
    if planned:
        raise SchemeError(f"--experts {experts}: a plan names all experts; leave one of them out")
    from chalot.convert.pruning import pruned

    config = read_config(checkpoint)
    ids = few_ids(checkpoint, config)
    return pruned(checkpoint, experts, open_backend(threads=threads), ids)


def write_myai(
    checkpoint: Checkpoint,
    out: Path,
    how: Storing,
    name: str,
    command: str,
    threads: int | None,
    progress: Progress,
) -> ConvertReport:
    """An opened checkpoint as a `.myai` file. `name` and `command` go into its manifest."""
    schemes, refine = how.schemes, how.refine
    work = Conversion(checkpoint, how, open_backend(threads=threads), progress)
    work.config = with_regions(work.config, how.regions, checkpoint)
    check_ternary(how.ternary, work.schemes, refine is not None)
    if work.config.tied and schemes["head"] != schemes["embedding"]:
        raise SchemeError(
            f"head={schemes['head']}, embedding={schemes['embedding']}: this model's "
            "head is its embedding; give both one scheme"
        )
    documents = sum(len(checkpoint.document(n) or b"") for n in DOCUMENTS)
    if how.share is None:  # else nobody knows yet how much of it the other file has
        check_space(out, planned_bytes(work.config, schemes, work.same) + documents)
    said = command if refine is None else f"{command}  # {refine}"
    with (
        sharing(how.share, out) as other,
        MyaiWriter(out, making(how, checkpoint, work.config, other), other) as writer,
        memory_for(out),
    ):
        work.progress("", 0, work.total)  # the source is good, and there is a place for it
        work.write(writer)
        writer.finish(
            msgspec.to_builtins(work.config),
            Source(name, work.digest.hexdigest(), said, __version__),
            lambda partial: check_text(checkpoint, partial),
        )
        kinds = tuple(work.kinds(writer))
    stored = sum(k.bytes for k in kinds)
    held = work.total - sum(int(np.prod(s.shape)) for s in work.specs if s.name in work.shared)
    others = {n: s for n, s in work.schemes.items() if n not in work.taken}
    becomes = {n: None if work.is_as_it_was(n) else str(s) for n, s in others.items()}
    noted = [*writer.notes(), *notes(checkpoint.path, checkpoint.tensors, becomes), *how.notes]
    if any(schemes[kind].is_coarse for kind in KINDS):  # and no plan's choice
        noted += coarse_note(work.schemes, work.errors)
    if refine is not None:
        noted.append(f"refined: {refine}")
    return ConvertReport(
        str(out), out.stat().st_size, work.total, stored * 8 / held, kinds, tuple(noted)
    )


@contextmanager
def sharing(other: Path | None, out: Path) -> Iterator[MyaiFile | None]:
    """The file whose bytes are not written again, opened. Raises FormatError or OutputError."""
    if other is None:
        yield None
        return
    here = Path(os.path.realpath(out))
    if os.path.realpath(other) == str(here) or other.absolute().parent.resolve() != here.parent:
        raise OutputError(
            f"--share {other}: expected another file in {here.parent}, where {out.name} will lie; "
            "the two stay together"
        )
    check_plain_name(other.name, f"--share {quoted(str(other))}")
    file = MyaiFile(other, follow=False)
    try:
        yield file
    finally:
        file.close()


def check_place(out: Path, source: Path) -> None:
    """Raise OutputError where what is to be written is the source itself."""
    same = False
    with suppress(OSError, ValueError):  # it is refused when it is to be written
        same = out.samefile(source)
    if same:
        raise OutputError(f"{out}: is the source itself; choose another name")


@contextmanager
def memory_for(out: Path) -> Iterator[None]:
    """Raise LimitError where memory does not suffice."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        if not out_of_memory(error):
            raise
        raise LimitError(
            f"{out}: memory does not suffice to convert it; raise the limits that "
            "`ulimit -v` and `ulimit -u` show, or end other programs"
        ) from None


def check_space(out: Path, need: int) -> None:
    """Raise LimitError if the disk that will hold `out` has fewer than `need` bytes free.

    What an interrupted conversion left there counts as free: it is gone on with, or written over.
    """
    free = machine.disk_free(out.absolute().parent)
    with suppress(OSError, ValueError):
        left = partial_of(Path(os.path.realpath(out))).stat()
        free += left.st_blocks * 512 if stat.S_ISREG(left.st_mode) else 0
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
