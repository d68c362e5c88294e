"""The verb `bench`: how fast a model runs here, and how near that is to what memory allows.

A decoded token reads every weight once and every key and value of its text once, so

    share = (weight bytes + depth * cache bytes a token) / seconds a token / speed of a plain loop

says what is left to gain. The loop (native/read.cpp) runs on the same threads just before each
round, in large pages where the system grants them. Speeds are of the wall clock and include what
Python adds, the "host" time; a machine that does other things meanwhile gives other figures.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from chalot import __version__, machine
from chalot.engine.generate import Work
from chalot.errors import ContextError
from chalot.load import Model, load
from chalot.load.sessions import OpenSession
from chalot.mixture import mixture_report
from chalot.table import pairs, rows, size

DEPTHS = (32, 512, 4096)  # tokens; those that fit the model
TOKENS = 16  # decoded in a round
VERIFIED = 4  # tokens of the step that is held against a step of one
ROUNDS = 10
LONGEST = 10.0  # seconds that a figure's rounds may take; two are always made
LOADS = 3
READ_BYTES = 256 << 20  # more than a cache holds
PASSES = 3  # of the read loop, in a round
DISTURBED = 0.05  # share of the processors, from which on figures mean little
POWERCAP = Path("/sys/class/powercap")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Figure:
    """One value a round, with their median and their range."""

    median: float
    least: float
    greatest: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """From at least one value."""
        return cls(median(values), min(values), max(values), tuple(values))


@dataclass(frozen=True)
class AtDepth:
    """What a text of `depth` tokens costs. Shares are parts of 1."""

    depth: int
    prefill_tokens_per_second: Figure  # of reading all of it, from empty
    tokens_per_second: Figure  # of decoding after it
    bytes_per_token: int  # weights and cache
    cache_bytes_per_token: int  # keys and values that a decoded token reads
    read_gb_per_second: Figure  # of the plain loop
    share_of_read: Figure
    host_microseconds: Figure  # a decoded token, outside of the forward pass
    host_share: Figure
    joules_per_token: Figure | None = None


@dataclass(frozen=True)
class BenchReport:
    """All that was measured. `resident_bytes` is at the greatest depth, without a tokenizer."""

    model: str
    digest: str
    version: str
    kernels: str
    threads: int
    kv: str
    file_bytes: int
    weight_bytes_per_token: int
    load_seconds: Figure
    resident_bytes: int
    depths: tuple[AtDepth, ...]
    verified_tokens: int
    verify_ratio: Figure  # seconds of a step of so many tokens, all with logits, to those of one
    energy: str  # where joules come from, or why there are none
    others: float | None = None  # share of the processors that other processes took meanwhile
    stolen: float | None = None  # share that the host of a virtual machine gave to others

    @property
    def disturbed(self) -> str:
        """What took so much of the processors that the figures mean little; "" for nothing."""
        parts = []
        if (self.others or 0) > DISTURBED:
            parts.append(f"other processes took {self.others:.0%} of the processors")
        if (self.stolen or 0) > DISTURBED:
            parts.append(f"the host gave {self.stolen:.0%} of them to other machines")
        return " and ".join(parts)


class Energy:
    """The processor's packages by RAPL, in joules; other processes' work is in it."""

    def __init__(self, root: Path = POWERCAP) -> None:
        """`reason` is empty where the counters can be read."""
        zones = [z for z in sorted(root.glob("intel-rapl:*")) if z.name.count(":") == 1]
        self.zones: list[tuple[Path, int]] = []
        self.reason = "" if zones else f"{root} shows no energy counters"
        try:
            for zone in zones:
                if (zone / "name").read_text().startswith("package"):
                    limit = int((zone / "max_energy_range_uj").read_text())
                    int((zone / "energy_uj").read_text())
                    self.zones.append((zone / "energy_uj", limit))
        except (OSError, ValueError) as error:
            self.zones, self.reason = [], f"{root} cannot be read ({error})"
        if not self.zones and not self.reason:
            self.reason = f"{root} counts no processor package"

    def now(self) -> list[int]:
        """Microjoules of each package; the counters start again at their limits."""
        return [int(path.read_text()) for path, _ in self.zones]

    def since(self, before: list[int]) -> float | None:
        """Joules, or None where there are no counters."""
        if not self.zones:
            return None
        spent = zip(self.zones, self.now(), before, strict=True)
        return sum((now - then) % (limit + 1) for (_, limit), now, then in spent) / 1e6


class ReadLoop:
    """GB/s (10^9 bytes) of a plain read by the threads that compute."""

    def __init__(self, model: Model) -> None:
        free = machine.memory_available()
        self.read = model.backend.read
        count = READ_BYTES if free is None else min(READ_BYTES, free // 4)
        self.numbers = np.ones(max(1, count // 8), np.uint64)

    def measure(self) -> float:
        """The median of a few passes."""
        speeds = []
        for _ in range(PASSES):
            start = time.perf_counter()
            self.read(self.numbers)
            speeds.append(self.numbers.nbytes / (time.perf_counter() - start) / 1e9)
        return median(speeds)


class Held(NamedTuple):
    """A tensor of a file, as `mixture_report` looks at it."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    shares: str | None


