"""What converting learns from a short text: channel factors and activation bits, by measured error.

Hidden states of some 128 tokens go through the source's own weights, a layer at a time. For each
input that matrices share, every candidate of `quant.fold` is tried on some rows of them, quantised,
against the exact product; the best is kept if it gains. Sixteen-bit activations are asked for where
eight bits would add more than a tenth to the weights' own error. Keys are balanced with the queries
they meet, for the cache's sake. All arithmetic is the kernels',
so the choice, and with it the file, is the same on every machine.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from chalot.errors import WeightError
from chalot.kernels.backend import Backend, Runnable
from chalot.kernels.program import PAGE, Batch, padded_vector
from chalot.kernels.reference import gate, layer_norm, rms_norm, route
from chalot.model.cache import PageCache, Sequence
from chalot.model.config import ModelConfig
from chalot.model.layers import ffn_norm, layer_tensors
from chalot.model.rope import turning_order
from chalot.model.transformer import ATTENDED, LAYER_INPUTS, ROTATED, Weights, build_layer
from chalot.quant import fold
from chalot.quant.grids import tables_of
from chalot.quant.packing import Matrix, pack_dense
from chalot.quant.scheme import SCHEMES, Scheme

Floats = NDArray[np.float32]
PLANNED = 128  # tokens that plans are made from
ROWS = 48  # of each matrix that a candidate is tried on
NOTABLE = 5e-4  # relative squared error that eight-bit activations may add


@dataclass
class Plan:
    """How tensors change before they are stored: factors of rows and columns, activation planes."""

    rows: dict[str, Floats] = field(default_factory=dict)
    columns: dict[str, Floats] = field(default_factory=dict)
    planes: dict[str, int] = field(default_factory=dict)

    def apply(self, name: str, weights: Floats, first: int) -> Floats:
        """Rows `first`... of a tensor, or a vector, with its factors."""
        if name in self.columns:
            weights = weights * self.columns[name]
        return self.apply_rows(name, weights, first)

    def apply_rows(self, name: str, weights: Floats, first: int) -> Floats:
        """Rows `first`... of a tensor, or a number of each, with their factors."""
        if name not in self.rows:
            return weights
        factor = self.rows[name][first : first + len(weights)]
        return weights * (factor[:, None] if weights.ndim == 2 else factor)


def ordered_sum(x: Floats) -> float:
    """Sum of squares in float64, one after another."""
    return float(np.add.accumulate(x.astype(np.float64).ravel() ** 2)[-1])


def some_rows(count: int) -> NDArray[np.int64]:
    """Evenly spaced rows of a matrix."""
    return np.unique(np.arange(ROWS) * count // ROWS)


@dataclass(frozen=True)
class Trial:
    """One input and samples of the matrices that read it."""

    backend: Backend
    x: Floats  # (tokens, columns)
    samples: Mapping[str, tuple[Floats, Scheme]]  # rows of each matrix, and how it will be stored

    @cached_property
    def exact(self) -> dict[str, Floats]:
        """The products with the source's own rows."""
        return {
            name: self.backend.product(dense(rows), self.x, 1)
            for name, (rows, _) in self.samples.items()
        }

    def errors(self, factor: Floats) -> tuple[float, float]:
        """Mean relative squared error of the products, with columns scaled by `factor`.

        By eight-bit activations, and by sixteen-bit ones.
        """
        totals = [0.0, 0.0]
        x = self.x / factor
        for name, (rows, scheme) in self.samples.items():
            data = self.backend.encode(rows * factor, scheme)
            stored = Matrix(scheme, (rows.shape[0], rows.shape[1]), data, tables_of(scheme))
            exact = self.exact[name]
            size = max(ordered_sum(exact), 1e-30)
            for i in range(2):
                totals[i] += ordered_sum(self.backend.product(stored, x, i + 1) - exact) / size
        return totals[0] / len(self.samples), totals[1] / len(self.samples)

    def best(self, fold_columns: Callable[[Floats], Floats] | None) -> tuple[Floats, int]:
        """The factor of columns and the planes that serve this input best.

        `fold_columns` makes factors such that what produces the input can take their inverse.
        """
        none = np.ones(self.x.shape[1], np.float32)
        tried = [none]
        if fold_columns is not None:
            activation = fold.channel_size(self.x)
            column = fold.channel_size(np.concatenate([r for r, _ in self.samples.values()]))
            for halves in fold.CANDIDATES[1:]:
                factor = fold_columns(fold.factors(activation, column, halves))
                if not any(np.array_equal(factor, t) for t in tried):
                    tried.append(factor)
        kept: dict[int, tuple[float, Floats]] = {}
        by_planes = zip(*map(self.errors, tried), strict=True)
        for planes, errors in enumerate(by_planes, start=1):
            least = int(np.argmin(errors))
            chosen = least if errors[least] < fold.GAIN * errors[0] else 0
            kept[planes] = errors[chosen], tried[chosen]
        planes = planes_for(kept[1][0], kept[2][0])
        return kept[planes][1], planes


