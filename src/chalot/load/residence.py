"""Which of a model's weights stay in memory: regions that are kept, and a budget for all.

`keep` locks the pages of regions (chalot.model.regions). `budget` is the most bytes of weights in
memory: what does not fit passes through, a layer at a time (formats/streaming.py). The file's other
parts, the cache and the process itself come on top; chalot.describe.memory says how much.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from chalot import machine
from chalot.errors import FormatError, RegionError
from chalot.formats.myai import MyaiFile
from chalot.formats.residency import Run, lock, runs_of
from chalot.formats.streaming import Plan, Stream, plan
from chalot.model.config import ModelConfig
from chalot.model.layers import layer_tensors
from chalot.model.regions import find_region
from chalot.model.transformer import head_name
from chalot.table import size


@dataclass(frozen=True)
class Resident:
    """What keeping and a budget come to. Bytes; faults and seconds are since the model was opened.

    `weights_bytes` is the most weights in memory at a time, `streamed_bytes` what a forward pass
    reads of those that pass through, `read_bytes` what was read so.
    """

    budget: int | None
    kept: tuple[str, ...]
    kept_bytes: int
    weights_bytes: int
    streamed_layers: int
    streamed_bytes: int
    read_ahead: bool
    read_bytes: int
    waited_seconds: float  # for weights that were not read yet
    major_faults: int
    minor_faults: int
    resident_bytes: int  # of the process, now
    peak_resident_bytes: int | None

    def __str__(self) -> str:
        """A line for people."""
        kept = f"{','.join(self.kept)} kept ({size(self.kept_bytes)}); " if self.kept else ""
        most = f" (at most {size(self.peak_resident_bytes)})" if self.peak_resident_bytes else ""
        return (
            f"{kept}at most {size(self.weights_bytes)} of weights in memory, "
            f"{size(self.streamed_bytes)} read for each pass; waited {self.waited_seconds:.2f} s; "
            f"{self.major_faults} page faults; the process has {size(self.resident_bytes)}{most}"
        )


class Residence:
    """Keeps and streams a mapped file's weights; `report` says what that took."""

    def __init__(
        self, file: MyaiFile, config: ModelConfig, keep: Iterable[str], budget: int | None
    ) -> None:
        """Lock what is kept. Raises RegionError, LimitError, FormatError, UnsupportedError."""
        self.file, self.config, self.budget = file, config, budget
        self.kept = tuple(dict.fromkeys(keep))
        if budget is not None or self.kept:
            file.refuse_elsewhere("--keep" if budget is None else "--budget")
        if budget is not None and not file.mapped:
            raise FormatError("--budget is for a mapped file; leave out --no-mmap")
        try:
            regions = [find_region(config.regions, name) for name in self.kept]
        except ValueError as error:
            raise RegionError(f"{file.path}: --keep: {error}") from None
        layers = sorted({layer for region in regions for layer in region.layers})
        self.units = [self._runs(s.name for s in layer_tensors(config, i)) for i in self.layers]
        self.units.append(self._runs([head_name(config)]))
        self.sizes = [sum(end - start for start, end in unit) for unit in self.units]
        self.kept_bytes = sum(self.sizes[i] for i in layers)
        self.plan: Plan | None = None
        if budget is not None:
            names = [f"layer {i}" for i in self.layers] + ["the head"]
            self.plan = plan(self.sizes, layers, budget, names)
        for i in layers:
            lock(file, self.units[i], f"--keep {','.join(self.kept)}")
        self.stream = None
        if self.plan is not None and self.plan.streamed:
            self.stream = Stream(file, self.units, self.plan)
        self.faults_before = page_faults()

    @property
    def layers(self) -> range:
        """All layers of the model."""
        return range(self.config.layers)

    def _runs(self, names: Iterable[str]) -> list[Run]:
        return runs_of(self.file.manifest.tensors[name].extent for name in names)

    @property
    def borders(self) -> list[int]:
        """Layers that a piece of the model must end before, so that what passes can be told."""
        if self.plan is None:
            return []
        passing = self.plan.streamed
        return [i for i in self.layers if i in passing or i - 1 in passing]

    def before_piece(self, pieces: Iterable[range]) -> Callable[[int], None]:
        """What to call before each piece; the head comes behind the last one."""
        firsts = [layers.start for layers in pieces]
        stream = self.stream
        assert stream is not None
        return lambda n: stream.before(firsts[n] if n < len(firsts) else self.config.layers)

    def looked_at(self, name: str) -> None:
        """A tensor has been checked: what passes through memory leaves it again."""
        if self.stream is None:
            return
        units: dict[str, int | None] = {"embedding": None, head_name(self.config): len(self.layers)}
        units |= {f"layers.{i}.": i for i in self.layers}
        begin = ".".join(name.split(".")[:2]) + "." if name.startswith("layers.") else name
        unit = units.get(begin)
        # an embedding that is no head: its rows are read by token
        if unit in self.stream.plan.streamed or (begin in units and unit is None):
            self.stream.drop(self._runs([name]))

    @property
    def asked(self) -> bool:
        """Whether anything is kept, or there is a budget."""
        return bool(self.kept) or self.budget is not None

    def report(self) -> Resident:
        """What it has come to so far."""
        major, minor = (a - b for a, b in zip(page_faults(), self.faults_before, strict=True))
        streamed = self.plan.streamed if self.plan else frozenset()
        return Resident(
            self.budget,
            self.kept,
            self.kept_bytes,
            self.plan.bytes if self.plan else sum(self.sizes),
            len(streamed - {self.config.layers}),
            sum(self.sizes[i] for i in streamed),
            self.plan.ahead if self.plan else False,
            self.stream.bytes_read if self.stream else 0,
            self.stream.waited if self.stream else 0.0,
            major,
            minor,
            machine.resident_bytes(),
            machine.peak_resident_bytes(),
        )

    def close(self) -> None:
        """End what runs in the background."""
        if self.stream is not None:
            self.stream.close()


def page_faults() -> tuple[int, int]:
    """(major, minor) of this process so far; zeros where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0, 0
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_majflt, found.ru_minflt
