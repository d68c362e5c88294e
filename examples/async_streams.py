"""Several streams in one asyncio program; they share the model's forward passes.

python examples/async_streams.py MODEL.myai "The first prompt" "The second" ...
"""

import asyncio
import sys

import chalot


async def tell(model: chalot.Model, number: int, prompt: str) -> None:
    async for piece in model.astream(prompt, max_tokens=20, seed=number):
        print(f"{number}: {piece!r}")


async def main(path: str, prompts: list[str]) -> None:
    with chalot.load(path) as model:
        await asyncio.gather(*(tell(model, n, prompt) for n, prompt in enumerate(prompts)))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
