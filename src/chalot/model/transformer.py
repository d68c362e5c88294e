"""From weights to a program: the one configurable decoder.

h = embed(token)
h += output(attention(rope(q, k, v of norm(h))))        for each layer
h += down(activation(gate(n)) * up(n)), n = norm(h)
logits = head(norm(h))

Some families have more norms: of q and k before rope, of what output and down are multiplied with,
or of what they give; one has these alone. In some a layer has many feed-forwards, experts, of which
a router chooses a few for each token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.errors import UnsupportedError
from chalot.kernels.program import LOGITS, CacheShape, Op, Part, Program, Slot, padded_vector
from chalot.model.config import ModelConfig
from chalot.model.experts import Experts
from chalot.model.layers import ffn_norm
from chalot.quant.packing import Matrix

FEED_FORWARD = ("gate", "up", "down")
ROTATED = "queries, keys, values"  # the slot; rope turns what it holds
MADE = "{} made"  # the slot of what a named matrix gives, where a norm stands behind it
ATTENDED = MADE.format("output")


@dataclass(frozen=True, eq=False)
class Weights:
    """A model's tensors by chalot's names, and the planes (8 bits each) of their activations."""

    matrices: Mapping[str, Matrix]
    vectors: Mapping[str, NDArray[np.float32]]
    planes: Mapping[str, int] = field(default_factory=dict)
    paged: bool = False  # experts come from a file when they are used: they are asked for ahead


class Builder:
    """Collects slots and operations; codes of one width and precision share a slot."""

    def __init__(self, config: ModelConfig, weights: Weights, fuse: bool = True) -> None:
        self.config = config
        self.weights = weights
        self.fuse = fuse
        self.slots: list[Slot] = []
        self.ops: list[Op] = []
        self.named: dict[str, int] = {}

    def slot(self, name: str, width: int, planes: int = 0) -> int:
        """The slot of that name, made when first asked for."""
        if name not in self.named:
            self.named[name] = len(self.slots)
            self.slots.append(Slot(width, planes))
        return self.named[name]

    def norm(
        self, source: int, target: int, name: str, add: bool = False, divisor: float = 1.0
    ) -> None:
        """target (+)= norm of source, divided."""
        weight = padded_vector(self.weights.vectors[name]) / np.float32(divisor)
        bias = None
        if self.config.centred_norms:
            bias = padded_vector(self.weights.vectors[name + ".bias"]) / np.float32(divisor)
        op = Op("norm", source, target, weight=weight, number=self.config.norm_epsilon, add=add)
        self.ops.append(replace(op, bias=bias))

    def normed(self, there: bool, source: int, slot: str, name: str) -> int:
        """The slot with the norm of source; source itself where there is no such norm."""
        if not there:
            return source
        target = self.slot(slot, self.slots[source].width)
        self.norm(source, target, name)
        return target

    def add_product(self, source: int, hidden: int, name: str, post_norm: str) -> None:
        """hidden += product with the named matrix, or the norm of that."""
        if not self.config.post_norms:
            self.linear(source, hidden, {name: 0}, add=True)
            return
        made = self.slot(MADE.format(name.rpartition(".")[2]), self.slots[hidden].width)
        self.linear(source, made, {name: 0})
        self.norm(made, hidden, post_norm, add=True)

    def head_norms(self, p: str) -> dict[str, Any]:
        """What rope_store needs to norm queries and keys, where the model does."""
        if not (self.config.head_norms or self.config.whole_norms):
            return {}
        both = [padded_vector(self.weights.vectors[p + n]) for n in ("query_norm", "key_norm")]
        return {"weight": np.concatenate(both), "number": self.config.norm_epsilon}

    def embed(self, target: int, matrix: Matrix, scale: float) -> None:
        """target <- rows of the matrix, times `scale`."""
        self.ops.append(Op("embed", target=target, parts=(Part(matrix),), number=scale))

    def linear(
        self,
        source: int,
        target: int,
        names: dict[str, int],
        add: bool = False,
        cap: float = 0.0,
    ) -> None:
        """target[:, column] (+)= product with each named matrix; inputs are quantised if asked."""
        by_kind: dict[tuple[int, bool], list[Part]] = {}
        for name, column in names.items():
            matrix = self.weights.matrices[name]
            bias = self.weights.vectors.get(name + ".bias")
            part = Part(matrix, None if bias is None else padded_vector(bias), column)
            by_kind.setdefault((self.planes(name), matrix.scheme.is_coded), []).append(part)
        for kind, parts in by_kind.items():
            given = self.given(source, *kind)
            self.ops.append(Op("linear", given, target, parts=tuple(parts), add=add, cap=cap))

    def planes(self, name: str) -> int:
        """The planes of what a matrix is multiplied with; 0: numbers."""
        coded = self.weights.matrices[name].scheme.is_coded
        return self.weights.planes.get(name, 1 if coded else 0)

    def given(self, source: int, planes: int, coded: bool) -> int:
        """The slot with the numbers of source, with their codes, or with those as numbers again."""
        if not planes:
            return source
        width = self.slots[source].width
        given = self.slot(f"codes {width} x {planes}", width, planes)
        self.ops.append(Op("quantize", source, given))
        if coded:
            return given
        # numbers through codes and back: what coding activations costs alone
        restored = self.slot(f"restored {width} x {planes}", width)
        self.ops.append(Op("restore", given, restored))
        return restored

    def layer(self, i: int, cache_layer: int) -> None:
        """One layer on the slot "hidden"."""
        c, p = self.config, f"layers.{i}."
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        hidden = self.slot("hidden", c.hidden)
        both = self.slot(ROTATED, queries + 2 * keys)
        seen: dict[str, Any] = {"window": c.window(i), "sinks": c.sinks_of(i)}
        if seen["sinks"]:
            both = self.slot(f"{ROTATED}, queries for sinks", 2 * (queries + keys))
        if self.weights.paged and i and c.experts_of(i) is not None:
            self.foresee(i)  # of an embedding alone a router knows little
        normed = self.normed(c.pre_norms, hidden, "attention input", p + "attention_norm")
        columns = {p + "query": 0, p + "key": queries, p + "value": queries + keys}
        self.linear(normed, both, columns)
        turns = self.head_norms(p) | {"rope": c.rope_set(i)}
        rope = Op("rope_store", both, layer=cache_layer, **turns)
        self.ops.append(replace(rope, **seen) if seen["sinks"] else rope)
        attended = self.slot("attended" if c.inner_norms else "attention output", queries)
        attend = Op("attend", both, attended, number=c.scale(i), layer=cache_layer, cap=c.score_cap)
        self.ops.append(replace(attend, **seen))
        inner = p + "attention_inner_norm"
        attended = self.normed(c.inner_norms, attended, "attention output", inner)
        self.add_product(attended, hidden, p + "output", p + "attention_post_norm")
        fed = self.normed(c.pre_norms, hidden, "feed-forward input", p + ffn_norm(c))
        experts = c.experts_of(i)
        if experts is None:
            self.feed_forward(p, c.feed_forward, fed, hidden)
        else:
            self.mixture(p, experts, fed, hidden)

    def feed_forward(self, p: str, width: int, fed: int, hidden: int) -> None:
        """hidden += down(activation(gate) * up) of fed."""
        c = self.config
        own = "" if width == c.feed_forward else f" {width}"  # slots have one width
        pair = self.slot("gate, up" + own, 2 * width)
        before = len(self.ops)
        self.linear(fed, pair, {p + "gate": 0, p + "up": width})
        gated = self.slot("gated" if c.inner_norms else "feed-forward inner" + own, width)
        self.ops.append(Op("gate", pair, gated, gate=c.activation))
        norm = p + "ffn_inner_norm"
        gated = self.normed(c.inner_norms, gated, "feed-forward inner", norm)
        self.add_product(gated, hidden, p + "down", p + "ffn_post_norm")
        self.fuse_gate(before)

    def fill(self, i: int) -> None:
        """Layer i's keys and values of the slot "hidden", and nothing else of the layer."""
        c, p = self.config, f"layers.{i}."
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        hidden, both = self.slot("hidden", c.hidden), self.slot(ROTATED, queries + 2 * keys)
        normed = self.normed(c.pre_norms, hidden, "attention input", p + "attention_norm")
        # queries stay as they are: rope turns what lies there, and nobody reads it
        self.linear(normed, both, {p + "key": queries, p + "value": queries + keys})
        turns = self.head_norms(p) | {"rope": c.rope_set(i)}
        self.ops.append(Op("rope_store", both, layer=i, **turns))

    def head(self, name: str) -> None:
        """Logits by the named matrix, of the tokens that want them."""
        hidden = self.slot("hidden", self.config.hidden)
        last = self.slot("last", self.config.hidden)
        normed = self.slot("head input", self.config.hidden)
        self.ops.append(Op("gather", hidden, last))
        self.norm(last, normed, "final_norm", divisor=self.config.logit_divisor)
        self.linear(normed, LOGITS, {name: 0}, cap=self.config.logit_cap)

    def mixture(self, p: str, experts: Experts, fed: int, hidden: int) -> None:
        """hidden += what the experts make that the router chose, then what the shared one makes."""
        each = [f"{p}experts.{e}." for e in range(experts.count)]
        if experts.normalised and self.are_one(each):  # weights that sum to 1, of one thing
            self.feed_forward(each[0], experts.width, fed, hidden)
        else:
            self.routed(p + "router", each, experts.top, experts.routing, fed, hidden)
        if experts.shared_width and experts.ones:
            self.feed_forward(p + "shared.", experts.shared_width, fed, hidden)
        elif experts.shared_width:
            self.routed(p + "shared_router", [p + "shared."], 1, "sigmoid", fed, hidden)

    def foresee(self, i: int) -> None:
        """Ask for the experts that layer i's router chooses by the state that layer i begins with.

        Attention adds little to it, so most are those that the layer will take (docs/experts.md).
        Nothing that is computed depends on it.
        """
        c, p = self.config, f"layers.{i}."
        experts = c.experts_of(i)
        assert experts is not None
        hidden, guessed = self.slot("hidden", c.hidden), self.slot("expected input", c.hidden)
        scores = self.slot(f"scores {experts.count}", experts.count)
        routes = self.slot(f"routes {experts.count}", experts.count)
        self.norm(hidden, guessed, p + ffn_norm(c))
        self.linear(guessed, scores, {p + "router": 0})
        self.ops.append(Op("route", scores, routes, top=experts.top))
        names = [f"{p}experts.{e}.{m}" for e in range(experts.count) for m in FEED_FORWARD]
        parts = tuple(Part(self.weights.matrices[n]) for n in names)
        self.ops.append(Op("prefetch", routes, parts=parts))

    def are_one(self, experts: list[str]) -> bool:
        """Whether all experts are the same bytes of a file."""
        held = self.weights.matrices
        if not held[experts[0] + "gate"].data.size:  # shapes alone
            return False
        return all(
            len({held[e + name].data.ctypes.data for e in experts}) == 1 and len(experts) > 1
            for name in FEED_FORWARD
        )

    def routed(
        self, router: str, experts: list[str], top: int, routing: str, fed: int, hidden: int
    ) -> None:
        """hidden += each token's own of the named experts, by their router's scores."""
        scores = self.slot(f"scores {len(experts)}", len(experts))
        routes = self.slot(f"routes {len(experts)}", len(experts))
        self.linear(fed, scores, {router: 0})
        self.ops.append(Op("route", scores, routes, routing=routing, top=top))
        names = [e + part for e in experts for part in FEED_FORWARD]
        readers, downs = ([n for n in names if n.endswith("down") == d] for d in (False, True))
        planes, coded = self.one_kind(readers)
        inner, _ = self.one_kind(downs)
        given = self.given(fed, planes, coded)
        parts = tuple(Part(self.weights.matrices[n]) for n in names)
        op = Op("experts", given, hidden, parts=parts, routes=routes, top=top, planes=inner)
        self.ops.append(replace(op, gate=self.config.activation, add=True))

    def one_kind(self, names: list[str]) -> tuple[int, bool]:
        """Planes, and whether they are coded, of matrices that are to be alike in that."""
        kinds = {(self.planes(n), self.weights.matrices[n].scheme.is_coded) for n in names}
        if len({coded for _, coded in kinds}) > 1:
            raise UnsupportedError(
                f"{names[0]} ... {names[-1]}: some experts are coded and some are dense, expected "
                "one of both; convert again with one scheme for the experts of a layer"
            )
        return max(kinds)

    def fuse_gate(self, start: int) -> None:
        """Make one of gate and up, what they make, and its codes, where all are coded."""
        made = self.ops[start:]
        for i, op in enumerate(made[:-2]):
            in_a_row = [o.kind for o in made[i : i + 3]] == ["linear", "gate", "quantize"]
            coded = len(op.parts) == 2 and all(p.matrix.scheme.is_coded for p in op.parts)
            # where hidden and inner are of one width, its codes would overwrite its input
            if self.fuse and in_a_row and coded and made[i + 2].target != op.source:
                self.ops[start + i] = replace(op, fused=True)

    def program(
        self, cache: CacheShape, inverse_frequency: NDArray[np.float32], vocabulary: int = 0
    ) -> Program:
        """What was collected, as a program, of as many logits as the model has, or `vocabulary`."""
        return Program(
            tuple(self.slots),
            tuple(self.ops),
            cache,
            self.config.heads,
            inverse_frequency,
            vocabulary or self.config.vocabulary,
            self.config.rope_factor,
        )


