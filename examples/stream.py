"""Text as it is generated, the same for the same seed.

python examples/stream.py MODEL.myai "Once upon a time"
"""

import sys

import chalot


def main(path: str, prompt: str) -> None:
    with chalot.load(path) as model:
        for piece in model.stream(prompt, max_tokens=40, seed=1):
            print(piece, end="", flush=True)
        print(f"\n{model.last_stats.new_tokens} tokens", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
