"""Many prompts at once: one call, the answers that each prompt would have got alone.

python examples/batch.py MODEL.myai "The first prompt" "The second" ...
"""

import sys

import chalot


def main(path: str, prompts: list[str]) -> None:
    with chalot.load(path) as model:
        answers = model.generate_batch(prompts, max_tokens=30, seed=7)
        for prompt, answer in zip(prompts, answers, strict=True):
            print(f"{prompt!r} -> {answer!r}")
        assert answers[0] == model.generate(prompts[0], max_tokens=30, seed=7)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
