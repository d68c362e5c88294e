"""Three answers to one conversation, which differ by the number of the choice alone.

python examples/choices.py MODEL.myai "What is a prime number?"
"""

import sys

import chalot


def main(path: str, question: str) -> None:
    with chalot.load(path) as model:
        messages = [{"role": "user", "content": question}]
        for choice in range(3):
            print(choice, repr(model.chat(messages, max_tokens=20, seed=3, choice=choice)))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
