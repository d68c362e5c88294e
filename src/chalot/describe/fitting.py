"""What a model would take in each scheme, before it is downloaded or converted, and which fits.

All of it follows from shapes. Running is chalot.describe.memory's estimate. Converting holds, at
its worst,

    baseline + max(a run of rows, a layer, the tokenizer twice)

A run is 4 million numbers as float32 and their copies. A layer lies in memory as the source stores
it, with the tensor that is read last as float32, for the calibration of coded schemes. The
tokenizer is opened from the source and from the file, to compare them. benchmarks/memory.py holds
this against what a process really takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from chalot import machine
from chalot.calibration_text import FEW
from chalot.checking import RUN
from chalot.convert.keeping import KEEP, in_codes, kept
from chalot.convert.storing import parse_schemes, planned_bytes, scheme_of
from chalot.describe import memory
from chalot.describe.memory import Stored
from chalot.errors import LimitError
from chalot.formats import hub
from chalot.formats.checkpoint import TensorInfo
from chalot.formats.hub.cache import cache_folder
from chalot.formats.names import hugging_face
from chalot.model.config import ModelConfig
from chalot.model.layers import layer_tensors, model_tensors
from chalot.quant.packing import stored_bytes
from chalot.quant.scheme import PANEL, SCHEMES
from chalot.table import rows, size

CONTEXT = 4096  # tokens to judge at, unless others are asked for or the model has fewer
# For --fit, best first; "keep" is of sources in codes. bf16 would take twice the memory and time of
# int8 to be nearer by a KL of 0.0007 (docs/performance.md); int4 is as long as nl4, and worse;
# below, models are trained for it.
CHOICES = (KEEP, "int8", "int6", "nl4")
WIDTHS = {"bf16": 2, "f16": 2}  # bytes of a number in a layer that waits for calibration; else 4
COPIES, DENSE_COPIES = 4.2, 3.0  # of a run of rows at once: read, folded, encoded, the next one
WITH_TABLES = 1.75  # of the documents' bytes: most is the tokenizer, whose tables go with it
CHECKED_ENTRY = 1600  # bytes of a token while two tokenizers are compared: 243 MB for 151,936


@dataclass(frozen=True)
class Option:
    """A model in one scheme. Bytes; `running` is at the context that was asked for."""

    scheme: str
    bits_per_weight: float
    file_bytes: int
    converting: int  # at its peak
    running: int  # with tokenizer
    fits_memory: bool | None  # both; None where the system does not say what is free
    fits_disk: bool


@dataclass(frozen=True)
class Fit:
    """Every scheme, and the one that is best here: None if none of CHOICES fits."""

    context: int
    memory_available: int | None
    disk_available: int
    download_bytes: int  # that are not here yet
    options: tuple[Option, ...]
    best: str | None


def fit(
    config: ModelConfig,
    source: Mapping[str, TensorInfo],
    *,
    context: int | None = None,
    text: bool = True,
    documents: int = 0,
    folder: Path | None = None,
    hub_id: str | None = None,
    download_bytes: int = 0,
) -> Fit:
    """Judge a model in all schemes.

    `source` are its tensors as they are stored now, `text` whether it has a tokenizer, `documents`
    the bytes of that and of other documents, `folder` where the file will be (default: the current
    one); a `hub_id` is downloaded first. Raises ContextError beyond the model's context.
    """
    at = min(CONTEXT, config.context) if context is None else context
    free, folder = machine.memory_available(), folder or Path()
    left = 0 if hub_id is None or hub.kept(hub_id) else download_bytes
    disk = machine.disk_free(folder.absolute())
    same_disk = left and _device(folder) == _device(cache_folder())
    room = disk - left if same_disk else disk
    download_fits = not left or machine.disk_free(cache_folder()) >= left
    options = []
    for name in ([KEEP] if in_codes(source) else []) + list(SCHEMES):
        made = _option(name, config, source, at, text)
        made["file_bytes"] += int(documents * WITH_TABLES)
        peak = max(made["converting"], made["running"])
        fits = None if free is None else peak <= free
        options.append(Option(name, **made, fits_memory=fits,
                              fits_disk=download_fits and made["file_bytes"] <= room))  # fmt: skip
    return Fit(at, free, disk, left, tuple(options), _best(options))


def _option(
    name: str, config: ModelConfig, source: Mapping[str, TensorInfo], context: int, text: bool
) -> dict[str, Any]:
    specs, schemes = model_tensors(config), parse_schemes(name)
    if name == KEEP:
        schemes |= kept(source, config)
    of = {t.name: scheme_of(schemes, t) for t in specs if t.kind != "vector"}
    sizes = {
        t.name: stored_bytes(of[t.name], *t.shape) if t.name in of else t.shape[0] * 4
        for t in specs
    }
    stored = {name: Stored(s, 1) for name, s in of.items()}
    total = sum(sizes.values())
    taken = memory.estimate(config, stored, total, sizes["embedding"], context, text=text)
    return {
        "bits_per_weight": total * 8 / sum(prod(t.shape) for t in specs),
        "file_bytes": planned_bytes(config, schemes),
        "converting": converting_bytes(config, source, any(s.is_coded for s in of.values()), text),
        "running": taken.total_with_text,
    }


def converting_bytes(
    config: ModelConfig, source: Mapping[str, TensorInfo], coded: bool, text: bool
) -> int:
    """Bytes resident at the worst moment of a conversion, `coded` if any scheme is."""
    matrices = [t.shape for t in model_tensors(config) if t.kind != "vector"]
    numbers = max(RUN, PANEL * max(shape[1] for shape in matrices))
    numbers = min(numbers, max(map(prod, matrices)))
    run = numbers * 4 * (COPIES if coded else DENSE_COPIES)
    layer = 0
    if coded:
        most = max(range(config.layers), key=lambda i: config.experts_of(i) is not None)
        specs = [t for t in layer_tensors(config, most) if t.kind != "vector"]
        types = {source[n].dtype for t in specs if (n := hugging_face(t.name)) in source}
        width = WIDTHS.get(types.pop(), 4) if len(types) == 1 else 4
        counts = [prod(t.shape) for t in specs]
        packed = accumulate(counts)
        layer = max(width * p + 4 * n for n, p in zip(counts, packed, strict=True))
        layer += FEW * 4 * (3 * config.feed_forward + 6 * config.hidden)  # its slots
    tokenizers = memory.TOKENIZER + CHECKED_ENTRY * config.vocabulary if text else 0
    return int(memory.baseline() + max(run, layer, tokenizers))


def _best(options: list[Option]) -> str | None:
    able = {o.scheme for o in options if o.fits_memory is not False and o.fits_disk}
    return next((name for name in CHOICES if name in able), None)


def _device(path: Path) -> int:
    """The disk that a path, or its nearest parent that exists, lies on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path.stat().st_dev


