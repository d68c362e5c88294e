"""What reading a hostile file may cost: a second of work, and 64 MB beside the file's own bytes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SECONDS = 1.0  # of the process's work: another one's load is not counted
MEMORY = 64 << 20  # bytes that are touched, by Python, numpy or native code
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Cost:
    """What something took."""

    seconds: float = 0.0
    memory: int = 0  # 0 where the system does not say

    def over(self, size: int) -> str | None:
        """What was too much for a file of `size` bytes."""
        if self.seconds > SECONDS:
            return f"took {self.seconds:.2f} s, expected {SECONDS} s at most"
        if self.memory > MEMORY + size:
            return (
                f"took {self.memory:,} bytes, expected {MEMORY:,} and the file's {size:,} at most"
            )
        return None


@contextmanager
def measured() -> Iterator[Cost]:
    """The cost of the block, known at its end."""
    cost = Cost()
    before = _resident("VmRSS")
    try:
        CLEAR.write_text("5")  # the high-water mark becomes what is resident now
    except OSError:
        before = 0
    start = time.process_time()
    try:
        yield cost
    finally:
        cost.seconds = time.process_time() - start
        cost.memory = max(_resident("VmHWM") - before, 0) if before else 0


def _resident(name: str) -> int:
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
