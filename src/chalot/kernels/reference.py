"""The numpy oracle: the same programs, bit for bit what native kernels give, far slower.

Sums of floats follow the one written order (docs/exactness.md): sixteen lanes of fma chains, then
a tree of lanes 8, 4, 2, 1 apart. fma is emulated in float64, rounding to odd where the sum is not
exact so that the final rounding to float32 happens once. Integer sums are exact in float32 because
a block of 128 products of int8 stays below 2^24.
"""

import math

import numpy as np
from numpy.typing import NDArray

from chalot.errors import KernelError
from chalot.kernels.program import LOGITS, PAGE, Batch, Op, Program
from chalot.quant.codes import spread as repeated
from chalot.quant.codes import units, values
from chalot.quant.packing import Matrix, numbers, unpack
from chalot.quant.scheme import BLOCK, PANEL, round_up

F32 = np.float32
F64 = np.float64
Floats = NDArray[np.float32]


def fma(a: Floats, b: Floats | np.float32, c: Floats | np.float32) -> Floats:
    """a * b + c rounded once to float32."""
    with np.errstate(all="ignore"):
        p = np.asarray(a, F64) * np.asarray(b, F64)  # exact: 24 + 24 bits
        c64 = np.asarray(c, F64)
        s = np.asarray(p + c64)
        part = s - p
        error = (p - (s - part)) + (c64 - part)
        bits = s.view(np.int64)
        inexact = (error != 0) & (bits & 1 == 0) & np.isfinite(s)
        away = (error > 0) == (s > 0)
        bits = bits + np.where(inexact, np.where(away, 1, -1), 0)
        out: Floats = bits.view(F64).astype(F32)
        return out


def tree(lanes: Floats) -> Floats:
    """Sum over the last axis of sixteen lanes: 8, 4, 2, 1 apart."""
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width:]
    return lanes[..., 0]


def pad(x: Floats, multiple: int) -> Floats:
    """Zeros behind the last axis up to a multiple."""
    extra = round_up(x.shape[-1], multiple) - x.shape[-1]
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)])


def exp(x: Floats) -> Floats:
    """e^x by 2^n * e^r with a polynomial of degree 7; 0 below -87, constant above 88."""
    with np.errstate(invalid="ignore"):
        t = np.maximum(np.minimum(x, F32(88)), F32(-88))
        n = np.rint(t * F32(1.44269504))
        r = fma(n, F32(2.12194440e-4), fma(n, F32(-0.693359375), t))
        p = np.full_like(r, F32(1.0 / 5040))
        for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            p = fma(p, r, F32(c))
        n = np.maximum(n, F32(-126))
        power = ((n.astype(np.int32) + 127) << 23).view(F32)
        out: Floats = np.where(x < F32(-87), F32(0), p * power)
        return out


def rms_norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis; `weight` is padded to 16."""
    n = x.shape[-1]
    chunks = pad(x, PANEL).reshape(*x.shape[:-1], -1, PANEL)
    lanes = np.zeros((*x.shape[:-1], PANEL), F32)
    for k in range(chunks.shape[-2]):
        lanes = fma(chunks[..., k, :], chunks[..., k, :], lanes)
    scale = F32(1) / np.sqrt(tree(lanes) / F32(n) + F32(epsilon))
    y: Floats = (x * scale[..., None]) * weight[:n]
    return y


def gate(kind: str, g: Floats, up: Floats) -> Floats:
    """activation(g) * up; silu and gelu's tanh form as g / (1 + e^-2u), relu2 as max(g, 0)^2."""
    if kind == "relu2":
        g = np.maximum(g, F32(0))
        return (g * g) * up
    if kind == "silu":
        minus = F32(0) - g
    else:
        minus = fma((g * g) * g, F32(0.044715), g) * F32(-1.5957691216)
    return (g / (F32(1) + exp(minus))) * up


def quantize_runs(x: Floats, planes: int) -> tuple[NDArray[np.int32], Floats]:
    """Whole numbers and one scale for each run along the last axis."""
    top = F32(127 if planes == 1 else 127 * 128)
    high = np.abs(x).max(axis=-1)
    some = high > F32(2.0**-100)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(some, top / high, F32(0))
    scale = np.where(some, high / top, F32(0))
    return np.rint(x * inverse[..., None]).astype(np.int32), scale