def planes_for(eight: float, sixteen: float) -> int:
    """Planes of an input whose products have these errors with 8 and with 16 bits."""
    return 2 if eight - sixteen > max(NOTABLE, 0.1 * sixteen) else 1


def dense(rows: Floats) -> Matrix:
    """A float32 matrix for the dense kernels."""
    scheme = SCHEMES["f32"]
    return Matrix(scheme, (rows.shape[0], rows.shape[1]), pack_dense(rows, scheme))


def run_layer(
    backend: Backend,
    config: ModelConfig,
    weights: Weights,
    i: int,
    hidden: Floats,
    inverse_frequency: Floats,
) -> Iterator[dict[str, Floats]]:
    """Layer i of each window of PAGE hidden states (tokens, hidden), one window after another.

    Gives (window, width) of what its matrices are multiplied with, what rope has turned, and
    "hidden", the states behind the layer.
    """
    program, named = build_layer(config, weights, i, dense(hidden), inverse_frequency)
    runnable = backend.compile(program)
    cache = PageCache(program.cache, PAGE)
    sequence = Sequence(cache)
    sequence.reserve(PAGE)  # each window writes over the one before
    for at in range(0, len(hidden), PAGE):
        tokens = np.arange(at, min(at + PAGE, len(hidden)), dtype=np.int32)
        batch = Batch(tokens, tokens - at, tokens * 0, cache.tables([sequence]))
        runnable.run(batch, cache.arena)
        others = {n: runnable.slot(named[n], len(tokens)) for n in (ROTATED, "hidden")}
        yield layer_inputs(config, weights, i, (runnable, named), hidden[tokens]) | others


def layer_inputs(
    config: ModelConfig,
    weights: Weights,
    i: int,
    layer: tuple[Runnable, Mapping[str, int]],
    states: Floats,
) -> dict[str, Floats]:
    """What layer i's matrices are multiplied with, by slot, where it began from these states.

    `layer` is what `build_layer` gave, after its run. Where no norms stand before them, attention
    reads the states themselves, and the feed-forward these with what attention made, normed.
    """
    runnable, named = layer
    found = {n: runnable.slot(named[n], len(states)) for n in LAYER_INPUTS if n in named}
    if not config.pre_norms:
        weight = padded_vector(weights.vectors[f"layers.{i}.attention_post_norm"])
        made = rms_norm(runnable.slot(named[ATTENDED], len(states)), weight, config.norm_epsilon)
        found |= {"attention input": states, "feed-forward input": states + made}
    return found


def head_inputs(config: ModelConfig, read: Callable[[str], Floats], hidden: Floats) -> Floats:
    """(tokens, hidden): the last hidden states, normed. `read` gives a tensor."""
    weight = padded_vector(read("final_norm"))
    if not config.centred_norms:
        return rms_norm(hidden, weight, config.norm_epsilon)
    return layer_norm(hidden, weight, padded_vector(read("final_norm.bias")), config.norm_epsilon)


