"""What `chalot calibrate` found of a model, in a file beside it: MODEL.myai.calibrated.

    magic (8) | version, JSON's bytes (u32 each) | sha256 of all behind it (32) | zeros to 64
    | JSON | zeros to a multiple of 64 | the short head as it lies in a .myai file

It is bound to its model by the digest of that file's manifest. Speeds in it are of the machine that
it was made on, and decide only whether drafting is on.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, one_line
from chalot.formats.documents import parse_json
from chalot.formats.files import quoted
from chalot.formats.new_file import NewFile
from chalot.model.config import ModelConfig
from chalot.quant.packing import ALIGNMENT, Layout, Matrix, aligned, stored_bytes
from chalot.quant.scheme import SCHEMES

MAGIC, VERSION = b"chalotCA", 1
FRONT = struct.Struct("<8s2I32s")
SUFFIX = ".calibrated"
MOST_JSON = 64 << 20  # bytes
LONGEST_DRAFT = 16
MOST_MARGIN = 100.0  # of logits


class Depth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Behind so many layers: shares of tokens whose best is the one of full depth."""

    layers: int
    agreement: float
    short_agreement: float  # with the short head


class Drafting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The best way to draft with the model's first layers. `gain` is expected of speed."""

    layers: int
    tokens: int
    short: bool  # whether with the short head
    kept: float  # share of drafted tokens, of those not behind a wrong one
    gain: float
    on: bool


class Exit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Leaving behind so many layers, by the least margin at which nearly all agree."""

    layers: int
    margin: float
    leave: float  # share of tokens
    agree: float  # of those that leave
    saves: float  # expected share of a pass's time, less what testing all costs


class Supervisor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear probe of the shallow layers' state behind a prompt: will leaving early agree?"""

    auroc: float  # on prompts that took no part, as are the next
    length_auroc: float  # of the prompt's length
    majority: float  # share of the commoner answer; its AUROC is 0.5
    error: float  # standard error of `auroc`
    prompts: int
    on: bool
    weights: tuple[float, ...]
    bias: float
    factor: float = 0.5  # of the margin, for a simple prompt


class ShortHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows of the head for the most frequent tokens, ascending."""

    scheme: str
    tokens: tuple[int, ...]
    planes: int  # of its activations
    coverage: float  # share of the text's tokens


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of it. `text` and `machine` are for people."""

    model: str  # digest of the .myai file's manifest
    text: str
    machine: str
    tokens: int
    seconds: dict[str, float]  # of a pass over 1, 2, ... tokens; of drafts; for people
    depths: tuple[Depth, ...]
    short: ShortHead
    draft: Drafting
    exits: tuple[Exit, ...]
    supervisor: Supervisor | None = None


def is_simple(found: Supervisor, state: NDArray[np.float32]) -> bool:
    """Whether a prompt is simple; the sum is rounded once, so that every machine says the same."""
    products = [w * float(s) for w, s in zip(found.weights, state, strict=True)]
    return math.fsum([*products, found.bias]) > 0


def beside(model: Path) -> Path:
    """Where a model's calibration is."""
    return model.with_name(model.name + SUFFIX)


@contextmanager
def new_calibration(path: Path) -> Iterator[Callable[[Calibration, Matrix], None]]:
    """What writes a calibration and its short head, whole or not at all; its place is checked now.

    Raises OutputError.
    """
    with NewFile(path, MAGIC, SUFFIX) as file:

        def write(found: Calibration, head: Matrix) -> None:
            raw = msgspec.json.encode(found)
            body = raw + b"\0" * (-len(raw) % ALIGNMENT) + head.data.tobytes()
            front = FRONT.pack(MAGIC, VERSION, len(raw), hashlib.sha256(body).digest())
            file.write(front.ljust(ALIGNMENT, b"\0") + body)
            file.commit()

        yield write


