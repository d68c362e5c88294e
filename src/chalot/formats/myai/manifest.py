"""What a `.myai` file says of itself: its header and its manifest. Specified in docs/format.md.

The manifest is authoritative; the header, whose first fields lie where version 2 had them, must
agree with it.
"""

import struct
from typing import Any

import msgspec

MAGIC, VERSION, HEADER = 0x4D594149, 3, 256
MAX_MANIFEST = 64_000_000  # bytes
FIELDS = struct.Struct(
    "<8I"
)  # magic, version, hidden, feed-forward, layers, heads, vocabulary, flags
MORE = struct.Struct("<2I")  # at 32: key/value heads, head size
WHERE = struct.Struct("<3Q32s")  # at 64: manifest offset, manifest bytes, file bytes, sha256
OLDER = struct.Struct("<5IfI")  # at 128: experts, experts used, group, 0, context, -, theta x 100


class Extent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A run of bytes of the file, or, `elsewhere`, of the other one that it shares bytes with."""

    offset: int  # 0 elsewhere: there it is found by its checksum
    bytes: int
    sha256: str
    elsewhere: bool = False


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor: how it is stored, and the bits its activations are quantised to."""

    scheme: str
    shape: tuple[int, ...]
    extent: Extent
    activation: int = 8
    error: float | None = None  # relative squared error against the source


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file was made from."""

    name: str
    digest: str
    command: str
    version: str  # of chalot


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """All that is known of a file besides its extents."""

    format: int
    config: dict[str, Any]
    source: Source
    tensors: dict[str, TensorEntry]
    documents: dict[str, Extent]
    constants: dict[str, Extent]  # "tables.nl4", "rope.inverse_frequency"
    other: str = ""  # the file beside this one that holds what is elsewhere


def header_bytes(config: dict[str, Any], where: tuple[int, int, int, bytes]) -> bytes:
    """The 256 bytes in front. `where`: manifest offset, manifest bytes, file bytes, sha256."""
    out = bytearray(HEADER)
    sizes = ("hidden", "feed_forward", "layers", "heads", "vocabulary")
    FIELDS.pack_into(out, 0, MAGIC, VERSION, *(config[s] for s in sizes), 1)
    MORE.pack_into(out, 32, config["kv_heads"], config["head_dim"])
    WHERE.pack_into(out, 64, *where)
    if not isinstance(config["rope_theta"], (int, float)):  # a long text x 100 fills the memory
        raise TypeError("rope_theta is no number")
    theta = int(min(config["rope_theta"] * 100, 2**32 - 1))
    struct.pack_into("<3I", out, 128, 0, 0, 32)
    struct.pack_into("<2I", out, 144, config["context"], theta)
    return bytes(out)