class Calibration:
    """Hidden states on their way through the source's layers."""

    def __init__(
        self,
        config: ModelConfig,
        schemes: Mapping[str, Scheme],  # by tensor name
        backend: Backend,
        inverse_frequency: Floats,
        hidden: Floats,  # (tokens, hidden), in windows of a page
        kept: Set[str] = frozenset(),  # matrices whose columns must stay as they are
        same: Mapping[str, str] = MappingProxyType({}),  # tensors that are another one
        watch: Callable[[Mapping[str, Floats]], None] | None = None,
    ) -> None:
        """`watch` gets what each window is in every slot; plans are made from the first tokens."""
        self.config = config
        self.schemes = schemes
        self.backend = backend
        self.inverse_frequency = inverse_frequency
        self.hidden = hidden
        self.watch = watch
        self.kept = kept
        self.same = same
        self.plan = Plan()

    def layer(
        self, i: int, read: Callable[[str], Floats], dense_scheme: Scheme
    ) -> dict[str, Floats]:
        """Take the hidden states through layer i, and plan its tensors. `read` gives a tensor.

        Returns what its matrices are multiplied with, by slot.
        """
        matrices: dict[str, Matrix] = {}
        vectors, samples = {}, {}
        for spec in layer_tensors(self.config, i):
            of = self.same.get(spec.name)
            if of is not None and of in matrices:
                matrices[spec.name] = matrices[of]
                continue
            weights = read(spec.name)
            if spec.kind == "vector":
                vectors[spec.name] = weights
                continue
            shape = (spec.shape[0], spec.shape[1])
            held = SCHEMES["f32"] if spec.kind == "router" else dense_scheme
            matrices[spec.name] = Matrix(held, shape, pack_dense(weights, held))
            if self.schemes[spec.name].is_coded:
                rows = weights[some_rows(len(weights))]
                samples[spec.name] = (rows, self.schemes[spec.name])
            del weights  # before the next one is read
        inputs = self._run(i, Weights(matrices, vectors))
        if samples:
            one = "experts.0." if self._are_one(i) else ""
            self._plan(f"layers.{i}.", inputs, samples, one)
            if one:
                self._plan_copies(f"layers.{i}.")
            elif self.config.experts_of(i) is not None:
                self._plan_experts(i, inputs["feed-forward input"], matrices, samples)
            self._balance_keys(f"layers.{i}.", inputs[ROTATED], vectors)
        return inputs

    def _run(self, i: int, weights: Weights) -> dict[str, Floats]:
        """What the layer's matrices are multiplied with, by slot; the hidden states move on."""
        after: list[Floats] = []
        first: dict[str, Floats] = {}
        windows = run_layer(
            self.backend, self.config, weights, i, self.hidden, self.inverse_frequency
        )
        for slots in windows:
            if not all(np.isfinite(x).all() for x in slots.values()):
                raise WeightError(
                    f"layer {i} makes NaN or Inf of ordinary text, in the source's own numbers; "
                    "take another checkpoint, or the config.json that belongs to it"
                )
            after.append(slots["hidden"])
            if self.watch is not None:
                self.watch(slots)
            first = first or {n: x[:PLANNED].copy() for n, x in slots.items()}
        self.hidden = np.concatenate(after)
        return first

    def _are_one(self, i: int) -> bool:
        """Whether a layer's experts are one tensor each, which is computed as a dense one is."""
        experts, p = self.config.experts_of(i), f"layers.{i}.experts."
        return (
            experts is not None
            and experts.normalised
            and experts.count > 1
            and all(
                self.same.get(f"{p}{e}.{part}") == f"{p}0.{part}"
                for e in range(1, experts.count)
                for part in ("gate", "up", "down")
            )
        )

    def _plan_copies(self, p: str) -> None:
        """What holds for experts that are one holds for all, and for what reads with them."""
        first = p + "experts.0."
        if first + "gate" in self.plan.columns:
            factor = self.plan.columns[first + "gate"]
            readers = ("router", "shared_router", "shared.gate", "shared.up")
            self.plan.columns.update(dict.fromkeys((p + r for r in readers), factor))
        factors, planes = (self.plan.rows, self.plan.columns), self.plan.planes
        for name, of in self.same.items():
            if of.startswith(first):
                for found in factors:
                    found.update({name: found[of]} if of in found else {})
                planes.update({name: planes[of]} if of in planes else {})

    def _plan(
        self,
        p: str,
        inputs: Mapping[str, Floats],
        samples: Mapping[str, tuple[Floats, Scheme]],
        one: str,  # what comes before a feed-forward's names, where copied experts are one
    ) -> None:
        def values_to_output(factor: Floats) -> Floats:
            """Query heads of a group read one value head: they share its factors."""
            c = self.config
            by_head = factor.reshape(c.kv_heads, c.heads // c.kv_heads, c.head_dim)
            shared = by_head.max(axis=1, keepdims=True)
            return np.broadcast_to(shared, by_head.shape).reshape(-1)

        def value_rows(factor: Floats) -> Floats:
            c = self.config
            return factor.reshape(c.kv_heads, -1, c.head_dim)[:, 0].reshape(-1)

        def same(factor: Floats) -> Floats:
            return factor

        attended = ("value", values_to_output, value_rows)
        gated = (one + "up", same, same)
        if self.config.inner_norms:
            attended, gated = ("attention_inner_norm", same, same), ("ffn_inner_norm", same, same)
        normed = same if self.config.pre_norms else None  # else nothing makes it that could share
        before = ffn_norm(self.config)
        # input, the matrices that read it, what produces it, how its factors are shared and seen
        for slot, readers, (producer, share, seen) in (
            ("attention input", ("query", "key", "value"), ("attention_norm", normed, same)),
            ("attention output", ("output",), attended),
            ("feed-forward input", (one + "gate", one + "up"), (before, normed, same)),
            ("feed-forward inner", (one + "down",), gated),
        ):
            if slot not in inputs:  # experts are not folded, unless all are one
                continue
            coded = {p + r: samples[p + r] for r in readers if p + r in samples}
            if not coded:
                continue
            fold_columns = None if self.kept & coded.keys() else share
            factor, planes = Trial(self.backend, inputs[slot], coded).best(fold_columns)
            self.plan.planes.update(dict.fromkeys(coded, planes))
            if (factor == 1).all():
                continue
            inverse = np.float32(1) / seen(factor)
            self.plan.rows[p + producer] = inverse
            self.plan.rows[p + producer + ".bias"] = inverse
            self.plan.columns.update(dict.fromkeys((p + r for r in readers), factor))

    def _plan_experts(
        self,
        i: int,
        x: Floats,
        matrices: Mapping[str, Matrix],
        samples: Mapping[str, tuple[Floats, Scheme]],
    ) -> None:
        """Activation bits of experts: all of a layer have the same, by the mean of their errors.

        Each down is tried on what its own expert makes of the tokens that the router sends it.
        """
        experts, p = self.config.experts_of(i), f"layers.{i}."
        assert experts is not None
        scores = self.backend.product(matrices[p + "router"], x, 1)
        routes = route(experts.routing, experts.top, scores)
        each = {f"{p}experts.{e}.": x[routes[:, e] != -1] for e in range(experts.count)}
        for of_kind in (each, {p + "shared.": x} if experts.shared_width else {}):
            readers = [n + part for n in of_kind for part in ("gate", "up") if n + part in samples]
            if readers:
                trial = Trial(self.backend, x, {n: samples[n] for n in readers})
                self.plan.planes.update(dict.fromkeys(readers, trial.best(None)[1]))
            errors = []
            for n, mine in of_kind.items():
                if len(mine) and n + "down" in samples:
                    g, up = (self.backend.product(matrices[n + m], mine, 1) for m in ("gate", "up"))
                    inner = gate(self.config.activation, g, up)
                    trial = Trial(self.backend, inner, {n + "down": samples[n + "down"]})
                    errors.append(trial.errors(np.ones(inner.shape[1], np.float32)))
            if errors:
                eight, sixteen = (sum(e[j] for e in errors) / len(errors) for j in (0, 1))
                downs = [n + "down" for n in of_kind]
                self.plan.planes.update(dict.fromkeys(downs, planes_for(eight, sixteen)))

    def _balance_keys(self, p: str, rotated: Floats, vectors: Mapping[str, Floats]) -> None:
        """Factors of the rows that make queries and keys, from queries after rope and keys.

        Norms of heads would take a row's factor out again: where there are some, their weights have
        it, one for all heads.
        """
        c, query, key = self.config, p + "query", p + "key"
        if c.whole_norms or not (self.schemes[query].is_coded and self.schemes[key].is_coded):
            return
        order = turning_order(c.head_dim, c.turning or c.head_dim)
        heads = rotated.reshape(len(rotated), -1, c.head_dim)[:, : c.heads + c.kv_heads]
        if c.head_norms:  # which the slot's keys, unlike its queries, have not been through
            weight = padded_vector(vectors[p + "key_norm"])
            normed = rms_norm(heads[:, c.heads :], weight, c.norm_epsilon)
            heads = np.concatenate([heads[:, : c.heads], normed], axis=1)
        pairs = c.head_dim // 2
        flat = heads[:, :, order].reshape(len(heads), -1).astype(np.float64)
        square = fold.column_sums(flat**2).reshape(-1, 2, pairs)
        of_pairs = square[:, 0] + square[:, 1]  # (heads, pairs): queries, keys
        queries, keys = of_pairs[: c.heads].reshape(c.kv_heads, -1, pairs), of_pairs[c.heads :]
        shared = sum(queries[:, i] for i in range(1, queries.shape[1])) + queries[:, 0]
        if c.head_norms:
            query, key = p + "query_norm", p + "key_norm"
            keys, shared = (fold.column_sums(x)[None] for x in (keys, shared))
        factor = np.tile(fold.pair_factors(keys, shared), (1, 2))  # (kv_heads or 1, head_dim)
        factor = factor[:, np.argsort(order)]
        if (factor == 1).all():
            return
        group = 1 if c.head_norms else c.heads // c.kv_heads
        by_query = np.repeat(factor, group, axis=0).reshape(-1)
        by_key = (np.float32(1) / factor).reshape(-1)
        for name, rows in ((query, by_query), (key, by_key)):
            self.plan.rows[name] = self.plan.rows[name + ".bias"] = rows

    def head_inputs(self, read: Callable[[str], Floats]) -> Floats:
        """(tokens, hidden): what the head is multiplied with, behind the last layer."""
        return head_inputs(self.config, read, self.hidden)

    def head(self, name: str, read: Callable[[str], Floats], rows: Floats) -> None:
        """Plan the head's activations from the last hidden states and some of its rows."""
        if not self.schemes[name].is_coded:
            return
        x = head_inputs(self.config, read, self.hidden[:PLANNED])
        trial = Trial(self.backend, x, {name: (rows, self.schemes[name])})
        self.plan.planes[name] = trial.best(None)[1]
