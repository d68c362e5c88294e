#!/usr/bin/env python3
"""What structured output costs a token: decoding with and without a grammar, in turn.

    python benchmarks/masks.py MODEL.myai [--tokens 96] [--rounds 5] [--out FILE.jsonl]

The grammar is a JSON schema of objects with strings, numbers and an enumeration, long enough that
the answer does not end. `mask` is the time inside llguidance, `all` what a token takes longer than
without: that of choosing from all logits rather than from the best few comes on top.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 5, "maxLength": 40},
        "kind": {"enum": [f"kind {i}" for i in range(40)]},
        "size": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 6},
    },
    "required": ["name", "kind", "size", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 60}


class Timed:
    """A mask that counts the seconds it takes."""

    def __init__(self, mask: Any) -> None:
        self.mask, self.seconds = mask, 0.0

    def allowed(self, tokens: list[int]) -> Any:
        """See chalot.engine.requests.Mask."""
        start = time.perf_counter()
        bits = self.mask.allowed(tokens)
        self.seconds += time.perf_counter() - start
        return bits


def main() -> None:
    """Print medians, and append them to --out."""
    import chalot
    from chalot.engine.requests import Request
    from chalot.engine.sampler import Sampling
    from chalot.engine.scheduler import Scheduler
    from chalot.serve.structured import GrammarMask, Structures, schema_grammar
    from machine import describe_machine, provenance

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with chalot.load(arguments.model, context=1024) as model:
        document = (model.file.document("tokenizer.json") or b"").decode()
        ends = model.tokenizer.eos_ids
        structures = Structures(document, model.config.vocabulary, ends)
        grammar = schema_grammar(SCHEMA, "schema")
        scheduler = Scheduler(model.engine, slots=1, drafter=None)
        ids = model.tokenizer.encode("A list of things, as JSON:\n")

        def milliseconds(mask: Timed | None) -> float:
            """A token's time, after the first."""
            request = Request(ids, Sampling(seed=1), arguments.tokens, mask=mask)
            ticket = scheduler.submit(request)
            scheduler.run_once()
            start = time.perf_counter()
            while not ticket.done:
                scheduler.run_once()
            return (time.perf_counter() - start) / (arguments.tokens - 1) * 1e3

        plain, masked, inside = [], [], []
        for _ in range(arguments.rounds + 1):
            mask = Timed(GrammarMask(structures, structures.matcher(grammar, "schema")))
            plain.append(milliseconds(None))
            masked.append(milliseconds(mask))
            inside.append(mask.seconds / arguments.tokens * 1e3)
        rounds = list(zip(plain, masked, inside, strict=True))[1:]  # the first warms up
        found = {
            "model": Path(arguments.model).name,
            "vocabulary": model.config.vocabulary,
            "threads": model.backend.threads,
            "tokens": arguments.tokens,
            "rounds": arguments.rounds,
            "plain_ms": round(median(p for p, _, _ in rounds), 4),
            "masked_ms": round(median(m for _, m, _ in rounds), 4),
            "mask_ms": round(median(i for _, _, i in rounds), 4),
            "mask_share": round(median(i / p for p, _, i in rounds), 4),
            "all_share": round(median((m - p) / p for p, m, _ in rounds), 4),
        }
    print(json.dumps(found))
    if arguments.out:
        line = {**provenance(sys.argv[1:], ("--out",)), **found, "machine": describe_machine()}
        with arguments.out.open("a") as out:
            out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