def quantize(x: Floats, planes: int) -> tuple[NDArray[np.int8], Floats]:
    """Codes (tokens, planes, columns padded to 128) and scales (tokens, blocks)."""
    whole, scale = quantize_runs(pad(x, BLOCK).reshape(len(x), -1, BLOCK), planes)
    whole = whole.reshape(len(x), 1, -1)
    if planes == 2:
        first = (whole + 64) >> 7
        whole = np.concatenate([np.clip(first, -127, 127), whole - first * 128], axis=1)
    return np.clip(whole, -127, 127).astype(np.int8), scale


def restore(codes: NDArray[np.int8], scale: Floats) -> Floats:
    """(tokens, columns padded to 128): what codes and scales stand for."""
    whole = codes[:, 0].astype(np.int32)
    if codes.shape[1] == 2:
        whole = whole * 128 + codes[:, 1]
    return whole.astype(F32) * np.repeat(scale, BLOCK, axis=1)


def product(matrix: Matrix, codes: NDArray[np.int8], scale: Floats) -> Floats:
    """(tokens, rows): coded activations times a coded matrix, an fma chain over blocks."""
    coded = unpack(matrix.data, matrix.scheme, matrix.shape)
    w = np.pad(
        values(coded, matrix.tables), [(0, 0), (0, codes.shape[2] - coded.codes.shape[1])]
    ).astype(F32)
    factor = coded.segments.astype(F32)  # (rows16, segments)
    total = np.zeros((len(codes), len(w)), F32)
    for b in range(-(-matrix.shape[1] // BLOCK)):
        columns = slice(b * BLOCK, (b + 1) * BLOCK)
        sums = codes[:, :, columns].astype(F32) @ w[:, columns].T  # (tokens, planes, rows), exact
        whole = sums[:, 0].astype(np.int32)
        if codes.shape[1] == 2:
            whole = whole * 128 + sums[:, 1].astype(np.int32)
        both = factor[:, b * BLOCK // matrix.scheme.segment][None] * scale[:, b, None]
        total = fma(whole.astype(F32), both, total)
    return (total * coded.row_scale)[:, : matrix.shape[0]]


def add_offsets(matrix: Matrix, codes: NDArray[np.int8], scale: Floats, y: Floats) -> None:
    """y (tokens, rows) += row_offset times the sum of x, where a scheme has offsets."""
    offset = unpack(matrix.data, matrix.scheme, matrix.shape).row_offset
    if offset is not None:
        y += offset[: matrix.shape[0]] * code_sums(codes, scale)[:, None]


def code_sums(codes: NDArray[np.int8], scale: Floats) -> Floats:
    """(tokens,): the sum of coded activations, block after block."""
    whole = codes.reshape(*codes.shape[:2], -1, BLOCK).sum(axis=3, dtype=np.int32)
    blocks = whole[:, 0] if codes.shape[1] == 1 else whole[:, 0] * 128 + whole[:, 1]
    total = np.zeros(len(codes), F32)
    for b in range(blocks.shape[1]):
        total = total + blocks[:, b].astype(F32) * scale[:, b]
    return total


def dense(matrix: Matrix, x: Floats) -> Floats:
    """(tokens, rows): numbers times numbers in sixteen lanes of fma chains."""
    w = numbers(matrix).reshape(matrix.shape[0], -1, PANEL)
    chunks = pad(x, PANEL).reshape(len(x), -1, PANEL)
    lanes = np.zeros((len(x), matrix.shape[0], PANEL), F32)
    for k in range(w.shape[1]):
        lanes = fma(w[None, :, k], chunks[:, None, k], lanes)
    return tree(lanes)


def embedding(matrix: Matrix, ids: NDArray[np.int32]) -> Floats:
    """(tokens, columns): rows of a matrix as numbers."""
    columns = matrix.shape[1]
    if not matrix.scheme.is_coded:
        return numbers(matrix)[ids, :columns]
    coded = unpack(matrix.data, matrix.scheme, matrix.shape)
    unit = units(coded.row_scale, coded.segments)[ids]
    whole = values(coded, matrix.tables)[ids, :columns].astype(F32)
    out = whole * repeated(unit, matrix.scheme.segment, columns)
    return out if coded.row_offset is None else out + coded.row_offset[ids, None]


def sine_cosine(angle: Floats) -> tuple[Floats, Floats]:
    """sin and cos of float32 angles below 2^20, in float64 without fma, rounded to float32."""
    a = angle.astype(F64)
    n = np.rint(a * 0.63661977236758134308)
    r = ((a - n * 1.5707963267341256e00) - n * 6.0771005063039660e-11) - n * 2.0222662487959506e-21
    x = r * r
    s = np.full_like(x, -1.0 / math.factorial(15))
    for k in (13, 11, 9, 7, 5, 3):
        s = s * x + (1.0 if k % 4 == 1 else -1.0) / math.factorial(k)
    c = np.full_like(x, 1.0 / math.factorial(16))
    for k in (14, 12, 10, 8, 6, 4):
        c = c * x + (1.0 if k % 4 == 0 else -1.0) / math.factorial(k)
    sine, cosine = r + r * x * s, 1.0 - x * 0.5 + x * x * c
    quarter = n.astype(np.int64) & 3
    in_turn = np.stack([sine, cosine, -sine, -cosine])
    index = quarter[None]
    sine4 = np.take_along_axis(in_turn, index, 0)[0]
    cosine4 = np.take_along_axis(in_turn, (index + 1) & 3, 0)[0]
    return sine4.astype(F32), cosine4.astype(F32)


def rotate(x: Floats, sine: Floats, cosine: Floats) -> Floats:
    """Rotates the pairs (i, i + half) of the last axis."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([fma(-b, sine, a * cosine), fma(a, sine, b * cosine)], axis=-1)


def spread(x: Floats, size: int) -> Floats:
    """Blocks of `size` numbers of the last axis times a Hadamard matrix, without 1 / sqrt(size)."""
    width = 1
    while width < size:
        pairs = x.reshape(*x.shape[:-1], -1, 2, width)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([a + b, a - b], axis=-2).reshape(x.shape)
        width *= 2
    return x


def soft_cap(scores: Floats, cap: float) -> Floats:
    """cap * tanh(scores / cap), unless cap is 0."""
    if cap == 0:
        return scores
    e = exp(scores * (F32(2) / F32(cap)))
    return F32(cap) * (F32(1) - F32(2) / (e + F32(1)))


def softmax(scores: Floats, start: int) -> "Gathered":
    """e^(score - largest), the largest, and the sum in sixteen lanes; the first is at `start`."""
    high = scores.max()
    p = exp(scores - high)
    total = np.zeros(PANEL, F32)
    for chunk in pad(np.concatenate([np.zeros(start % PANEL, F32), p]), PANEL).reshape(-1, PANEL):
        total = total + chunk
    return p, high, tree(total)


Scalar = np.float32 | Floats
Gathered = tuple[Floats, Scalar, Scalar]  # output, largest score, denominator


def attend_numbers(query: Floats, keys: Floats, held: Floats, start: int, cap: float) -> Gathered:
    """What a scaled query gathers from positions `start`... of a page, keys (positions, stride)."""
    lanes = np.zeros((len(keys), PANEL), F32)
    for d in range(0, keys.shape[1], PANEL):
        lanes = fma(query[None, d : d + PANEL], keys[:, d : d + PANEL], lanes)
    p, high, total = softmax(soft_cap(tree(lanes), cap), start)
    gathered = np.zeros(keys.shape[1], F32)
    for j in range(len(p)):
        gathered = fma(p[j : j + 1], held[j], gathered)
    return gathered, high, total


def attend_codes(
    query: tuple[NDArray[np.int32], Scalar],
    keys: tuple[NDArray[np.int8], Floats],
    held: tuple[NDArray[np.int8], Floats],
    start: int,
    cap: float,
) -> Gathered:
    """The same of codes (positions, stride) with a scale a position; the query is whole numbers."""
    whole, query_scale = query
    sums = keys[0].astype(np.int32) @ np.clip(whole, -127 * 128, 127 * 128)
    scores = sums.astype(F32) * (keys[1] * query_scale)
    p, high, total = softmax(soft_cap(scores, cap), start)
    weights, scale = quantize_runs(p * held[1], 2)
    return (weights @ held[0].astype(np.int32)).astype(F32) * scale, high, total


def merge(so_far: Gathered, page: Gathered) -> Gathered:
    """What a page gave, after what the pages before it gave."""
    out, largest, denominator = so_far
    gathered, high, total = page
    top = np.maximum(largest, high)
    before, here = exp(np.array([largest - top, high - top], F32))
    denominator = fma(np.array([denominator]), before, total * here)[0]
    return fma(out, before, gathered * here), top, denominator


def route(routing: str, top: int, scores: Floats) -> Floats:
    """Weights (tokens, experts) of the `top` scores, of equal ones the lower; -1 for the others.

    e^(score - largest) over its sum, over all experts or the chosen ones, in ascending order.
    """
    if routing == "sigmoid":
        return F32(1) / (F32(1) + exp(F32(0) - scores))
    p = exp(scores - scores.max(axis=1, keepdims=True))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    chosen = np.zeros(p.shape, bool)
    np.put_along_axis(chosen, best, True, axis=1)
    summed = np.where(chosen, p, F32(0)) if routing == "chosen" else p
    total = np.zeros(len(p), F32)
    for e in range(p.shape[1]):
        total = total + summed[:, e]
    return np.where(chosen, p / total[:, None], F32(-1))


def times(matrix: Matrix, x: Floats, planes: int) -> Floats:
    """(tokens, rows): what `linear` gives of numbers, or of their codes where there are planes."""
    if not planes:
        return dense(matrix, x)
    coded = quantize(x, planes)
    y = product(matrix, *coded)
    add_offsets(matrix, *coded, y)
    return y


def run_experts(
    op: Op, x: Floats | tuple[NDArray[np.int8], Floats], routes: Floats, target: Floats
) -> None:
    """target (tokens, hidden) += what each token's experts make, in ascending order."""
    for e in range(routes.shape[1]):
        rows = np.flatnonzero(routes[:, e] != -1)
        if not len(rows):
            continue
        gate_up = [part.matrix for part in op.parts[3 * e : 3 * e + 2]]
        if isinstance(x, tuple):
            mine = x[0][rows], x[1][rows]
            g, up = (product(m, *mine) for m in gate_up)
            add_offsets(gate_up[0], *mine, g)
            add_offsets(gate_up[1], *mine, up)
        else:
            g, up = (dense(m, x[rows]) for m in gate_up)
        y = times(op.parts[3 * e + 2].matrix, gate(op.gate, g, up), op.planes)
        target[rows] = target[rows] + routes[rows, e, None] * y


def best_of(logits: Floats, count: int) -> tuple[NDArray[np.int32], Floats]:
    """Ids and logits (rows, count) by descending logit, then ascending id; -1 if not finite."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :count].astype(np.int32)
    ids[~np.isfinite(logits).all(axis=1), 0] = -1
    return ids, np.take_along_axis(logits, np.maximum(ids, 0), 1)


class ReferenceProgram:
    """Interprets a program in numpy."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.slots: dict[int, Floats] = {}
        mixtures = [op for op in program.ops if op.kind == "experts"]
        self.order = {id(op): i for i, op in enumerate(mixtures)}
        self.taken = [np.zeros(len(op.parts) // 3, np.int64) for op in mixtures]

    def best(
        self, batch: Batch, arena: NDArray[np.uint8], count: int
    ) -> tuple[NDArray[np.int32], Floats]:
        """See Runnable."""
        return best_of(self.run(batch, arena), count)

    def slot(self, index: int, tokens: int) -> Floats:
        """See Runnable."""
        return self.slots[index][:tokens]

    def run(self, batch: Batch, arena: NDArray[np.uint8]) -> Floats:
        """Logits (wanted, vocabulary); the tokens' keys and values go to the arena's pages."""
        slots = self.slots = {}
        codes: dict[int, tuple[NDArray[np.int8], Floats]] = {}
        if (
            batch.tokens.min() < 0
            or batch.tokens.max() >= self.program.ops[0].parts[0].matrix.shape[0]
        ):
            raise KernelError("batch: token id is outside the vocabulary")
        logits = np.zeros((len(batch.wanted), self.program.vocabulary), F32)
        for op in self.program.ops:
            if op.kind == "gather" and not len(batch.wanted):
                break
            if op.kind == "prefetch":
                continue
            if op.kind == "restore":
                width = self.program.slots[op.target].width
                slots[op.target] = restore(*codes[op.source])[:, :width]
            elif op.kind == "quantize":
                codes[op.target] = quantize(slots[op.source], self.program.slots[op.target].planes)
            elif op.kind == "linear":
                self.linear(op, slots, codes, logits)
            elif op.kind == "rope_store":
                slots[op.source] = self.rope_store(op, slots[op.source], batch, arena)
            elif op.kind == "attend":
                slots[op.target] = self.attend(op, slots[op.source], batch, arena)
            elif op.kind == "route":
                slots[op.target] = route(op.routing, op.top, slots[op.source])
            elif op.kind == "experts":
                x = codes[op.source] if op.source in codes else slots[op.source]
                run_experts(op, x, slots[op.routes], slots[op.target])
                self.taken[self.order[id(op)]] += (slots[op.routes] != -1).sum(axis=0)
            else:
                slots[op.target] = self.simple(op, slots, batch)
        return logits

    def simple(self, op: Op, slots: dict[int, Floats], batch: Batch) -> Floats:
        """The operations that work on each token alone."""
        if op.kind == "embed":
            return embedding(op.parts[0].matrix, batch.tokens) * F32(op.number)
        x = slots[op.source]
        if op.kind == "norm":
            assert op.weight is not None
            y = rms_norm(x, op.weight, op.number)
            return slots[op.target] + y if op.add else y
        if op.kind == "gate":
            half = x.shape[1] // 2
            return gate(op.gate, x[:, :half], x[:, half:])
        return x[batch.wanted]

    def linear(
        self,
        op: Op,
        slots: dict[int, Floats],
        codes: dict[int, tuple[NDArray[np.int8], Floats]],
        logits: Floats,
    ) -> None:
        """Products of one input with each part's matrix."""
        coded = self.program.slots[op.source].planes > 0
        tokens = len(codes[op.source][1]) if coded else len(slots[op.source])
        if op.target != LOGITS and op.target not in slots:
            slots[op.target] = np.zeros((tokens, self.program.slots[op.target].width), F32)
        target = logits if op.target == LOGITS else slots[op.target]
        if len(target) != tokens:
            target = slots[op.target] = np.zeros((tokens, target.shape[1]), F32)
        for part in op.parts:
            rows = part.matrix.shape[0]
            y = (
                product(part.matrix, *codes[op.source])
                if coded
                else dense(part.matrix, slots[op.source])
            )
            if part.bias is not None:
                y = y + part.bias[:rows]
            at = slice(part.column, part.column + rows)
            target[:, at] = target[:, at] + y if op.add else y
            if part.matrix.scheme.has_offset:
                add_offsets(part.matrix, *codes[op.source], target[:, at])
            target[:, at] = soft_cap(target[:, at], op.cap)

    def head_rows(
        self, arena: NDArray[np.uint8], page: int, layer: int, head: int, held: bool
    ) -> tuple[NDArray[np.generic], Floats]:
        """Keys, or values when `held`, of one head as views of the arena.

        (256, stride) numbers, or codes as (panels, 256 / 4 or stride / 4, 16, 4) tiles; and
        (256,) scales of codes.
        """
        shape = self.program.cache
        size = shape.page_bytes // (shape.layers * 2 * shape.kv_heads)
        at = page * shape.page_bytes + ((layer * 2 + held) * shape.kv_heads + head) * size
        part = arena[at : at + size]
        if shape.kind != "int8":
            return part.view("<f4" if shape.kind == "f32" else "<f2").reshape(PAGE, -1), pad(
                np.zeros(0, F32), 1
            )
        codes, scales = part[: PAGE * shape.stride].view(np.int8), part[PAGE * shape.stride :]
        quads = (PAGE if held else shape.stride) // 4
        return codes.reshape(-1, quads, PANEL, 4), scales.view("<f4")

    def rope_store(self, op: Op, x: Floats, batch: Batch, arena: NDArray[np.uint8]) -> Floats:
        """[q | k | v] with q rotated; keys, rotated, and values are stored."""
        shape, heads = self.program.cache, self.program.heads
        parts = x.reshape(len(x), -1, shape.head_dim).copy()  # (tokens, heads, head_dim)
        angle = batch.positions.astype(F32)[:, None] * self.program.inverse_frequency
        sine, cosine = sine_cosine(angle)
        turned = heads + shape.kv_heads
        queries = heads * shape.head_dim
        if op.weight is not None and len(op.weight) != 2 * shape.stride:  # of all heads together
            flat = parts.reshape(len(x), -1)
            edge, end = round_up(queries, PANEL), turned * shape.head_dim
            flat[:, :queries] = rms_norm(flat[:, :queries], op.weight[:edge], op.number)
            flat[:, queries:end] = rms_norm(flat[:, queries:end], op.weight[edge:], op.number)
        elif op.weight is not None:
            of_query, of_key = op.weight.reshape(2, shape.stride)
            parts[:, :heads] = rms_norm(parts[:, :heads], of_query, op.number)
            parts[:, heads:turned] = rms_norm(parts[:, heads:turned], of_key, op.number)
        for_sinks = parts[:, :0]
        if op.sinks:
            angle = np.full((len(x), 1), op.sinks + op.window - 1, F32)
            turns = sine_cosine(angle * self.program.inverse_frequency)
            for_sinks = rotate(parts[:, :heads], turns[0][:, None], turns[1][:, None])
        parts[:, :turned] = rotate(parts[:, :turned], sine[:, None], cosine[:, None])
        stored = parts[:, heads : turned + shape.kv_heads].copy()
        if shape.kind == "int8":
            parts[:, :heads] = spread(parts[:, :heads], shape.rotation)
            for_sinks = spread(for_sinks, shape.rotation) if op.sinks else for_sinks
            stored[:, : shape.kv_heads] = spread(stored[:, : shape.kv_heads], shape.rotation)
        stored = pad(stored, PANEL)
        if shape.kind == "f16":
            stored = np.clip(stored, F32(-65504), F32(65504))
        for t, position in enumerate(batch.positions):
            page = int(batch.pages[batch.sequences[t], position // PAGE])
            for h in range(2 * shape.kv_heads):
                held = h >= shape.kv_heads
                rows, scales = self.head_rows(arena, page, op.layer, h % shape.kv_heads, held)
                at = position % PAGE
                if shape.kind != "int8":
                    rows[at] = stored[t, h]
                    continue
                whole, scale = quantize_runs(stored[t, h], 1)
                codes = np.clip(whole, -127, 127)
                scales[at] = scale
                if held:
                    rows[:, at // 4, :, at % 4] = codes.reshape(-1, PANEL)
                else:
                    rows[at // PANEL, :, at % PANEL] = codes.reshape(-1, 4)
        first, last = heads * shape.head_dim, (turned + shape.kv_heads) * shape.head_dim
        both = parts[:, :heads].reshape(len(x), -1), for_sinks.reshape(len(x), -1)
        return np.concatenate([both[0], x[:, first:last], both[1]], axis=1)

    def attend(self, op: Op, x: Floats, batch: Batch, arena: NDArray[np.uint8]) -> Floats:
        """(tokens, heads * head_dim): every query over what it sees of each page, then merged."""
        shape, heads = self.program.cache, self.program.heads
        share = heads // shape.kv_heads
        columns = x.reshape(len(x), -1, shape.head_dim)
        queries = pad(columns[:, :heads], PANEL)
        for_sinks = pad(columns[:, heads + 2 * shape.kv_heads :], PANEL)
        out = np.zeros((len(x), heads, shape.head_dim), F32)
        for t, position in enumerate(batch.positions):
            for h in range(heads):
                so_far: Gathered = (np.zeros(shape.stride, F32), F32(-np.inf), F32(0))
                everything = not op.window or (op.sinks and position < op.sinks + op.window)
                if op.sinks and not everything:
                    seen, page = slice(0, op.sinks), int(batch.pages[batch.sequences[t], 0])
                    so_far = merge(
                        so_far,
                        self.attend_page(op, for_sinks[t, h], arena, page, h // share, seen),
                    )
                for p in range(position // PAGE + 1):
                    behind = int(position) + 1 - p * PAGE
                    start, end = 0 if everything else max(0, behind - op.window), min(behind, PAGE)
                    if start >= end:
                        continue
                    page = int(batch.pages[batch.sequences[t], p])
                    seen = slice(start, end)
                    so_far = merge(
                        so_far, self.attend_page(op, queries[t, h], arena, page, h // share, seen)
                    )
                out[t, h] = so_far[0][: shape.head_dim] / so_far[2]
        return out.reshape(len(x), -1)

    def attend_page(
        self, op: Op, query: Floats, arena: NDArray[np.uint8], page: int, head: int, seen: slice
    ) -> Gathered:
        """One query over the seen positions of one page."""
        shape = self.program.cache
        keys, key_scale = self.head_rows(arena, page, op.layer, head, False)
        held, held_scale = self.head_rows(arena, page, op.layer, head, True)
        factor = F32(op.number) * (F32(1) / F32(shape.rotation))
        if shape.kind != "int8":
            numbers = keys[seen].astype(F32), held[seen].astype(F32)
            return attend_numbers(query * factor, *numbers, seen.start, op.cap)
        key_codes = keys.transpose(0, 2, 1, 3).reshape(PAGE, shape.stride).view(np.int8)
        held_codes = held.transpose(1, 3, 0, 2).reshape(PAGE, shape.stride).view(np.int8)
        whole, scale = quantize_runs(query, 2)
        return attend_codes(
            (whole, scale * factor),
            (key_codes[seen], key_scale[seen]),
            (held_codes[seen], held_scale[seen]),
            seen.start,
            op.cap,
        )