def weight_bytes(model: Model) -> int:
    """Bytes of weights that a token reads: all, of an untied embedding a row, of experts some."""
    tensors, total, shared = [], 0, model.file.aliases
    for name, entry in model.file.manifest.tensors.items():
        lookup_only = name == "embedding" and not model.config.tied
        total += entry.extent.bytes // (entry.shape[0] if lookup_only else 1)
        tensors.append(Held(name, entry.shape, entry.extent.bytes, shared.get(name)))
    found = mixture_report(model.config, tensors)
    return total if found is None else found.token_bytes


def made_up_ids(model: Model, count: int) -> list[int]:
    """Token ids; time does not depend on which they are."""
    return [int(i) for i in np.arange(count) * 97 % model.config.vocabulary]


def rounds() -> Iterator[int]:
    """Round numbers: two at least, then until there are ROUNDS or LONGEST is over."""
    start = time.perf_counter()
    for number in range(ROUNDS):
        if number >= 2 and time.perf_counter() - start > LONGEST:
            return
        yield number


def chosen_depths(model_context: int, depths: Sequence[int] | None) -> tuple[int, ...]:
    """Ascending. Raises ContextError for a depth that leaves no room to decode."""
    room = model_context - TOKENS
    if depths is None:
        return tuple(d for d in DEPTHS if d <= room) or (max(1, room),)
    for depth in depths:
        if not 1 <= depth <= room:
            raise ContextError(
                f"--depths {depth}: expected 1 to {room}: the model holds {model_context} tokens, "
                f"and {TOKENS} are decoded"
            )
    return tuple(sorted(set(depths)))


def decode_round(session: OpenSession, loop: ReadLoop, energy: Energy) -> dict[str, float]:
    """TOKENS decoded after what the session holds: fields of AtDepth that differ by round."""
    stats, gb_per_second = session.stats, loop.measure()
    seconds, native, joules = stats.decode_seconds, stats.native_seconds, energy.now()
    for _ in range(TOKENS):
        session.step()
    used = energy.since(joules)
    seconds = stats.decode_seconds - seconds
    host = seconds - (stats.native_seconds - native)
    found = {
        "tokens_per_second": TOKENS / seconds,
        "read_gb_per_second": gb_per_second,
        "host_microseconds": host / TOKENS * 1e6,
        "host_share": host / seconds,
    }
    return found if used is None else found | {"joules_per_token": used / TOKENS}


def measure_depth(
    model: Model, session: OpenSession, depth: int, loop: ReadLoop, energy: Energy
) -> AtDepth:
    """Prefill from empty and decode, round by round; leaves `depth` tokens in the session."""
    ids, stats = made_up_ids(model, depth), session.stats
    cached = model.engine.cache.shape.position_bytes * depth
    touched = weight_bytes(model) + cached
    prefill, decode = [], []
    for _ in rounds():
        session.rewind(0)
        before = stats.prefill_seconds
        session.prefill(ids)
        prefill.append(depth / (stats.prefill_seconds - before))
    for _ in rounds():
        session.rewind(depth)
        decode.append(decode_round(session, loop, energy))
    session.rewind(depth)
    shares = [touched * r["tokens_per_second"] / 1e9 / r["read_gb_per_second"] for r in decode]
    figures = {name: Figure.of([r[name] for r in decode]) for name in decode[0]}
    return AtDepth(
        depth=depth,
        prefill_tokens_per_second=Figure.of(prefill),
        bytes_per_token=touched,
        cache_bytes_per_token=cached,
        share_of_read=Figure.of(shares),
        **figures,
    )


