"""`.myai` version 2, of an older tool: a header of sizes, then the tensors, where they must lie.

    embedding | layers | final norm | head;   a matrix is int8 rows, then a float32 scale for each
    layer: norm | q, k, v, their 3 x dim scales | o | norm | router | experts | depth router
    expert: int4 gate over up, a scale for each row and group | int8 down

All of it is little-endian. Nibbles are q + 8, the low one first. Whether a router and a depth
router are there, the file's length says: one arrangement must fit it exactly. What a version 2 file
cannot say is taken as a Llama's: no biases, as many key/value heads as heads, an epsilon of 1e-5, a
head of its own, rope by halves of a head. Experts that are all alike are one; others cannot be run.
A tokenizer.json in the file's folder is taken for its tokenizer.
"""

import json
import mmap
import os
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chalot.errors import FormatError, UnsupportedError
from chalot.formats.checkpoint import TensorInfo
from chalot.formats.documents import read_document
from chalot.formats.files import open_inside, quoted
from chalot.formats.names import hugging_face

MAGIC, VERSION, HEADER = 0x4D594149, 2, 256
SIZES = struct.Struct("<8I")  # magic, version, dim, hidden, layers, heads, vocabulary, flags
MORE = struct.Struct("<6I")  # at 128: experts, used of them, group, -, context, theta x 100
QUANTISED, INT4, EXPERTS, TERNARY = 1, 2, 4, 8
LARGEST = 1 << 24  # of a dimension; Python's integers do not overflow, and memory stays small
MOST_LAYERS, MOST_EXPERTS = 4096, 64
DEPTH_WIDTH = 32  # of the depth router's inner layer
EPSILON, THETA = 1e-5, 10000.0
TOKENIZER = "tokenizer.json"
MISSING = (
    "version 2 has no place for biases, key/value heads, the norms' epsilon, a tied embedding or a "
    "tokenizer; taken are none, one for each head, 1e-5, its own head, and "
)


class Sizes(NamedTuple):
    """The header's numbers, checked."""

    dim: int
    hidden: int
    layers: int
    heads: int
    vocabulary: int
    experts: int  # at least 1
    group: int
    context: int
    theta: float