def cache_shape(config: ModelConfig, kind: str) -> CacheShape:
    """What the model's cache holds, its numbers stored as `kind` (of CACHE_TYPES)."""
    return CacheShape(kind, config.layers, config.kv_heads, config.head_dim)


def build(
    config: ModelConfig, weights: Weights, inverse_frequency: NDArray[np.float32], cache: str
) -> Program:
    """The whole model as a program. Raises KeyError for a missing tensor."""
    embedding, scale = weights.matrices["embedding"], config.embedding_scale
    return build_from(config, weights, 0, embedding, scale, inverse_frequency, cache)


def build_from(
    config: ModelConfig,
    weights: Weights,
    first: int,
    embedding: Matrix,
    scale: float,
    inverse_frequency: NDArray[np.float32],
    cache: str,
) -> Program:
    """The model from layer `first` on; a token's hidden state is its row of `embedding`, scaled."""
    b = Builder(config, weights)
    hidden = b.slot("hidden", config.hidden)
    b.embed(hidden, embedding, scale)
    for i in range(first, config.layers):
        b.layer(i, i - first)
    b.head(head_name(config))
    shape = replace(cache_shape(config, cache), layers=max(config.layers - first, 1))
    return b.program(shape, inverse_frequency)


def head_name(config: ModelConfig) -> str:
    """The matrix that logits are made with."""
    return "embedding" if config.tied else "head"


