"""What /metrics says, by prometheus_client; each server has a registry of its own."""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from chalot.serve.served import Served

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
GAPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
COUNTS = {  # field of SchedulerStats -> what it is
    "prompt_tokens": "tokens of prompts that were let in",
    "cached_tokens": "of those, that were in the cache already",
    "new_tokens": "tokens that were generated",
    "read_tokens": "tokens that went through the model",
    "prefix_hits": "prompts whose beginning was in the cache",
    "preemptions": "answers that gave up their pages for a time",
    "drafted": "tokens that were drafted",
    "accepted": "drafted tokens that were kept",
    "passes": "forward passes",
    "pass_seconds": "seconds in forward passes",
    "cancelled": "answers whose client left, or that were cancelled",
    "failed": "answers that ended in an error",
}
LEVELS = {
    "waiting": "answers that wait for a slot",
    "running": "answers that are computed",
    "pages": "cache pages",
    "pages_used": "cache pages in use, those kept for later included",
    "prefix_pages": "cache pages kept for later",
}


class Scheduled:
    """The scheduler's counts, read when they are asked for."""

    def __init__(self, served: Served) -> None:
        self.served = served

    def collect(self) -> "list[CounterMetricFamily | GaugeMetricFamily]":
        """See prometheus_client."""
        stats = vars(self.served.scheduler.stats)
        out: list[CounterMetricFamily | GaugeMetricFamily] = [
            CounterMetricFamily(f"chalot_{name}", text, value=stats[name])
            for name, text in COUNTS.items()
        ]
        out += [
            GaugeMetricFamily(f"chalot_{name}", text, value=stats[name])
            for name, text in LEVELS.items()
        ]
        resident = self.served.resident_bytes
        out.append(GaugeMetricFamily("chalot_resident_bytes", "memory in use", value=resident))
        return out


class Clock:
    """When an answer's tokens came."""

    def __init__(self, metrics: "Metrics") -> None:
        self.metrics, self.before, self.tokens = metrics, time.perf_counter(), 0

    def token(self, is_one: bool) -> None:
        """A token came, or an end without one."""
        if not is_one:
            return
        now = time.perf_counter()
        target = self.metrics.gap if self.tokens else self.metrics.first
        target.observe(now - self.before)
        self.before, self.tokens = now, self.tokens + 1


class Metrics:
    """Counts of one server."""

    def __init__(self, served: Served) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(Scheduled(served))

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"chalot_{name}", text, labels, registry=self.registry)

        self.http = counter("http_requests", "HTTP requests", ("path", "status"))
        self.answers = counter("answers", "answers that ended, by how", ("finish",))
        self.asked = counter("answers_asked", "answers that were asked for")
        self.tokens_in = counter("tokens_in", "tokens of prompts that were accepted")
        self.first = Histogram(
            "chalot_first_token_seconds",
            "from a request to its first token",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.gap = Histogram(
            "chalot_token_gap_seconds",
            "between two tokens of an answer",
            buckets=GAPS,
            registry=self.registry,
        )

    def clock(self) -> Clock:
        """For an answer that begins now."""
        return Clock(self)

    def answered(self, path: str, status: int) -> None:
        """An HTTP request got the head of its response."""
        self.http.labels(path, str(status)).inc()

    def began(self, answers: int, tokens: int) -> None:
        """Answers were asked for."""
        self.asked.inc(answers)
        self.tokens_in.inc(tokens)

    def ended(self, finish: str) -> None:
        """An answer has ended."""
        self.answers.labels(finish).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        found: bytes = generate_latest(self.registry)
        return found
