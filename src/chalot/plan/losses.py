"""What each scheme is expected to cost each item: tables in five depths, from cheap to true.

    error       relative squared error of the weights themselves; every item counts alike
    activation  relative squared error of what the item's matrices give on a calibration text
    fisher      `error`, times the item's mean diagonal Fisher information: half v'Fv is the KL, to
                second order, that noise v on its weights costs; random signs give it, no gradients
    linear      `activation`, times how much of it reaches the output, measured once for each item
                with the coarsest scheme (losses are nearly linear: HIGGS, arXiv 2411.17525)
    measured    the KL of the model with that item alone so stored

A table is kept on disk item by item, so that an interrupted run goes on, and another budget costs
nothing.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import msgspec
import numpy as np

from chalot import __version__
from chalot.errors import WeightError
from chalot.home import home
from chalot.model.calibration import head_inputs, ordered_sum, some_rows
from chalot.model.transformer import INPUT_OF
from chalot.plan.swap import Floats, Item, Swaps, stored
from chalot.quant.scheme import SCHEMES, Scheme

NOISE = 1 / 32  # of a row's size: where losses are linear, far above float32's own noise
Table = dict[str, dict[str, float]]  # item -> scheme -> expected KL or error


def relative(again: Floats, exact: Floats) -> float:
    """Relative squared error. Raises WeightError where it is no number."""
    found = ordered_sum(again - exact) / max(ordered_sum(exact), 1e-30)
    if not np.isfinite(found):
        raise WeightError("activations are NaN or Inf on the calibration text; take another one")
    return found


def inputs_of(swaps: Swaps, item: Item, name: str) -> Floats:
    """(tokens, columns): what a matrix is multiplied with; an embedding as the head."""
    last = name.rsplit(".", 1)[-1]
    if last in INPUT_OF:
        return swaps.inputs[item.layer][INPUT_OF[last]]
    return head_inputs(swaps.config, swaps.weights.vectors.__getitem__, swaps.hidden[-1])


def weight_error(swaps: Swaps, item: Item, scheme: Scheme) -> float:
    """Relative squared error of the item's weights, on some rows of each."""
    lost = had = 0.0
    identity = np.eye(item.tensors[0].shape[1], dtype=np.float32)
    for spec in item.tensors:
        rows = swaps.floats(spec.name)[some_rows(spec.shape[0])]
        again = swaps.backend.product(stored(swaps.backend, rows, scheme), identity, 2).T
        lost, had = lost + ordered_sum(again - rows), had + ordered_sum(rows)
    return lost / max(had, 1e-30)


