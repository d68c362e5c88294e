"""Short names: what a user types, and the hub id or the scheme that it stands for.

`parameters` counts each weight once (a tied head is its embedding). `licence` marks models whose
makers want a licence accepted on the model's page first, as far as is known here.
"""

from typing import NamedTuple


class Known(NamedTuple):
    """A model of the hub."""

    id: str
    parameters: int
    licence: bool = False


QWEN25 = {"0.5B": 494_032_768, "1.5B": 1_543_714_304, "3B": 3_085_938_688, "7B": 7_615_616_512}
QWEN3 = {"0.6B": 596_049_920, "1.7B": 1_720_574_976, "4B": 4_022_468_096, "8B": 8_190_735_360}

NAMES: dict[str, Known] = {
    "tinyllama": Known("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384),
    "mistral-7b": Known("mistralai/Mistral-7B-v0.3", 7_248_023_552),
    "mistral-7b-instruct": Known("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
    "gemma-2b": Known("google/gemma-2b", 2_506_172_416, True),
    "gemma-2b-it": Known("google/gemma-2b-it", 2_506_172_416, True),
    "gemma2-2b": Known("google/gemma-2-2b", 2_614_341_888, True),
    "gemma2-2b-it": Known("google/gemma-2-2b-it", 2_614_341_888, True),
    "llama2-7b": Known("meta-llama/Llama-2-7b-hf", 6_738_415_616, True),
    "llama2-7b-chat": Known("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616, True),
    "llama3.1-8b": Known("meta-llama/Llama-3.1-8B", 8_030_261_248, True),
    "llama3.1-8b-instruct": Known("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, True),
    "llama3.2-1b": Known("meta-llama/Llama-3.2-1B", 1_235_814_400, True),
    "llama3.2-1b-instruct": Known("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, True),
    "llama3.2-3b": Known("meta-llama/Llama-3.2-3B", 3_212_749_824, True),
    "llama3.2-3b-instruct": Known("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, True),
    **{f"qwen2.5-{n.lower()}": Known(f"Qwen/Qwen2.5-{n}", p) for n, p in QWEN25.items()},
    **{
        f"qwen2.5-{n.lower()}-instruct": Known(f"Qwen/Qwen2.5-{n}-Instruct", p)
        for n, p in QWEN25.items()
    },
    **{f"qwen3-{n.lower()}": Known(f"Qwen/Qwen3-{n}", p) for n, p in QWEN3.items()},
    "bitnet-2b": Known("microsoft/bitnet-b1.58-2B-4T", 2_412_820_480),
}

BITS = {  # a weight -> the scheme that is meant
    "8": "int8",
    "6": "int6",
    "4": "nl4",
    "3": "nl3",
    "2": "nl2",
    "1.6": "ternary",
    "1": "sign",
}


def near(name: str) -> list[str]:
    """Short names that were perhaps meant, best first."""
    from difflib import get_close_matches

    return get_close_matches(name.lower(), NAMES, n=3, cutoff=0.7)


def short_name(hub_id: str) -> str | None:
    """The short name of a hub id, if it has one."""
    return next((short for short, known in NAMES.items() if known.id == hub_id), None)
