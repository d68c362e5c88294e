"""What passes cost on this machine: over several tokens, of the first layers, of a head alone."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from chalot.calibrate.depths import SHORT, Head, with_head
from chalot.engine.generate import Engine, Work
from chalot.kernels.backend import Runnable
from chalot.model.cache import Sequence
from chalot.model.pieces import Handover, Maker
from chalot.model.transformer import head_name

LENGTHS = (1, 2, 3, 5, 9, 17)  # tokens of a pass that are timed
BEHIND = 64  # tokens of context
ROUNDS = 20


@dataclass(frozen=True)
class Costs:
    """Seconds. A head's size is its name; the model's own is its vocabulary."""

    passes: Mapping[int, float]  # of all layers, by tokens
    head: Mapping[int, float]  # a pass of one token through no layers but the head
    layer: float

    def of_pass(self, tokens: int) -> float:
        """A pass of all layers over so many tokens, logits of all wanted."""
        return float(np.interp(tokens, list(self.passes), list(self.passes.values())))

    def draft(self, layers: int, head: int) -> float:
        """One drafted token."""
        return self.head[head] + layers * self.layer

    def said(self) -> dict[str, float]:
        """For people."""
        out = {f"pass over {n}": seconds for n, seconds in self.passes.items()}
        out |= {f"head of {n}": seconds for n, seconds in self.head.items()}
        return {name: round(s, 7) for name, s in (out | {"layer": self.layer}).items()}


def measure(engine: Engine, maker: Maker, heads: Mapping[int, Head], token: int) -> Costs:
    """Time them in turn, and take each one's least: what others do adds, and never takes away."""
    given, config = Handover(maker.config.hidden), maker.config
    some = range(max(1, config.layers // 2))
    jobs: dict[str, tuple[Runnable, list[int]]] = {
        **{f"pass {n}": (engine.runnable, [token] * n) for n in LENGTHS},
        "layers": (maker.piece(some, None, head_name(config)).runnable, [token]),
        f"head {config.vocabulary}": (
            maker.piece(range(0), given, head_name(config)).runnable,
            [0],  # row 0 of what is handed over
        ),
    }
    for n, head in heads.items():
        short = with_head(maker, head).piece(range(0), given, SHORT, head.size)
        jobs[f"head {n}"] = short.runnable, [0]
    times: dict[str, list[float]] = {name: [] for name in jobs}
    place = Sequence(engine.cache)
    try:
        engine.step([Work(place, [token] * BEHIND, "none")])
        for number in range(ROUNDS + 1):
            for name, (runnable, tokens) in jobs.items():
                runner = replace(engine, runnable=runnable)
                start = time.perf_counter()
                runner.best([Work(place, tokens, "all")], 1)
                if number:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
                place.truncate(BEHIND)
    finally:
        place.close()
    of = {name: min(found) for name, found in times.items()}
    head_of = {n: of[f"head {n}"] for n in (config.vocabulary, *heads)}
    layer = max(of["layers"] - head_of[config.vocabulary], 1e-9) / len(some)
    passes = np.maximum.accumulate([of[f"pass {n}"] for n in LENGTHS]).tolist()
    return Costs(dict(zip(LENGTHS, passes, strict=True)), head_of, layer)