def output_error(swaps: Swaps, item: Item, scheme: Scheme) -> float:
    """Mean relative squared error of the item's products, on some rows of each."""
    total = 0.0
    for spec in item.tensors:
        rows = swaps.floats(spec.name)[some_rows(spec.shape[0])]
        x = inputs_of(swaps, item, spec.name)[:: max(1, len(swaps.ids) // 256)]
        exact = swaps.backend.product(stored(swaps.backend, rows, SCHEMES["f32"]), x, 1)
        planes = max(swaps.file.manifest.tensors[spec.name].activation // 8, 1)
        coded = stored(swaps.backend, rows, scheme)
        total += relative(swaps.backend.product(coded, x, planes), exact)
    return total / len(item.tensors)


def error_row(swaps: Swaps, item: Item, schemes: Sequence[Scheme]) -> dict[str, float]:
    """See module."""
    return {str(s): weight_error(swaps, item, s) for s in schemes}


def activation_row(swaps: Swaps, item: Item, schemes: Sequence[Scheme]) -> dict[str, float]:
    """See module."""
    return {str(s): output_error(swaps, item, s) for s in schemes}


def noisy(w: Floats, seed: int) -> Floats:
    """Weights with a random sign, times NOISE and the row's root mean square, added to each."""
    random = np.random.Generator(np.random.Philox(seed))
    signs = random.integers(0, 2, w.shape, dtype=np.int8).astype(np.float32) * 2 - 1
    size = np.sqrt((w * w).mean(axis=1, keepdims=True, dtype=np.float64)) * NOISE
    return np.asarray(w + signs * size, np.float32)


def fisher_row(swaps: Swaps, item: Item, schemes: Sequence[Scheme]) -> dict[str, float]:
    """See module."""
    matrices = {
        t.name: stored(swaps.backend, noisy(swaps.floats(t.name), n), SCHEMES["f32"])
        for n, t in enumerate(item.tensors)
    }
    reached = max(swaps.kl(matrices), 0.0) / NOISE**2
    return {name: error * reached for name, error in error_row(swaps, item, schemes).items()}


def linear_row(swaps: Swaps, item: Item, schemes: Sequence[Scheme]) -> dict[str, float]:
    """See module."""
    errors = activation_row(swaps, item, schemes)
    coarse = max(schemes, key=lambda s: errors[str(s)])
    reached = swaps.kl(swaps.encoded(item, coarse)) / max(errors[str(coarse)], 1e-30)
    return {name: max(error * reached, 0.0) for name, error in errors.items()}


def measured_row(swaps: Swaps, item: Item, schemes: Sequence[Scheme]) -> dict[str, float]:
    """See module."""
    return {str(s): max(swaps.kl(swaps.encoded(item, s)), 0.0) for s in schemes}


DEPTHS: Mapping[str, Callable[[Swaps, Item, Sequence[Scheme]], dict[str, float]]] = {
    "error": error_row,
    "activation": activation_row,
    "fisher": fisher_row,
    "linear": linear_row,
    "measured": measured_row,
}

KNOWS_KL = ("fisher", "linear", "measured")  # tables in nats a token


class Kept(msgspec.Struct):
    """A table on disk. `digest` is of `key` and `losses`: what was edited or cut is not believed"""

    key: str
    losses: Table
    digest: str


def digest_of(key: str, losses: Table) -> str:
    """Of what is kept."""
    raw = msgspec.json.encode([key, losses], order="sorted")
    return hashlib.sha256(raw).hexdigest()


class Keeper:
    """The table of a key, on disk: what an interrupted run left, and what comes to it."""

    def __init__(self, key: str) -> None:
        self.key = f"{__version__} {key}"
        name = hashlib.sha256(self.key.encode()).hexdigest()[:24]
        self.path = home() / "plans" / f"{name}.json"

    def read(self, names: Sequence[str]) -> Table:
        """Rows that have a loss of 0 or more for each of the schemes; none of a damaged file."""
        try:
            kept = msgspec.json.decode(self.path.read_bytes(), type=Kept)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return {}
        if kept.key != self.key or kept.digest != digest_of(kept.key, kept.losses):
            return {}
        return {
            item: row
            for item, row in kept.losses.items()
            if row.keys() == set(names) and all(0 <= loss < math.inf for loss in row.values())
        }

    def write(self, losses: Table) -> None:
        """Keep a table; a full disk costs only the keeping."""
        kept = Kept(self.key, losses, digest_of(self.key, losses))
        partial = self.path.with_suffix(".partial")
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(msgspec.json.encode(kept))
            partial.replace(self.path)


def loss_table(
    swaps: Swaps,
    depth: str,
    schemes: Sequence[Scheme],
    key: str,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Table:
    """item -> scheme -> expected loss. `key` names model and text, for what is kept on disk."""
    names = [str(s) for s in schemes]
    keeper = Keeper(f"{key} {depth} {names}")
    kept = keeper.read(names)
    table: Table = {}
    for n, item in enumerate(swaps.items):
        if item.name in kept:
            table[item.name] = kept[item.name]
        else:
            table[item.name] = DEPTHS[depth](swaps, item, schemes)
            keeper.write(table)
        progress(item.name, n + 1, len(swaps.items))
    return table