def chosen(found: Fit, source: str) -> str:
    """The best scheme. Raises LimitError where none of CHOICES fits."""
    if found.best is not None:
        return found.best
    least = min((o for o in found.options if o.scheme in CHOICES), key=lambda o: o.file_bytes)
    others = [o.scheme for o in found.options if o.fits_memory and o.fits_disk]
    helps = f"--scheme {others[0]} would fit" if others else "no scheme does"
    free = "unknown" if found.memory_available is None else size(found.memory_available)
    raise LimitError(
        f"{source}: does not fit in {least.scheme}: converting takes {size(least.converting)} of "
        f"memory, running {size(least.running)} at {found.context:,} tokens, and {free} are free; "
        f"the file takes {size(least.file_bytes)}, and the disk has {size(found.disk_available)}. "
        f"Choose a smaller --context or model; {helps}"
    )


def render(found: Fit) -> str:
    """The schemes as a table, and the one that --fit would choose."""
    table = [["scheme", "bits each", "file", "to convert", "to run", "fits memory", "fits disk"]]
    words = {True: "yes", False: "no", None: "unknown"}
    for o in sorted(found.options, key=lambda o: -o.bits_per_weight):
        name = f"{o.scheme} *" if o.scheme == found.best else o.scheme
        cells = [f"{o.bits_per_weight:.2f}", *map(size, (o.file_bytes, o.converting, o.running))]
        table.append([name, *cells, words[o.fits_memory], words[o.fits_disk]])
    free = "unknown" if found.memory_available is None else size(found.memory_available)
    there = {o.scheme for o in found.options}
    choices = ", ".join(c for c in CHOICES if c in there)
    best = "none of them fits" if found.best is None else f"{found.best} (*)"
    download = f"; {size(found.download_bytes)} to download" if found.download_bytes else ""
    return (
        f"{rows(table)}\nTo run with {found.context:,} tokens in the cache. Free here: {free} of "
        f"memory, {size(found.disk_available)} of disk{download}.\n"
        f"convert --fit chooses the best of {choices} that fits: {best}."
    )
