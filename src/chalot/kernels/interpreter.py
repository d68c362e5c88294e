"""Programs run by the numpy oracle, one operation after another (kernels/reference.py)."""

import numpy as np
from numpy.typing import NDArray

from chalot.errors import KernelError
from chalot.kernels.program import LOGITS, PAGE, Batch, Op, Program
from chalot.kernels.reference import (
    F32,
    Floats,
    Gathered,
    add_offsets,
    attend_codes,
    attend_numbers,
    best_of,
    dense,
    embedding,
    gate,
    layer_norm,
    merge,
    pad,
    product,
    quantize,
    quantize_runs,
    restore,
    rms_norm,
    rotate,
    route,
    sine_cosine,
    soft_cap,
    spread,
    times,
)
from chalot.quant.scheme import PANEL, round_up


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
            if op.bias is None:
                y = rms_norm(x, op.weight, op.number)
            else:
                y = layer_norm(x, op.weight, op.bias, op.number)
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
            at = np.full(len(x), op.sinks + op.window - 1)
            for_sinks = self.turned(op, parts[:, :heads], at)
        parts[:, :turned] = self.turned(op, parts[:, :turned], batch.positions)
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

    def turned(self, op: Op, x: Floats, positions: NDArray[np.integer]) -> Floats:
        """Heads (tokens, heads, head_dim) by the angles of their positions."""
        frequency, factor = self.program.inverse_frequency[op.rope], F32(self.program.rope_factor)
        sine, cosine = sine_cosine(positions.astype(F32)[:, None] * frequency)
        out, width = x.copy(), 2 * len(frequency)
        turns = (sine * factor)[:, None], (cosine * factor)[:, None]
        out[..., :width] = rotate(x[..., :width], *turns)
        return out

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