def head_input(program: Program) -> int:
    """The slot with what the head is multiplied with: the last hidden state, normed."""
    last = next(op.target for op in program.ops if op.kind == "gather")
    return next(op.target for op in program.ops if op.kind == "norm" and op.source == last)


INPUT_OF = {  # a layer's matrices -> the slot that they are multiplied with
    **dict.fromkeys(("query", "key", "value"), "attention input"),
    "output": "attention output",
    **dict.fromkeys(("gate", "up"), "feed-forward input"),
    "down": "feed-forward inner",
}
LAYER_INPUTS = tuple(dict.fromkeys(INPUT_OF.values()))


def build_layer(
    config: ModelConfig,
    weights: Weights,
    layer: int,
    hidden: Matrix,
    inverse_frequency: NDArray[np.float32],
) -> tuple[Program, dict[str, int]]:
    """One layer alone, from given hidden states (rows of an f32 matrix, taken as they are).

    Returns the program and the slots that hold what its matrices are multiplied with.
    """
    b = Builder(config, weights, fuse=False)
    b.embed(b.slot("hidden", config.hidden), hidden, 1.0)
    b.layer(layer, 0)
    shape = CacheShape("f32", 1, config.kv_heads, config.head_dim)
    return b.program(shape, inverse_frequency), b.named