def measure_verify(model: Model, session: OpenSession) -> Figure:
    """Seconds of a step of VERIFIED tokens over those of a step of one, at the session's depth."""
    engine, sequence, ratios = model.engine, session.sequence, []
    depth = sequence.length

    def seconds(count: int) -> float:
        spent = []
        for _ in range(TOKENS // 2):
            before = engine.native_seconds
            engine.step([Work(sequence, made_up_ids(model, count), "all")])
            spent.append(engine.native_seconds - before)
            sequence.truncate(depth)
        return median(spent)

    for _ in rounds():
        one = seconds(1)
        ratios.append(seconds(VERIFIED) / one)
    return Figure.of(ratios)


def bench(
    path: str | Path,
    *,
    threads: int | None = None,
    depths: Sequence[int] | None = None,
    kv: str | None = None,
    progress: Progress = lambda *_: None,
) -> BenchReport:
    """Measure a `.myai` file: a minute or so for 0.5 billion weights on two cores.

    `depths` are in tokens (default: DEPTHS, as far as the model goes); `kv` is the type of cached
    keys and values. Raises ContextError, FormatError, KernelError.
    """
    options = {"threads": threads} | ({"kv": kv} if kv else {})
    with load(path, context=1, threads=threads) as model:
        wanted = chosen_depths(model.config.context, depths)
    options["context"] = wanted[-1] + TOKENS
    loads = []
    for _ in range(LOADS):
        start = time.perf_counter()
        with load(path, **options):
            loads.append(time.perf_counter() - start)
    energy, found, before = Energy(), [], machine.cpu_time()
    with load(path, **options) as model, model.session(temperature=0, draft=False) as session:
        loop = ReadLoop(model)
        session.prefill(made_up_ids(model, wanted[0]))  # brings every weight into memory
        for done, depth in enumerate(wanted):
            progress(f"at {depth} tokens", done, len(wanted) + 1)
            found.append(measure_depth(model, session, depth, loop, energy))
        resident = machine.resident_bytes() - loop.numbers.nbytes
        progress("several tokens a step", len(wanted), len(wanted) + 1)
        session.rewind(wanted[0])
        ratio = measure_verify(model, session)
        others, stolen = machine.others_share(before, machine.cpu_time()) or (None, None)
        return BenchReport(
            str(path),
            model.file.digest,
            __version__,
            model.backend.name,
            model.backend.threads,
            model.engine.cache.shape.kind,
            model.file.all_bytes,
            weight_bytes(model),
            Figure.of(loads),
            resident,
            tuple(found),
            VERIFIED,
            ratio,
            energy.reason or "processor packages, by RAPL; other processes' work is in it",
            others,
            stolen,
        )


# ---- as text


def shown(figure: Figure | None, form: str = "{:,.1f}", factor: float = 1) -> str:
    """Median and range."""
    if figure is None:
        return "-"
    values = (figure.median, figure.least, figure.greatest)
    middle, least, greatest = (form.format(value * factor) for value in values)
    return f"{middle} ({least}-{greatest})"


def render(report: BenchReport) -> str:
    """The report as text: facts, then a line for each depth."""
    facts = [
        ("model", f"{report.model}, {size(report.file_bytes)}"),
        ("kernels", f"{report.kernels} on {report.threads} threads"),
        ("cache", f"keys and values in {report.kv}"),
        ("weights", f"{size(report.weight_bytes_per_token)} read by each token"),
        ("load", f"{shown(report.load_seconds, factor=1e3)} ms"),
        ("resident", f"{size(report.resident_bytes)} with {report.depths[-1].depth:,} tokens"),
        (
            f"{report.verified_tokens} tokens a step",
            f"{shown(report.verify_ratio, '{:.2f}')} x the time of one",
        ),
        ("joules", report.energy),
    ]
    head = ["depth", "prefill tokens/s", "decode tokens/s", "MB/token", "read loop GB/s"]
    head += ["share of it", "host us", "host"]
    counted = any(d.joules_per_token for d in report.depths)
    table = [[*head, "J/token"] if counted else head]
    for d in report.depths:
        row = [
            f"{d.depth:,}",
            shown(d.prefill_tokens_per_second),
            shown(d.tokens_per_second),
            f"{d.bytes_per_token / 1e6:,.1f}",
            shown(d.read_gb_per_second),
            shown(d.share_of_read, "{:.0f}", 100) + " %",
            shown(d.host_microseconds, "{:.0f}"),
            f"{100 * d.host_share.median:.1f} %",
        ]
        table.append([*row, shown(d.joules_per_token, "{:.2f}")] if counted else row)
    note = (
        "Median (least-greatest) of rounds. MB/token has the keys and values of that depth; a\n"
        "model that fits in the processor's caches is not bound by memory."
    )
    if report.disturbed:
        facts.append(("disturbed", f"{report.disturbed}: measure again on an idle machine"))
    return f"{pairs(facts)}\n\n{rows(table)}\n{note}"
