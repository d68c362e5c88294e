"""The members of a zip file that may be hostile: listed, checked, and read at any offset.

Of the format no more is read than numpy writes: members that are stored or deflated, zip64 too.
The listing is bounded, members may not overlap (as in the quine-like bombs), and a size that no
deflated data of that length can reach is refused. A deflated member is a stream; states of the
decompressor kept on the way let it be read from the middle. Checksums are compared once a member
has been read whole, from its first byte on. Format: PKWARE APPNOTE 6.3.
"""

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from chalot.errors import FormatError, UnsupportedError
from chalot.formats.files import open_inside, quoted, read_at

LISTING = 4 << 20  # most bytes of the central directory: some 40,000 arrays
RATIO = 1032  # of deflate, at most: 258 bytes from two bits
LOCAL = struct.Struct("<4s22x2H")  # signature, lengths of name and extra field
PIECE = 1 << 18  # compressed bytes at a time
STEP, MOST_STATES = 8 << 20, 64  # bytes between kept states of 50 kB each
OPEN_STREAMS = 8
BROKEN = (  # what zipfile raises on bytes that are no zip file
    *(zipfile.BadZipFile, struct.error, ValueError, IndexError, KeyError, EOFError, OverflowError),
    *(OSError, NotImplementedError, RuntimeError),
)


class Member(NamedTuple):
    """A member: where its bytes lie in the file, and how many they become."""

    name: str
    offset: int
    compressed: int
    size: int
    deflated: bool
    crc: int


class _Listing:
    """The file as `zipfile` sees it while it reads the listing, and no more than that."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.left = LISTING + (1 << 18)  # the end of a file is searched for its last record
        self.seekable, self.seek, self.tell = file.seekable, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"its listing has more than {LISTING:,} bytes")
        return data


class ZipMembers:
    """An opened zip file. Raises FormatError for one that is damaged or hostile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open_inside(path.parent, path.name)
        try:
            self.size = os.fstat(self.file.fileno()).st_size
            self.members = self._list()
        except BaseException:
            self.close()
            raise
        self._streams: dict[str, _Inflated] = {}
        self._sums: dict[str, tuple[int, int]] = {}  # name -> bytes read in order, their checksum

    def _list(self) -> dict[str, Member]:
        try:
            listing: Any = _Listing(self.file)
            with zipfile.ZipFile(listing) as opened:
                entries = sorted(opened.infolist(), key=lambda entry: entry.header_offset)
                directory = opened.start_dir
        except BROKEN as error:
            raise FormatError(
                f"{self.path}: is no whole zip file ({quoted(str(error))}); truncated download?"
            ) from None
        found: dict[str, Member] = {}
        borders = [*(entry.header_offset for entry in entries), directory]
        for entry, after in zip(entries, borders[1:], strict=True):
            member = self._member(entry, after)
            if member.name in found:
                raise FormatError(f"{self.path}: {quoted(member.name)} is there twice")
            found[member.name] = member
        return found

    def _member(self, entry: zipfile.ZipInfo, after: int) -> Member:
        """A member that ends before the next one, or the listing, begins."""
        where = f"{self.path}: member {quoted(entry.filename)}"
        if entry.flag_bits & 1 or entry.compress_type not in (0, 8):
            raise UnsupportedError(f"{where}: is encrypted, or packed by another method than zlib")
        begin = entry.header_offset
        if not 0 <= begin <= self.size - LOCAL.size:
            raise FormatError(f"{where}: begins at {begin} of {self.size}; damaged download?")
        signature, name, extra = LOCAL.unpack(self.read(begin, LOCAL.size))
        offset = begin + LOCAL.size + name + extra
        if signature != b"PK\3\4" or offset + entry.compress_size > min(after, self.size):
            raise FormatError(
                f"{where}: {entry.compress_size:,} bytes at {offset:,} run into what follows at "
                f"{after:,}; damaged download, or a zip bomb"
            )
        deflated = entry.compress_type == 8
        most = entry.compress_size * RATIO if deflated else entry.compress_size
        if entry.file_size > most or (not deflated and entry.file_size != most):
            raise FormatError(
                f"{where}: {entry.file_size:,} bytes cannot come of the {entry.compress_size:,} "
                "that are stored; a zip bomb"
            )
        return Member(
            *(entry.filename, offset, entry.compress_size, entry.file_size, deflated, entry.CRC)
        )

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of the file."""
        return read_at(self.file, self.path, offset, size)

    def bytes_of(self, member: Member, offset: int, size: int) -> bytes:
        """`size` bytes of a member's content from `offset` on, fewer at its end."""
        size = max(0, min(size, member.size - offset))
        if not member.deflated:
            data = self.read(member.offset + offset, size)
        else:
            stream = self._streams.pop(member.name, None) or _Inflated(self, member)
            self._streams[member.name] = stream  # the last used, last
            if len(self._streams) > OPEN_STREAMS:
                del self._streams[next(iter(self._streams))]
            data = stream.read(offset, size)
        self._check(member, offset, data)
        return data

    def _check(self, member: Member, offset: int, data: bytes) -> None:
        done, crc = self._sums.get(member.name, (0, 0))
        if not offset <= done < offset + len(data):
            return
        crc = zlib.crc32(memoryview(data)[done - offset :], crc)
        done = offset + len(data)
        self._sums[member.name] = done, crc
        if done == member.size and crc != member.crc:
            raise FormatError(
                f"{self.path}: member {quoted(member.name)} has a wrong checksum; "
                "damaged, copy or download it again"
            )

    def close(self) -> None:
        """Give back the file."""
        self.file.close()


class _Inflated:
    """A deflated member as a run of bytes: forward as it comes, backward from a kept state."""

    def __init__(self, file: ZipMembers, member: Member) -> None:
        self.file = file
        self.member = member
        self.step = max(STEP, member.size // MOST_STATES)
        # bytes out, bytes in, the decompressor at that point
        self.states = [(0, 0, zlib.decompressobj(-zlib.MAX_WBITS))]
        self._resume(0)

    def _resume(self, offset: int) -> None:
        self.at, self.fed, state = max(
            (s for s in self.states if s[0] <= offset), key=lambda s: s[0]
        )
        self.state = state.copy()

    def read(self, offset: int, size: int) -> bytes:
        if not self.at <= offset < self.at + self.step:
            self._resume(offset)
        while self.at < offset:
            self._next(min(offset - self.at, PIECE))
        out = bytearray()
        while len(out) < size:
            out += self._next(size - len(out))
        return bytes(out)

    def _next(self, size: int) -> bytes:
        """At most `size` more bytes, at least one."""
        m = self.member
        given = self.file.read(
            m.offset + self.fed, min(PIECE, size + 1024, m.compressed - self.fed)
        )
        try:
            out = self.state.decompress(given, size)
        except zlib.error as error:
            raise self._broken(str(error)) from None
        used = len(given) - len(self.state.unconsumed_tail) - len(self.state.unused_data)
        if not out and (not used or self.state.eof):
            raise self._broken(f"it ends after {self.at:,} bytes")
        self.fed, self.at = self.fed + used, self.at + len(out)
        if self.at >= self.states[-1][0] + self.step and not self.state.eof:
            self.states.append((self.at, self.fed, self.state.copy()))
        return out

    def _broken(self, reason: str) -> FormatError:
        return FormatError(
            f"{self.file.path}: member {quoted(self.member.name)} cannot be unpacked ({reason}), "
            f"expected {self.member.size:,} bytes; damaged download?"
        )
