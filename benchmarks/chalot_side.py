"""chalot as a side of the benchmark: the only file here that knows chalot's Python names.

    python -m chalot_side make FOLDER OUT.myai nl4     (in benchmarks/)
    python -m chalot_side serve OUT.myai --threads 2 --context 64 --set kv f32

A step's time is the native call alone, the counterpart of llama_decode; what Python adds around
it (the batch, a greedy choice, the session) is given beside it.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable

import chalot
from chalot.bench import weight_bytes
from chalot.engine.generate import Work
from worker import Message, serve, side_arguments


def bytes_by_scheme(model: "chalot.Model") -> dict[str, int]:
    """Bytes of the file's tensors."""
    by_scheme: Counter[str] = Counter()
    for entry in model.file.manifest.tensors.values():
        by_scheme[entry.scheme] += entry.extent.bytes
    return dict(by_scheme)


class Decoder:
    """Answers requests; one session keeps the last prompt's keys and values."""

    def __init__(self, model: "chalot.Model") -> None:
        self.engine = model.engine
        self.session = model.session(temperature=0, repetition_penalty=1, draft=False)

    def timed(self, work: Callable[[], object]) -> tuple[float, float]:
        """Seconds in the native call, and the others."""
        native, start = self.engine.native_seconds, time.perf_counter()
        work()
        native, wall = self.engine.native_seconds - native, time.perf_counter() - start
        return native, wall - native

    def answer(self, request: Message) -> Message:
        session, prompt, prefill = self.session, request["prompt"], None
        if request["fresh"] or session.tokens[: len(prompt)] != prompt:
            session.rewind(0)
            prefill, _ = self.timed(lambda: session.prefill(prompt))
        session.rewind(len(prompt))
        tokens, step = request["tokens"], request["step"]
        if not tokens:
            return {"prefill_seconds": prefill, "seconds": []}
        session.step()  # reads the prompt's last token again
        if step == 1:
            # Its own greedy ids, not the request's: time does not depend on which they are.
            times = [self.timed(session.step) for _ in tokens]
        else:
            parts = [tokens[i : i + step] for i in range(0, len(tokens), step)]
            works = [[Work(session.sequence, part, "all")] for part in parts]
            times = [self.timed(lambda w=work: self.engine.step(w)) for work in works]
        native, host = map(list, zip(*times, strict=True))
        return {
            "prefill_seconds": prefill,
            "seconds": native,
            "host_seconds": host,
            "wall_seconds": sum(native) + sum(host),
        }


def start(arguments: argparse.Namespace) -> tuple[Message, Callable[[Message], Message]]:
    limits = {"threads": arguments.threads, "context": arguments.context}
    model = chalot.load(arguments.model, **limits, **dict(arguments.set))
    shape = model.engine.cache.shape
    ready = {
        "version": f"chalot {chalot.__version__}",
        "system_info": f"{model.backend.name}, {model.backend.threads} threads, {shape.kind} cache",
        "file_bytes": arguments.model.stat().st_size,
        "bytes_per_token": weight_bytes(model),
        "bytes_by_type": bytes_by_scheme(model),
        "cache_bytes_per_token": shape.position_bytes,
    }
    return ready, Decoder(model).answer


def main() -> None:
    arguments = side_arguments("chalot: convert, or answer requests.").parse_args()
    if arguments.verb == "make":
        chalot.convert(arguments.folder, arguments.out, scheme=arguments.form)
    else:
        serve(lambda: start(arguments))


if __name__ == "__main__":
    main()
