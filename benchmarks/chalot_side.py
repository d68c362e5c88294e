"""chalot as a side of the decode benchmark: the only file here that knows chalot's Python names.

    python -m chalot_side convert FOLDER OUT.myai nl4     (in benchmarks/)
    python -m chalot_side serve MODEL.myai --threads 2 --context 64

A token's time is the native step alone; what Python adds around it is given beside it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import chalot
from worker import Message, serve


def weights_read(model: chalot.Model) -> int | None:
    """Bytes of weights that one token reads, as chalot itself counts them."""
    return getattr(model, "bytes_per_token", None)


def decoder(model: chalot.Model) -> Callable[[Message], Message]:
    def answer(request: Message) -> Message:
        session = model.session()
        session.prefill(request["prompt"])
        native, host = [], []
        begin = time.perf_counter()
        # Greedy ids, not the request's: which rows of the embedding are read costs nothing.
        for _ in request["tokens"]:
            start = time.perf_counter()
            session.step()
            seconds = time.perf_counter() - start
            native.append(model.last_stats.native_seconds)
            host.append(seconds - native[-1])
        wall = time.perf_counter() - begin
        return {"seconds": native, "host_seconds": host, "wall_seconds": wall}

    return answer


def start(arguments: argparse.Namespace) -> tuple[Message, Callable[[Message], Message]]:
    model = chalot.load(arguments.model, threads=arguments.threads, context=arguments.context)
    ready = {
        "version": f"chalot {chalot.__version__}",
        "system_info": getattr(model, "kernels", None),
        "file_bytes": arguments.model.stat().st_size,
        "bytes_per_token": weights_read(model),
    }
    return ready, decoder(model)


def main() -> None:
    parser = argparse.ArgumentParser(description="chalot: convert, or decode on request.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    converting = verbs.add_parser("convert")
    converting.add_argument("folder", type=Path)
    converting.add_argument("out", type=Path)
    converting.add_argument("scheme")
    serving = verbs.add_parser("serve")
    serving.add_argument("model", type=Path)
    serving.add_argument("--threads", type=int, default=2)
    serving.add_argument("--context", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.verb == "convert":
        chalot.convert(arguments.folder, arguments.out, scheme=arguments.scheme)
    else:
        serve(lambda: start(arguments))


if __name__ == "__main__":
    main()