def read(path: Path, config: ModelConfig, digest: str) -> tuple[Calibration, Matrix] | None:
    """A model's calibration, if it has one. Raises FormatError for damage, or another model's."""
    if not path.exists():
        return None
    remedy = "make it again with `chalot calibrate`, or remove it"
    largest = MOST_JSON + stored_bytes(SCHEMES["f32"], config.vocabulary, config.hidden)
    try:
        if not path.is_file():  # a named pipe would wait, a device never end
            raise FormatError(f"{path}: is no calibration; {remedy}")
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) < ALIGNMENT or not data.startswith(MAGIC):
        raise FormatError(f"{path}: is no calibration; {remedy}")
    _, version, size, expected = FRONT.unpack_from(data)
    body = data[ALIGNMENT:]
    if version != VERSION:
        raise FormatError(f"{path}: version {version}; this chalot reads {VERSION}; {remedy}")
    if len(data) > largest or hashlib.sha256(body).digest() != expected or size > len(body):
        raise FormatError(f"{path}: damaged (wrong checksum); {remedy}")
    try:
        found = msgspec.convert(parse_json(body[:size], str(path)), Calibration)
    except msgspec.ValidationError as error:
        raise FormatError(f"{path}: {one_line(error)}; {remedy}") from None
    if found.model != digest:
        raise FormatError(
            f"{path}: was made for another file ({quoted(found.model[:16])}...) than the one that "
            f"it lies beside ({digest[:16]}...); {remedy}"
        )
    wrong = next(problems(found, config), None)
    if wrong:
        raise FormatError(f"{path}: {wrong}; {remedy}")
    scheme, shape = SCHEMES[found.short.scheme], (len(found.short.tokens), config.hidden)
    held = body[size + -size % ALIGNMENT :]
    if len(held) != stored_bytes(scheme, *shape):
        raise FormatError(
            f"{path}: a short head of {len(held)} bytes, expected {stored_bytes(scheme, *shape)}; "
            f"{remedy}"
        )
    head = Matrix(scheme, shape, aligned(len(held)))
    head.data[:] = np.frombuffer(held, np.uint8)
    if not finite_scales(head):
        raise FormatError(f"{path}: the short head has scales that are NaN or Inf; {remedy}")
    return found, head


def finite_scales(matrix: Matrix) -> bool:
    """Whether all scales of a coded matrix are finite."""
    if not matrix.scheme.is_coded:
        return True
    factors, *of_rows = Layout(matrix.scheme, *matrix.shape).parts[1:]
    scales = [matrix.data[factors].view("<f2"), *(matrix.data[p].view("<f4") for p in of_rows)]
    return all(np.isfinite(s).all() for s in scales)


def problems(found: Calibration, config: ModelConfig) -> Iterator[str]:
    """What does not fit the model, or itself."""
    tokens, layers = found.short.tokens, range(1, config.layers)
    if found.short.scheme not in SCHEMES or found.short.planes not in (0, 1, 2):
        yield f"short head of scheme {quoted(found.short.scheme)}, {found.short.planes} planes"
    elif bool(found.short.planes) < SCHEMES[found.short.scheme].is_coded:
        yield "short head in codes, without activations in codes"
    if not 2 <= len(tokens) <= config.vocabulary or any(
        a >= b for a, b in zip((-1, *tokens), (*tokens, config.vocabulary), strict=True)
    ):
        yield f"tokens of the short head: expected 2 or more, ascending, below {config.vocabulary}"
    draft = found.draft
    if not 0 <= draft.kept <= 1:
        yield f"drafts of which {draft.kept} are kept; expected 0 to 1"
    if draft.on and (draft.layers not in layers or not 1 <= draft.tokens <= LONGEST_DRAFT):
        yield f"drafts of {draft.tokens} tokens by {draft.layers} layers of {config.layers}"
    ends = [e.layers for e in found.exits]
    if ends != sorted(set(ends)) or any(e not in layers for e in ends):
        yield f"exits behind layers {ends}, of {config.layers}"
    if any(not 0 <= e.margin <= MOST_MARGIN for e in found.exits):
        yield f"margins of exits: expected 0 to {MOST_MARGIN:g}"
    s = found.supervisor
    if s is not None:
        numbers = (*s.weights, s.bias)
        if len(s.weights) != config.hidden or not all(map(math.isfinite, numbers)):
            yield f"a supervisor of {len(s.weights)} numbers; expected {config.hidden}, finite"
        if not 0 < s.factor <= 1:
            yield f"a supervisor's factor of {s.factor}; expected above 0, up to 1"
