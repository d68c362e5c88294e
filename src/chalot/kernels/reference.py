"""The numpy oracle: the same programs, bit for bit what native kernels give, far slower.

Sums of floats follow the one written order (docs/exactness.md): sixteen lanes of fma chains, then
a tree of lanes 8, 4, 2, 1 apart. fma is emulated in float64, rounding to odd where the sum is not
exact so that the final rounding to float32 happens once. Integer sums are exact in float32 because
a block of 128 products of int8 stays below 2^24.
"""

import math

import numpy as np
from numpy.typing import NDArray

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


def layer_norm(x: Floats, weight: Floats, bias: Floats, epsilon: float) -> Floats:
    """(x - mean(x)) / deviation * weight + bias over the last axis; both are padded to 16."""
    n = x.shape[-1]
    chunks = pad(x, PANEL).reshape(*x.shape[:-1], -1, PANEL)
    lanes = np.zeros((*x.shape[:-1], PANEL), F32)
    for k in range(chunks.shape[-2]):
        lanes = lanes + chunks[..., k, :]
    mean = tree(lanes) / F32(n)
    return rms_norm(x - mean[..., None], weight, epsilon) + bias[:n]


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
    if routing == "ones":
        return np.where(chosen, F32(1), F32(-1))
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


def best_of(logits: Floats, count: int) -> tuple[NDArray[np.int32], Floats]:
    """Ids and logits (rows, count) by descending logit, then ascending id; -1 if not finite."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :count].astype(np.int32)
    ids[~np.isfinite(logits).all(axis=1), 0] = -1
    return ids, np.take_along_axis(logits, np.maximum(ids, 0), 1)
