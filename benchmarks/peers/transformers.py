"""transformers in bf16 as a side of the benchmark: the checkpoint as it is, eager, with a cache.

    python -m peers.transformers serve FOLDER --threads 2 --context 64      (in benchmarks/)

The clock runs around the model's forward pass; logits of the last token alone are asked for.
"""

import argparse
import time
from collections.abc import Callable

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from worker import Message, serve, side_arguments


def start(arguments: argparse.Namespace) -> tuple[Message, Callable[[Message], Message]]:
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    held: dict[str, DynamicCache | list[int]] = {"prompt": []}

    def forward(ids: list[int]) -> float:
        begin = time.perf_counter()
        model(torch.tensor([ids]), past_key_values=held["cache"], use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begin

    @torch.inference_mode()
    def answer(request: Message) -> Message:
        prompt, prefill = request["prompt"], None
        if request["fresh"] or held["prompt"] != prompt:
            held.update(prompt=prompt, cache=DynamicCache())
            prefill = forward(prompt)
        seconds = [forward([token]) for token in request["tokens"]]
        if request["tokens"]:
            held["cache"].crop(-len(request["tokens"]))
        return {"prefill_seconds": prefill, "seconds": seconds}

    embedding = (
        0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.size(0)
    )
    ready = {
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "system_info": torch.backends.cpu.get_cpu_capability(),
        "bytes_per_token": sum(p.numel() * 2 for p in model.parameters())
        - max(0, embedding - 1) * model.config.hidden_size * 2,
        "cache_bytes_per_token": 2 * 2 * model.config.num_hidden_layers
        * model.config.num_key_value_heads * model.config.head_dim,
    }  # fmt: skip
    return ready, answer


def main() -> None:
    arguments = side_arguments("transformers in bf16: answer requests.", makes=False).parse_args()
    serve(lambda: start(arguments))


if __name__ == "__main__":
    main()
