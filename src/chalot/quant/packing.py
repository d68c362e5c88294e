"""Codes to the one physical layout and back (docs/format.md, "Matrices").

A panel is 16 rows. Its codes are blocks of 128 columns, each with its levels behind it, for schemes
that have levels: 16 bytes a group of 32 columns. How codes lie in a block's bytes is the scheme's
coding (quant/codings.py). Bytes and nibbles end a matrix with a short block of as many groups as
there are; the others with a whole one. After all panels come the segments, float16 (panels,
segments, 16), for schemes that have them, then the row scales, float32, then the row offsets. Each
part starts at a multiple of 64 bytes. Dense matrices are rows of numbers, padded to 16 columns.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, SchemeError
from chalot.quant.codes import Codes, quantize
from chalot.quant.codings import PACKERS, Bytes, flat
from chalot.quant.grids import tables_of
from chalot.quant.scheme import BLOCK, GROUP, PANEL, ROW, Scheme, round_up

ALIGNMENT = 64  # bytes: one cache line, one 512-bit register
DENSE: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "bf16": np.dtype("<u2"),
    "f16": np.dtype("<f2"),
}


@dataclass(frozen=True)
class Layout:
    """Where the parts of a coded matrix lie in its extent. Offsets and sizes are in bytes."""

    scheme: Scheme
    rows: int
    columns: int

    @property
    def panels(self) -> int:
        """Groups of 16 rows."""
        return -(-self.rows // PANEL)

    @property
    def segment_count(self) -> int:
        """Segments of a row; 0 where the row's scale is all there is."""
        if self.scheme.segment == ROW:
            return 0
        return -(-round_up(self.columns, GROUP) // self.scheme.segment)

    @property
    def blocks(self) -> list[int]:
        """Groups of each block of a panel, as stored."""
        groups, each = round_up(self.columns, GROUP) // GROUP, BLOCK // GROUP
        whole = self.scheme.coding is not None and self.scheme.coding.whole
        return [each if whole else min(each, groups - g) for g in range(0, groups, each)]

    @property
    def group_bytes(self) -> int:
        """Codes of one group of 32 columns of one panel; of a quarter of a whole block."""
        assert self.scheme.coding is not None
        return self.scheme.coding.block_bytes * GROUP // BLOCK

    @property
    def panel_bytes(self) -> int:
        """One panel's codes and levels."""
        return sum(self.blocks) * (self.group_bytes + (PANEL if self.scheme.has_levels else 0))

    @property
    def parts(self) -> tuple[slice, ...]:
        """Where panels, segments, row scales and, if there are any, row offsets lie."""
        sizes = [self.panel_bytes, self.segment_count * PANEL * 2, PANEL * 4]
        sizes += [PANEL * 4] if self.scheme.has_offset else []
        out, at = [], 0
        for size in sizes:
            at = round_up(at, ALIGNMENT)
            out.append(slice(at, at + self.panels * size))
            at += self.panels * size
        return tuple(out)

    @property
    def segments_at(self) -> int:
        """Offset of the segment factors."""
        return int(self.parts[1].start)

    @property
    def row_scale_at(self) -> int:
        """Offset of the row scales."""
        return int(self.parts[2].start)

    @property
    def nbytes(self) -> int:
        """The whole extent."""
        return int(self.parts[-1].stop)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A packed matrix (rows, columns): its extent of the file, and tables if the scheme has."""

    scheme: Scheme
    shape: tuple[int, int]
    data: NDArray[np.uint8]  # starts at a multiple of 64 bytes
    tables: NDArray[np.int8] | None = None  # (256, 16)


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed bytes that start at a multiple of 64, as matrices must."""
    raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    return raw[skip : skip + nbytes]


def pack_dense(weights: NDArray[np.float32], scheme: Scheme) -> NDArray[np.uint8]:
    """A float32 matrix as rows of numbers, padded to 16 columns; bf16 and f16 round to even."""
    rows, columns = weights.shape
    out = aligned(stored_bytes(scheme, rows, columns))
    stored = out.view(DENSE[scheme.name]).reshape(rows, -1)
    if scheme.name == "bf16":
        bits = np.ascontiguousarray(weights).view(np.uint32)
        halves = bits.view(np.uint16).reshape(rows, columns, 2)  # little-endian: low, high
        if halves[:, :, 0].any():
            stored[:, :columns] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        else:  # bf16 already
            stored[:, :columns] = halves[:, :, 1]
    else:
        stored[:, :columns] = weights
    return out


def numbers(matrix: Matrix) -> NDArray[np.float32]:
    """A dense matrix (rows, columns padded to 16) as float32."""
    stored = matrix.data.view(DENSE[matrix.scheme.name]).reshape(matrix.shape[0], -1)
    if matrix.scheme.name == "bf16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(stored, np.float32)


def take_panels(
    data: NDArray[np.uint8], whole: Layout, few: Layout, first: int = 0
) -> NDArray[np.uint8]:
    """The extent of some of a matrix's panels, from `first`, out of the extent of all."""
    out = aligned(few.nbytes)
    for to, of in zip(few.parts, whole.parts, strict=True):
        size = (to.stop - to.start) // few.panels  # of a panel
        taken = data[of.start + first * size : of.stop][: few.panels * size]
        out[to.start : to.start + taken.size] = taken
    return out


def take_rows(matrix: Matrix, rows: NDArray[np.int64]) -> Matrix:
    """Some rows of a matrix, in ascending order, with the very codes that they have there."""
    shape = (len(rows), matrix.shape[1])
    if not matrix.scheme.is_coded:
        data = aligned(stored_bytes(matrix.scheme, *shape))
        data.reshape(len(rows), -1)[:] = matrix.data.reshape(matrix.shape[0], -1)[rows]
        return Matrix(matrix.scheme, shape, data)
    whole, found = Layout(matrix.scheme, *matrix.shape), []
    at_once = PANEL * 256  # what unpacking takes stays small
    for first in range(0, matrix.shape[0], at_once):
        inside = rows[(rows >= first) & (rows < first + at_once)] - first
        if inside.size:
            size = min(at_once, matrix.shape[0] - first), matrix.shape[1]
            data = take_panels(matrix.data, whole, Layout(matrix.scheme, *size), first // PANEL)
            found.append((unpack(data, matrix.scheme, size), inside))

    def joined(part: str) -> NDArray[Any] | None:
        if getattr(found[0][0], part) is None:
            return None
        taken = np.concatenate([getattr(codes, part)[inside] for codes, inside in found])
        behind_it = [(0, -len(taken) % PANEL)] + [(0, 0)] * (taken.ndim - 1)
        return np.pad(taken, behind_it)

    parts: dict[str, Any] = {
        part: joined(part) for part in ("codes", "levels", "segments", "row_scale", "row_offset")
    }
    return Matrix(matrix.scheme, shape, pack(Codes(matrix.scheme, shape, **parts)), matrix.tables)


def stored_bytes(scheme: Scheme, rows: int, columns: int) -> int:
    """Bytes of a matrix in the file, without the alignment between extents."""
    if scheme.is_coded:
        return Layout(scheme, rows, columns).nbytes
    return rows * round_up(columns, PANEL) * DENSE[scheme.name].itemsize


def by_line(codes: Bytes) -> Bytes:
    """(rows16, columns) -> (panels, line, lane, sets, 16): row = 4 lane + line."""
    x = codes.reshape(-1, 4, 4, codes.shape[1] // 16, 16)
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3, 4))


def behind(x: Bytes, columns: int) -> Bytes:
    """(rows, columns) with zeros behind, or without what is."""
    return (
        x[:, :columns] if x.shape[1] >= columns else np.pad(x, [(0, 0), (0, columns - x.shape[1])])
    )


def pack_panels(coded: Codes) -> Bytes:
    """(panels, panel_bytes): codes and levels in blocks."""
    layout = Layout(coded.scheme, *coded.shape)
    assert coded.scheme.coding is not None
    pack_block = PACKERS[coded.scheme.coding][0]
    groups = sum(layout.blocks)
    x = by_line(behind(coded.codes, groups * GROUP))
    levels = None
    if coded.levels is not None:
        by_panel = behind(coded.levels, groups).reshape(layout.panels, PANEL, groups)
        levels = by_panel.transpose(0, 2, 1)  # panel, group, row
    parts, g = [], 0
    for n in layout.blocks:
        parts.append(pack_block(x[:, :, :, 2 * g : 2 * (g + n)]))
        if levels is not None:
            parts.append(flat(levels[:, g : g + n]))
        g += n
    return np.concatenate(parts, axis=1)


def pack(coded: Codes) -> Bytes:
    """The extent of a coded matrix: one run of bytes, as `Layout` describes it."""
    layout = Layout(coded.scheme, *coded.shape)
    out = aligned(layout.nbytes)
    stored = [pack_panels(coded).reshape(-1), np.zeros(0, np.uint8)]
    if layout.segment_count:
        stored[1] = pack_segments(coded.segments)
    for numbers_of_row in (coded.row_scale, coded.row_offset):
        if numbers_of_row is not None:
            stored.append(numbers_of_row.astype("<f4").view(np.uint8))
    for part, bytes_of_part in zip(layout.parts, stored, strict=True):
        out[part] = bytes_of_part
    return out


def as_matrix(weights: NDArray[np.float32], scheme: Scheme) -> Matrix:
    """A finite float32 matrix (rows, columns) in a scheme, as kernels read it.

    Coded schemes quantise it. Raises SchemeError where it has not two axes, an empty one, or
    numbers that are not finite.
    """
    w = np.asarray(weights, np.float32)
    if w.ndim != 2 or not w.size or not np.isfinite(w).all():
        raise SchemeError(
            f"found weights of shape {w.shape}, expected (rows, columns) of finite numbers"
        )
    shape = (w.shape[0], w.shape[1])
    if not scheme.is_coded:
        return Matrix(scheme, shape, pack_dense(np.ascontiguousarray(w), scheme))
    return Matrix(scheme, shape, pack(quantize(w, scheme)), tables_of(scheme))


def pack_segments(segments: NDArray[np.float16]) -> Bytes:
    """(rows16, segments) factors -> bytes of (panels, segments, 16)."""
    count = segments.shape[1]
    by_panel = segments.reshape(-1, PANEL, count).transpose(0, 2, 1)
    return np.ascontiguousarray(by_panel.astype("<f2")).reshape(-1).view(np.uint8)


def unpack_panels(panels: Bytes, layout: Layout) -> tuple[Bytes, Bytes | None]:
    """Codes (rows16, columns32) and levels (rows16, groups) of (panels, panel_bytes)."""
    scheme, columns = layout.scheme, round_up(layout.columns, GROUP)
    assert scheme.coding is not None
    unpack_block = PACKERS[scheme.coding][1]
    codes, levels, at = [], [], 0
    for n in layout.blocks:
        size = n * layout.group_bytes
        x = unpack_block(panels[:, at : at + size]).transpose(0, 2, 1, 3, 4)
        codes.append(np.ascontiguousarray(x).reshape(layout.panels * PANEL, -1))
        at += size
        if scheme.has_levels:
            by_group = panels[:, at : at + n * PANEL].reshape(-1, n, PANEL).transpose(0, 2, 1)
            levels.append(by_group.reshape(-1, n))
            at += n * PANEL
    whole = np.ascontiguousarray(np.concatenate(codes, axis=1)[:, :columns])
    if not scheme.has_levels:
        return whole, None
    return whole, np.ascontiguousarray(np.concatenate(levels, axis=1)[:, : columns // GROUP])


def unpack(data: Bytes, scheme: Scheme, shape: tuple[int, int]) -> Codes:
    """Codes from an extent. Raises FormatError if it is not as long as its shape says."""
    layout = Layout(scheme, *shape)
    if data.size != layout.nbytes:
        raise FormatError(
            f"{scheme} matrix of {shape[0]} x {shape[1]}: extent has {data.size} bytes, "
            f"expected {layout.nbytes}; was it written by another version?"
        )
    panels, factors, *of_rows = (data[part] for part in layout.parts)
    codes, levels = unpack_panels(panels.reshape(layout.panels, -1), layout)
    segments = np.ones((layout.panels * PANEL, 1), np.float16)
    if layout.segment_count:
        by_panel = factors.view("<f2").reshape(layout.panels, -1, PANEL).transpose(0, 2, 1)
        segments = by_panel.reshape(layout.panels * PANEL, -1)
    row_scale, *offset = (part.view("<f4") for part in of_rows)
    return Codes(scheme, shape, codes, levels, segments, row_scale, offset[0] if offset else None)
