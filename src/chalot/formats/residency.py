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
import os
import sys
import threading

from chalot import machine
from chalot.errors import LimitError, UnsupportedError
from chalot.formats.myai import MyaiFile

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
    if not hasattr(os, "posix_fadvise") or (free is not None and file.size > free):
        return None
    descriptor = os.dup(file.descriptor)  # the file may be closed meanwhile
    extents = [entry.extent for entry in file.manifest.tensors.values()]

    def ask() -> None:
        try:
            for extent in extents:
                for at in range(extent.offset, extent.offset + extent.bytes, PIECE):
                    size = min(PIECE, extent.offset + extent.bytes - at)
                    if not is_in_memory(descriptor, at + size // 2):
                        os.posix_fadvise(descriptor, at, size, os.POSIX_FADV_WILLNEED)
        except OSError:  # a hint: page faults read what this does not
            pass
        finally:
            os.close(descriptor)

    thread = threading.Thread(target=ask, name="read ahead", daemon=True)
    thread.start()
    return thread


def lock(file: MyaiFile) -> None:
    """Keep a file's bytes in memory until it is closed. Raises LimitError where that is refused."""
    if sys.platform == "win32":
        raise UnsupportedError(f"{file.path}: --mlock is not known on Windows; leave it out")
    import resource

    library = ctypes.CDLL(None, use_errno=True)
    if library.mlock(ctypes.c_void_p(file.data.ctypes.data), ctypes.c_size_t(file.size)):
        reason = os.strerror(ctypes.get_errno())
        allowed = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        limit = "any number" if allowed == resource.RLIM_INFINITY else f"{allowed:,}"
        raise LimitError(
            f"{file.path}: {file.size:,} bytes cannot be locked in memory ({reason}); the system "
            f"lets this process lock {limit}: raise that (ulimit -l), or leave out --mlock"
        )
