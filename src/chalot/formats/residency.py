"""Where a file's bytes are: asked for ahead of their use, or pinned.

A file that is not in memory is read by page faults, each of which waits. `read_ahead` asks for its
extents in the order in which a forward pass reads them, from a thread, as soon as the file is open:
checking the tensors and the first forward pass then follow the disk. It asks for nothing that is
there already, and for nothing at all of a file larger than the memory that is free, where later
layers would drive out the ones that come first.

Prefetching a few layers ahead of each forward pass, in native code, was tried as well, and lost
(docs/log.md).
"""

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterable

from chalot import machine
from chalot.errors import LimitError, UnsupportedError
from chalot.formats.myai import MyaiFile
from chalot.formats.myai.manifest import Extent
from chalot.quant.packing import ALIGNMENT

Run = tuple[int, int]  # first byte, and the one behind the last
PAGE_SIZE = mmap.PAGESIZE
PIECE = 4 << 20  # bytes, of which the middle one tells whether they are in memory


def is_in_memory(descriptor: int, offset: int) -> bool:
    """Whether a byte can be had without waiting; False where the system does not say."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except (AttributeError, OSError):
        return False


def read_ahead(file: MyaiFile) -> threading.Thread | None:
    """Start to read a mapped file that is not in memory; None where there is no use or way."""
    free = machine.memory_available()
    if not hasattr(os, "posix_fadvise") or (free is not None and file.all_bytes > free):
        return None
    files = [f for f in (file, file.other) if f is not None]
    descriptors = {f: os.dup(f.descriptor) for f in files}  # they may be closed meanwhile
    extents = [entry.extent for entry in file.manifest.tensors.values()]
    places = [(*file.home(extent), extent.bytes) for extent in extents]

    def ask() -> None:
        try:
            for home, start, count in places:
                for at in range(start, start + count, PIECE):
                    size = min(PIECE, start + count - at)
                    if not is_in_memory(descriptors[home], at + size // 2):
                        os.posix_fadvise(descriptors[home], at, size, os.POSIX_FADV_WILLNEED)
        except OSError:  # a hint: page faults read what this does not
            pass
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)

    thread = threading.Thread(target=ask, name="read ahead", daemon=True)
    thread.start()
    return thread


def lock(file: MyaiFile, runs: Iterable[Run] | None = None, option: str = "--mlock") -> None:
    """Keep a file's bytes, or some runs of them, in memory until it is closed.

    Raises LimitError where that is refused; the `option` that asked for it is named.
    """
    if sys.platform == "win32":
        raise UnsupportedError(f"{file.path}: {option} is not known on Windows; leave it out")
    import resource

    library = ctypes.CDLL(None, use_errno=True)
    wanted = [(0, file.size)] if runs is None else list(runs)
    spans = [(address(file, start), end - start) for start, end in wanted]
    if runs is None:
        elsewhere = (file.view(e) for _, e in file.extents() if e.elsewhere)
        spans += [(int(view.ctypes.data), view.size) for view in elsewhere]
    for start, count in spans:
        begin = start // PAGE_SIZE * PAGE_SIZE
        if library.mlock(ctypes.c_void_p(begin), ctypes.c_size_t(start + count - begin)):
            reason = os.strerror(ctypes.get_errno())
            allowed = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            limit = "any number" if allowed == resource.RLIM_INFINITY else f"{allowed:,}"
            count = sum(count for _, count in spans)
            raise LimitError(
                f"{file.path}: {count:,} bytes cannot be locked in memory ({reason}); the system "
                f"lets this process lock {limit}: raise that (ulimit -l), or leave out {option}"
            )


def address(file: MyaiFile, offset: int) -> int:
    """Where a byte of the file lies in memory."""
    return int(file.data.ctypes.data) + offset


def runs_of(extents: Iterable[Extent]) -> list[Run]:
    """The bytes of extents, (start, end), in order; those that all but touch are one."""
    out: list[Run] = []
    for start, end in sorted((e.offset, e.offset + e.bytes) for e in extents if not e.elsewhere):
        if out and start - out[-1][1] < ALIGNMENT:
            out[-1] = out[-1][0], max(out[-1][1], end)  # one extent may be two tensors
        else:
            out.append((start, end))
    return out