class Place(NamedTuple):
    """A tensor: its shape, where its numbers begin, and its scales; `bits` 32 has none."""

    shape: tuple[int, ...]
    bits: int
    at: int
    scales_at: int = 0
    group: int = 0  # columns that share a scale; 0: the row

    @property
    def row(self) -> int:
        """Bytes of a row, or of a number of a vector."""
        return (self.shape[1] if len(self.shape) == 2 else 1) * self.bits // 8

    @property
    def scales(self) -> int:
        """Scales of a row."""
        return -(-self.shape[1] // self.group) if self.group else 1


class Arrangement:
    """Where each tensor lies; nowhere, if that would not be `expected` bytes with the header."""

    def __init__(self, sizes: Sizes, router: bool, depth: bool, expected: int) -> None:
        self.at = HEADER
        self.places: dict[str, Place] = {}
        self.experts: list[list[Place]] = []  # of each layer, "gate over up" and "down" in turn
        s = sizes
        self.places["embedding"] = self.rows(s.vocabulary, s.dim)
        before = self.at
        self.layer(s, "layers.0.", router, depth)
        rest = s.dim * 4 + s.vocabulary * (s.dim + 4)
        self.length = before + s.layers * (self.at - before) + rest
        if self.length != expected:  # before millions of tensors are noted
            return
        for i in range(1, s.layers):
            self.layer(s, f"layers.{i}.", router, depth)
        self.vector("final_norm", s.dim)
        self.places["head"] = self.rows(s.vocabulary, s.dim)

    def take(self, count: int) -> int:
        """Step over some bytes; where they began."""
        begin, self.at = self.at, self.at + count
        return begin

    def vector(self, name: str, size: int) -> None:
        self.places[name] = Place((size,), 32, self.take(size * 4))

    def rows(self, rows: int, columns: int) -> Place:
        """An int8 matrix, then a scale for each row."""
        return Place((rows, columns), 8, self.take(rows * columns), self.take(rows * 4))

    def layer(self, s: Sizes, p: str, router: bool, depth: bool) -> None:
        self.vector(p + "attention_norm", s.dim)
        shape = (s.dim, s.dim)
        begins = [self.take(s.dim * s.dim) for _ in range(3)]
        for name, at in zip(("query", "key", "value"), begins, strict=True):
            self.places[p + name] = Place(shape, 8, at, self.take(s.dim * 4))
        self.places[p + "output"] = self.rows(s.dim, s.dim)
        self.vector(p + "ffn_norm", s.dim)
        if router:
            self.take(s.experts * (s.dim + 1) * 4)
        experts: list[Place] = []
        for _ in range(s.experts):
            at, count = self.take(s.hidden * s.dim), -(-s.dim // s.group)  # two halves of a byte
            both = Place((2 * s.hidden, s.dim), 4, at, self.take(2 * s.hidden * count * 4), s.group)
            experts += [both, self.rows4(s.dim, s.hidden, s.group)]
        self.experts.append(experts)
        both, down = experts[:2]
        half = both._replace(shape=(s.hidden, s.dim))
        self.places[p + "gate"] = half
        self.places[p + "up"] = half._replace(
            at=both.at + s.hidden * half.row,
            scales_at=both.scales_at + s.hidden * half.scales * 4,
        )
        self.places[p + "down"] = down
        if depth:
            self.take((s.dim * DEPTH_WIDTH + 2 * DEPTH_WIDTH + 1) * 4)

    def rows4(self, rows: int, columns: int, group: int) -> Place:
        """An int4 matrix, then a scale for each row and group."""
        at = self.take(rows * columns // 2)
        return Place((rows, columns), 4, at, self.take(rows * -(-columns // group) * 4), group)


class MyaiV2:
    """A `Checkpoint` (see formats/checkpoint.py) in a `.myai` file of version 2."""

    def __init__(self, path: Path) -> None:
        """Raises FormatError for what contradicts itself, UnsupportedError for what cannot be run.

        Warns of what version 2 cannot hold.
        """
        self.path = path
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FormatError(f"{path}: cannot be opened ({reason})") from None
        self.folder = real.parent
        with open_inside(real.parent, real.name) as file:
            status = os.fstat(file.fileno())
            self.size = status.st_size
            if self.size < HEADER:
                raise FormatError(f"{path}: found {self.size} bytes, expected {HEADER}; truncated?")
            self.sizes = parse_header(file.read(HEADER), path)
            self._stamp = (status.st_size, status.st_mtime_ns)
            self._data = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        body = self._arrangement()
        self._places = {hugging_face(n): place for n, place in body.places.items()}
        self._check_experts(body)
        self.has_tokenizer = (real.parent / TOKENIZER).is_file()
        text = "token ids only, unless a tokenizer.json is put beside it"
        if self.has_tokenizer:
            text = f"the tokenizer in {real.parent / TOKENIZER}"
        warnings.warn(f"{path}: {MISSING}{text}", stacklevel=2)

    def _arrangement(self) -> Arrangement:
        """The one arrangement that is as long as the file."""
        ways = [(True, False), (True, True)]
        if self.sizes.experts == 1:
            ways += [(False, False), (False, True)]
        lengths = []
        for router, depth in ways:
            body = Arrangement(self.sizes, router, depth, self.size)
            if body.length == self.size:
                return body
            lengths.append(body.length)
        asked = " or ".join(f"{n:,}" for n in sorted(lengths))
        raise FormatError(
            f"{self.path}: found {self.size:,} bytes, its header asks for {asked}; truncated, or "
            "another kind of version 2"
        )

    def _check_experts(self, body: Arrangement) -> None:
        """Raise UnsupportedError unless all experts of each layer are the same bytes."""
        for i, experts in enumerate(body.experts):
            for n, place in enumerate(experts[2:], 2):
                for ours, theirs in zip(_runs(experts[n % 2]), _runs(place), strict=True):
                    if self._data[ours] != self._data[theirs]:
                        raise UnsupportedError(
                            f"{self.path}: layer {i} has {self.sizes.experts} experts that differ; "
                            "a mixture of experts cannot be run yet, only copies of one"
                        )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the dense model by Hugging Face's name."""
        out = {}
        for name, p in self._places.items():
            nbytes = p.shape[0] * (p.row + (p.scales * 4 if p.bits < 32 else 0))
            dtype, scheme = {32: ("f32", ""), 8: ("int8", "int8"), 4: ("int4", "int4")}[p.bits]
            out[name] = TensorInfo(name, dtype, p.shape, nbytes, scheme)
        return MappingProxyType(out)

    def float32(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """See Checkpoint."""
        place = self._places.get(name)
        if place is None:
            raise FormatError(f"{self.path}: has no tensor {quoted(name)}")
        last = place.shape[0] if last is None else last
        if not 0 <= first <= last <= place.shape[0]:
            raise IndexError(f"{name}: rows {first}:{last} of {place.shape[0]}")
        stored = self._bytes(place.at + first * place.row, (last - first) * place.row)
        if place.bits == 32:
            return stored.view("<f4").astype(np.float32)
        each = place.scales * 4
        scales = self._bytes(place.scales_at + first * each, (last - first) * each).view("<f4")
        columns = place.shape[1]
        if place.bits == 8:
            codes = stored.view(np.int8)
        else:
            codes = np.stack([stored & 15, stored >> 4], axis=1).view(np.int8) - np.int8(8)
        numbers = codes.reshape(last - first, columns).astype(np.float32)
        by_column = scales.reshape(last - first, -1)
        if place.group:
            by_column = np.repeat(by_column, place.group, axis=1)[:, :columns]
        with np.errstate(invalid="ignore", over="ignore"):
            numbers *= by_column
        return numbers

    def _bytes(self, begin: int, count: int) -> NDArray[np.uint8]:
        """A copy of bytes of the file, whose length is looked at first."""
        if self._data.closed:
            raise FormatError(f"{self.path}: is closed; open it again")
        self.check_unchanged()
        return np.frombuffer(self._data[begin : begin + count], np.uint8)

    def raw(self, name: str) -> NDArray[Any]:
        """The whole tensor as float32."""
        return self.float32(name)

    def document(self, name: str) -> bytes | None:
        """config.json, made of the header; others from the file's folder, if they are there."""
        if name != "config.json":
            return read_document(self.folder, name) if self.has_tokenizer else None
        s = self.sizes
        config = {
            "model_type": "llama",
            "hidden_size": s.dim,
            "intermediate_size": s.hidden,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.heads,
            "vocab_size": s.vocabulary,
            "max_position_embeddings": s.context,
            "rms_norm_eps": EPSILON,
            "rope_theta": s.theta,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
        }
        return json.dumps(config).encode()

    def check_unchanged(self) -> None:
        """Raise FormatError if the file changed size or date since it was opened."""
        try:
            found = self.path.stat()
        except OSError as error:
            raise FormatError(f"{self.path}: is gone ({error.strerror}); start again") from None
        if (found.st_size, found.st_mtime_ns) != self._stamp:
            raise FormatError(f"{self.path}: changed since it was opened; start again")

    def close(self) -> None:
        """Give back the file."""
        self._data.close()


def parse_header(header: bytes, where: object) -> Sizes:
    """The sizes in the first 256 bytes. Raises FormatError or UnsupportedError."""
    magic, version, dim, hidden, layers, heads, vocabulary, flags = SIZES.unpack_from(header)
    if (magic, version) != (MAGIC, VERSION):
        raise FormatError(f"{where}: is no .myai file of version 2")
    experts, _, group, _, context, theta = MORE.unpack_from(header, 128)
    if flags & ~15 or flags & TERNARY or not flags & QUANTISED or not flags & INT4:
        raise UnsupportedError(
            f"{where}: flags {flags:#x}; of version 2 chalot reads int8 with int4 experts, "
            f"{QUANTISED | INT4:#x} or {QUANTISED | INT4 | EXPERTS:#x}"
        )
    for name, value, most in (
        ("dim", dim, LARGEST),
        ("hidden_dim", hidden, LARGEST),
        ("n_layers", layers, MOST_LAYERS),
        ("n_heads", heads, LARGEST),
        ("vocab_size", vocabulary, LARGEST),
        ("max_seq_len", context, LARGEST),
        ("int4 group", group, LARGEST),
    ):
        if not 1 <= value <= most:
            raise FormatError(f"{where}: {name} is {value}; expected 1 to {most:,}")
    if experts > MOST_EXPERTS:
        raise FormatError(f"{where}: {experts} experts; expected at most {MOST_EXPERTS}")
    if dim % heads or dim // heads % 2 or dim % 2 or hidden % 2:
        raise FormatError(
            f"{where}: dim {dim}, hidden_dim {hidden}, {heads} heads; expected even sizes, and "
            "heads that share dim evenly"
        )
    base = theta / 100 if theta else THETA
    return Sizes(
        *(dim, hidden, layers, heads, vocabulary, max(experts, 1), group, context, float(base))
    )


def _runs(place: Place, size: int = 1 << 24) -> Iterator[slice]:
    """The bytes of a tensor and its scales, some at a time."""
    rows = place.shape[0]
    for at, count in ((place.at, rows * place.row), (place.scales_at, rows * place.scales * 4)):
        for begin in range(at, at + count, size):
            yield slice(begin, min(begin + size, at + count))
