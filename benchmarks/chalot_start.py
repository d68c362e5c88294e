"""chalot from process start to a first token, for startup.py.

    python chalot_start.py MODEL.myai PROMPT THREADS CONTEXT FILL

Says on stdout, in JSON, as soon as it has the first token, how long the imports took; then, if FILL
is not 0, what is resident after so many tokens.
"""

import time

BEGIN = time.perf_counter()
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from chalot.load import load  # noqa: E402

IMPORTED = time.perf_counter()


def resident() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024


def main() -> None:
    path, prompt, threads, size, fill = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    with load(path, threads=threads, context=size) as model:
        model.generate(prompt, max_tokens=1, temperature=0)
        ended = time.perf_counter()
        said = {"imports": IMPORTED - BEGIN, "after_imports": ended - IMPORTED}
        print(json.dumps(said), flush=True)
        if fill:
            with model.session(temperature=0, draft=False) as session:
                session.prefill([n * 7919 % 1000 for n in range(fill - 1)])
                session.step()
                session.step()
                print(json.dumps({"resident": resident()}), flush=True)


if __name__ == "__main__":
    main()
