"""Codes to the one physical layout and back (docs/format.md, "Matrices").

A panel is 16 rows. Its codes are blocks of 128 columns (the last may be short, a multiple of 32),
each four groups of 32 columns followed, for schemes with levels, by 16 level bytes a group. Inside
a group the k-th 64 bytes hold rows k, 4 + k, 8 + k, 12 + k in four 16-byte lanes; a lane is one
row's 16 columns (8 bits) or 32 (4 bits, low nibble = columns 0..15). After all panels come the
segments, float16 (panels, segments, 16), then the row scales, float32. Each of the three parts
starts at a multiple of 64 bytes. Dense matrices are rows of numbers, padded to 16 columns.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError
from chalot.quant.codes import Codes
from chalot.quant.scheme import BLOCK, GROUP, PANEL, Scheme, round_up

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
        """Segments of a row."""
        return -(-round_up(self.columns, GROUP) // self.scheme.segment)

    @property
    def group_bytes(self) -> int:
        """One group of 32 columns of one panel, level bytes included."""
        return PANEL * GROUP * self.scheme.bits // 8 + (PANEL if self.scheme.has_levels else 0)

    @property
    def panel_bytes(self) -> int:
        """One panel's codes and levels."""
        return round_up(self.columns, GROUP) // GROUP * self.group_bytes

    @property
    def segments_at(self) -> int:
        """Offset of the segment factors."""
        return round_up(self.panels * self.panel_bytes, ALIGNMENT)

    @property
    def row_scale_at(self) -> int:
        """Offset of the row scales."""
        return self.segments_at + round_up(self.panels * self.segment_count * PANEL * 2, ALIGNMENT)

    @property
    def nbytes(self) -> int:
        """The whole extent."""
        return self.row_scale_at + self.panels * PANEL * 4


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
    segments = few.segment_count * PANEL * 2
    parts = ((0, 0, few.panel_bytes), (whole.segments_at, few.segments_at, segments))
    for source, target, size in (*parts, (whole.row_scale_at, few.row_scale_at, PANEL * 4)):
        taken = data[source + first * size :][: few.panels * size]
        out[target : target + taken.size] = taken
    return out


def stored_bytes(scheme: Scheme, rows: int, columns: int) -> int:
    """Bytes of a matrix in the file, without the alignment between extents."""
    if scheme.is_coded:
        return Layout(scheme, rows, columns).nbytes
    return rows * round_up(columns, PANEL) * DENSE[scheme.name].itemsize


def pack_groups(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(rows16, columns32) codes -> (panels, groups, bytes of a group without levels)."""
    panels, groups = codes.shape[0] // PANEL, codes.shape[1] // GROUP
    # row = 4 * lane + load; a group is one (4 bits) or two (8 bits) runs of four loads
    x = codes.reshape(panels, 4, 4, groups, 2, 16)  # panel, lane, load, group, half, column
    if bits == 4:
        nibbles = x[..., 0, :] | x[..., 1, :] << 4
        return np.ascontiguousarray(nibbles.transpose(0, 3, 2, 1, 4)).reshape(panels, groups, -1)
    return np.ascontiguousarray(x.transpose(0, 3, 4, 2, 1, 5)).reshape(panels, groups, -1)


def unpack_groups(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack_groups`."""
    panels, groups = packed.shape[:2]
    if bits == 4:
        x = packed.reshape(panels, groups, 4, 4, 16)  # panel, group, load, lane, byte
        both = np.stack([x & 15, x >> 4], axis=4)  # panel, group, load, lane, half, column
        order = (0, 3, 2, 1, 4, 5)
    else:
        both = packed.reshape(panels, groups, 2, 4, 4, 16)  # panel, group, half, load, lane, column
        order = (0, 4, 3, 1, 2, 5)
    return np.ascontiguousarray(both.transpose(order)).reshape(panels * PANEL, groups * GROUP)


def pack_panels(coded: Codes) -> NDArray[np.uint8]:
    """(panels, panel_bytes): codes and levels in blocks."""
    groups = pack_groups(coded.codes, coded.scheme.bits)
    if coded.levels is None:
        return groups.reshape(len(groups), -1)
    levels = coded.levels.reshape(len(groups), PANEL, -1).transpose(0, 2, 1)  # panel, group, row
    parts = []
    for g in range(0, groups.shape[1], BLOCK // GROUP):
        parts.append(groups[:, g : g + BLOCK // GROUP].reshape(len(groups), -1))
        parts.append(levels[:, g : g + BLOCK // GROUP].reshape(len(groups), -1))
    return np.concatenate(parts, axis=1)


def pack(coded: Codes) -> NDArray[np.uint8]:
    """The extent of a coded matrix: one run of bytes, as `Layout` describes it."""
    layout = Layout(coded.scheme, *coded.shape)
    out = aligned(layout.nbytes)
    panels = pack_panels(coded).reshape(-1)
    out[: panels.size] = panels
    segments = pack_segments(coded.segments)
    out[layout.segments_at : layout.segments_at + segments.size] = segments
    out[layout.row_scale_at :] = coded.row_scale.astype("<f4").view(np.uint8)
    return out


def pack_segments(segments: NDArray[np.float16]) -> NDArray[np.uint8]:
    """(rows16, segments) factors -> bytes of (panels, segments, 16)."""
    count = segments.shape[1]
    by_panel = segments.reshape(-1, PANEL, count).transpose(0, 2, 1)
    return np.ascontiguousarray(by_panel.astype("<f2")).reshape(-1).view(np.uint8)


def unpack(data: NDArray[np.uint8], scheme: Scheme, shape: tuple[int, int]) -> Codes:
    """Codes from an extent. Raises FormatError if it is not as long as its shape says."""
    layout = Layout(scheme, *shape)
    if data.size != layout.nbytes:
        raise FormatError(
            f"{scheme} matrix of {shape[0]} x {shape[1]}: extent has {data.size} bytes, "
            f"expected {layout.nbytes}; was it written by another version?"
        )
    panels = data[: layout.panels * layout.panel_bytes].reshape(layout.panels, layout.panel_bytes)
    groups = round_up(shape[1], GROUP) // GROUP
    codes_size = PANEL * GROUP * scheme.bits // 8
    levels = None
    if scheme.has_levels:
        code_parts, level_parts, at = [], [], 0
        for g in range(0, groups, BLOCK // GROUP):
            n = min(BLOCK // GROUP, groups - g)
            code_parts.append(panels[:, at : at + n * codes_size])
            level_parts.append(panels[:, at + n * codes_size : at + n * layout.group_bytes])
            at += n * layout.group_bytes
        panels = np.concatenate(code_parts, axis=1)
        by_group = np.concatenate(level_parts, axis=1).reshape(layout.panels, groups, PANEL)
        levels = by_group.transpose(0, 2, 1).reshape(layout.panels * PANEL, groups)
    codes = unpack_groups(panels.reshape(layout.panels, groups, codes_size), scheme.bits)
    count = layout.segment_count
    segments = data[layout.segments_at :][: layout.panels * count * PANEL * 2].view("<f2")
    by_row = segments.reshape(layout.panels, count, PANEL).transpose(0, 2, 1)
    row_scale = data[layout.row_scale_at :].view("<f4")
    return Codes(
        scheme, shape, codes, levels, by_row.reshape(layout.panels * PANEL, count), row_scale
    )
