"""The verb `convert` with a target: any checkpoint as a file or folder that others read.

A target is a row of `TARGETS`: a function that writes an opened checkpoint to a place, whole or not
at all, a run of rows at a time, and reports what that cost. `.myai` is one of them.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from chalot.convert import ConvertReport, check_place, sharing, with_experts, write_myai
from chalot.convert.conversion import Progress
from chalot.convert.refining import Refine
from chalot.convert.storing import TERNARY, Storing, schemes_for
from chalot.errors import SchemeError
from chalot.export import gguf, safetensors
from chalot.export.npz import write_npz
from chalot.formats.checkpoint import Checkpoint, open_checkpoint
from chalot.typed import MAY_COUNT, MAY_PATH, MAY_TEXT, PATH, check_types


@dataclass(frozen=True)
class Options:
    """What a target may want to know."""

    source: str  # as the user named it
    type: str | None = None  # of --type: the numbers or blocks that the target stores
    scheme: str | None = None  # None: as is usual for such a source
    plan: Path | None = None  # of myai: a file of `chalot plan`
    command: str = ""  # that makes this, for the target's own record
    threads: int | None = None
    progress: Progress = lambda *_: None
    bits: str = "4"  # of npz
    tokenizer: bool = True  # of gguf: whether the file has one
    ternary: str = TERNARY[0]  # of myai: where the scale of ternary weights comes from
    refine: Refine | None = None  # of myai
    regions: str | None = None  # of myai: its layers by name
    share: Path | None = None  # of myai: a file beside it, whose bytes are not written again


def to_myai(checkpoint: Checkpoint, out: Path, options: Options) -> ConvertReport:
    """A `.myai` file with the schemes of `options.scheme`."""
    from chalot.sources import called

    notes: list[str] = []
    schemes = schemes_for(options.scheme, checkpoint, options.plan, notes.append, options.regions)
    how = Storing(
        schemes, None, options.ternary, options.refine, notes, options.share, options.regions
    )
    name, threads = called(options.source), options.threads
    return write_myai(checkpoint, out, how, name, options.command, threads, options.progress)


def to_npz(checkpoint: Checkpoint, out: Path, options: Options) -> ConvertReport:
    """An .npz and its manifest in the folder `out`."""
    return write_npz(
        checkpoint, out, options.source, options.bits, options.command, options.progress
    )


def to_gguf(checkpoint: Checkpoint, out: Path, options: Options) -> ConvertReport:
    """A GGUF file of blocks of `options.type`."""
    from chalot.sources import called

    name, threads = called(options.source), options.threads
    return gguf.write_gguf(
        checkpoint, out, options.type, name, options.tokenizer, threads, options.progress
    )


def to_safetensors(checkpoint: Checkpoint, out: Path, options: Options) -> ConvertReport:
    """A Hugging Face folder of numbers of `options.type`."""
    return safetensors.write_safetensors(checkpoint, out, options.type, options.progress)


class Target(NamedTuple):
    """A format that is written. `settings` are the options of `convert` that it has a use for."""

    write: Callable[[Checkpoint, Path, Options], ConvertReport]
    ending: str  # of its files, and of what it makes
    settings: tuple[str, ...]
    folder: bool = False  # whether OUT is a folder
    type: str = ""  # where none is asked for


TARGETS = {
    "myai": Target(
        to_myai,
        ".myai",
        (
            *("scheme", "bits", "plan", "ternary", "fit", "dry_run", "refine", "regions"),
            *("experts", "share"),
        ),
    ),
    "gguf": Target(to_gguf, ".gguf", ("type", "tokenizer"), type=gguf.DEFAULT_TYPE),
    "npz": Target(to_npz, ".npz", ("bits", "validate", "tolerance"), folder=True),
    "safetensors": Target(
        to_safetensors,
        ".safetensors",
        ("type", "experts"),
        folder=True,
        type=safetensors.DEFAULT_TYPE,
    ),
}


def target_of(to: str | None, out: str | Path | None) -> str:
    """The target's name: as asked for, else by the ending of `out`, else myai.

    Raises SchemeError for a target that is not known, and where the two contradict each other.
    """
    by_ending = {target.ending: name for name, target in TARGETS.items()}
    ending = Path(out or "").suffix.lower()
    found = by_ending.get(ending)
    if to is not None and to not in TARGETS:
        raise SchemeError(f"--to {to}: not known; choose one of: {', '.join(TARGETS)}")
    name = to or found or "myai"
    if found is not None and found != name:
        raise SchemeError(
            f"-o {out}: is the name of a {ending} file, --to {name} writes none; "
            f"choose --to {found}, or another name"
        )
    if found is not None and TARGETS[name].folder:
        raise SchemeError(
            f"-o {out}: --to {name} writes a folder; leave out {ending}, or name another folder"
        )
    return name


def refuse_useless(to: str, given: Callable[[str], bool]) -> None:
    """Raise SchemeError for a setting that was `given`, and that the target has no use for."""
    known = {setting for target in TARGETS.values() for setting in target.settings}
    for setting in sorted(known - {*TARGETS[to].settings}):
        if given(setting):
            for_ = [name for name, target in TARGETS.items() if setting in target.settings]
            name = OPTIONS.get(setting, f"--{setting.replace('_', '-')}")
            raise SchemeError(
                f"{name}: --to {to} has no use for it; it is of {' and '.join(for_)}: leave it out"
            )


OPTIONS = {"tokenizer": "--no-tokenizer", "validate": "--no-validate"}  # called otherwise


def export(
    source: str | Path,
    out: str | Path,
    to: str | None = None,
    type: str | None = None,
    *,
    scheme: str | None = None,
    plan: str | Path | None = None,
    bits: str | None = None,
    tokenizer: bool = True,
    ternary: str = TERNARY[0],
    threads: int | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    refine: Refine | None = None,
    experts: int | None = None,
    regions: str | None = None,
    share: str | Path | None = None,
) -> ConvertReport:
    """Write `source`, a path or a hub id, as `out` in the format `to` (one of TARGETS).

    Without `to`, the ending of `out` says it. `type` is of gguf and safetensors, `scheme` of myai,
    `bits` of npz ("4"), and `tokenizer` of gguf; of a mixture so many `experts` of each layer stay
    (chalot.convert.pruning). The file or folder appears whole or not at all.
    Raises SchemeError for a target, type or setting that is not known or has no use, and any other
    ChalotError for what is wrong with source or place.
    """
    from chalot.sources import resolve

    check_types(
        source=(source, PATH),
        out=(out, PATH),
        to=(to, MAY_TEXT),
        type=(type, MAY_TEXT),
        scheme=(scheme, MAY_TEXT),
        plan=(plan, MAY_PATH),
        bits=(bits, MAY_TEXT),
        threads=(threads, MAY_COUNT),
        experts=(experts, MAY_COUNT),
        share=(share, MAY_PATH),
    )
    to = target_of(to, out)
    given: dict[str, Any] = {"type": type, "scheme": scheme, "plan": plan, "bits": bits}
    given |= {"tokenizer": not tokenizer, "ternary": ternary != TERNARY[0]}
    given |= {"refine": refine is not None, "regions": regions, "experts": experts is not None}
    given |= {"share": share is not None}
    refuse_useless(to, lambda setting: bool(given.get(setting)))
    options = Options(
        str(source),
        type,
        scheme,
        None if plan is None else Path(plan).expanduser(),
        command or shlex.join(["chalot", "convert", str(source), "--to", to, "-o", str(out)]),
        threads,
        progress or (lambda *_: None),
        bits or "4",
        tokenizer,
        ternary,
        refine,
        regions,
        None if share is None else Path(share).expanduser(),
    )
    with sharing(options.share, Path(out)):  # before anything is downloaded
        pass
    found = resolve(source, progress)
    check_place(Path(out), found)
    checkpoint = open_checkpoint(found)
    try:
        some = with_experts(checkpoint, experts, threads, plan is not None)
        return TARGETS[to].write(some, Path(out), options)
    finally:
        checkpoint.close()
