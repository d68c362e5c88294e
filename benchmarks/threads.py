#!/usr/bin/env python3
"""What more threads than cores cost: decoding with 1, 2 and 4 times as many, in turn.

    python benchmarks/threads.py MODEL.myai [--rounds 5] [--out FILE.jsonl]

The text is 64 made-up tokens; a figure is tokens a second of 8 decoded ones, median and range of
the rounds, and the ratio to as many threads as cores is of the same round.
"""

import argparse
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))

TOKENS = 8


def main() -> None:
    """Print a line for each count of threads, and append them all to --out."""
    import chalot
    from chalot.machine import default_threads
    from machine import describe_machine, provenance

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="a .jsonl file to append to")
    given = parser.parse_args()
    cores = default_threads()
    counts = [cores, 2 * cores, 4 * cores]
    speeds: dict[int, list[float]] = {count: [] for count in counts}
    with ExitStack() as open_models:
        sessions = {}
        for count in counts:
            model = open_models.enter_context(
                chalot.load(given.model, threads=count, context=64 + TOKENS * (given.rounds + 1))
            )
            sessions[count] = model.session(temperature=0, draft=False)
            sessions[count].prefill(list(range(64)))
        for _ in range(given.rounds):
            for count, session in sessions.items():
                start = time.perf_counter()
                for _ in range(TOKENS):
                    session.step()
                speeds[count].append(TOKENS / (time.perf_counter() - start))
        for session in sessions.values():
            session.close()
    rows = []
    for count, found in speeds.items():
        ratios = [a / b for a, b in zip(speeds[cores], found, strict=True)]
        rows.append({"threads": count, "tokens_per_second": found, "times_slower": ratios})
        print(
            f"{count:3} threads on {cores} cores: {median(found):7.1f} tokens/s "
            f"({min(found):.1f}-{max(found):.1f}), {median(ratios):.1f} times slower "
            f"({min(ratios):.1f}-{max(ratios):.1f})"
        )
    if given.out:
        made = provenance([Path(a).name for a in sys.argv[1:]], ("--out",))
        line = {"what": "threads", **made, "machine": describe_machine(), "rows": rows}
        with Path(given.out).open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
