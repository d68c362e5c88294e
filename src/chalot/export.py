"""The verb `convert` with a target: any checkpoint as a file or folder that others read.

A target is a row of `TARGETS`: a function that writes an opened checkpoint to a place, whole or not
at all, a run of rows at a time, and reports what that cost. `.myai` is one of them.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chalot.convert import TERNARY, ConvertReport, Progress, schemes_for, write_myai
from chalot.errors import SchemeError
from chalot.export_gguf import write_gguf
from chalot.export_npz import write_npz
from chalot.formats.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Options:
    """What a target may want to know. A target that has no use for a setting ignores it."""

    source: str  # as the user named it
    type: str | None = None  # of --type: the numbers or blocks that the target stores
    scheme: str | None = None  # None: as is usual for such a source
    command: str = ""  # that makes this, for the target's own record
    threads: int | None = None
    progress: Progress = lambda *_: None
    bits: str = "4"  # of npz
    tokenizer: bool = True  # of gguf: whether the file has one
    ternary: str = TERNARY[0]  # of myai: where the scale of ternary weights comes from


Target = Callable[[Checkpoint, Path, Options], ConvertReport]


def to_myai(checkpoint: Checkpoint, out: Path, options: Options) -> ConvertReport:
    """A `.myai` file with the schemes of `options.scheme`."""
    from chalot.sources import called

    schemes, name = schemes_for(options.scheme, checkpoint), called(options.source)
    return write_myai(
        checkpoint, out, schemes, name, options.command, options.threads, options.progress,
        ternary=options.ternary,
    )  # fmt: skip


def to_npz(checkpoint: Checkpoint, out: Path, options: Options) -> ConvertReport:
    """An .npz and its manifest in the folder `out`."""
    return write_npz(
        checkpoint, out, options.source, options.bits, options.command, options.progress
    )


def to_gguf(checkpoint: Checkpoint, out: Path, options: Options) -> ConvertReport:
    """A GGUF file of blocks of `options.type`."""
    from chalot.sources import called

    name, threads = called(options.source), options.threads
    return write_gguf(
        checkpoint, out, options.type, name, options.tokenizer, threads, options.progress
    )


TARGETS: dict[str, Target] = {"myai": to_myai, "gguf": to_gguf, "npz": to_npz}


def export(
    source: str | Path,
    out: str | Path,
    to: str = "myai",
    type: str | None = None,
    *,
    scheme: str | None = None,
    bits: str = "4",
    tokenizer: bool = True,
    ternary: str = TERNARY[0],
    threads: int | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> ConvertReport:
    """Write `source`, a path or a hub id, as `out` in the format `to` (one of TARGETS).

    The file or folder appears whole or not at all. Raises SchemeError for a target or type that is
    not known, and any other ChalotError for what is wrong with source or place.
    """
    from chalot.sources import resolve

    if to not in TARGETS:
        raise SchemeError(f"--to {to}: not known; choose one of: {', '.join(TARGETS)}")
    said = command or shlex.join(["chalot", "convert", str(source), "--to", to, "-o", str(out)])
    watch = progress or (lambda *_: None)
    if to != "myai" and ternary != TERNARY[0]:
        raise SchemeError(f"--ternary {ternary}: is for .myai files; leave out --to {to}")
    options = Options(str(source), type, scheme, said, threads, watch, bits, tokenizer, ternary)
    checkpoint = open_checkpoint(resolve(source, progress))
    try:
        return TARGETS[to](checkpoint, Path(out), options)
    finally:
        checkpoint.close()
