"""Training and encoding in MB/s, beside tokenizers, tiktoken and sentencepiece.

    python benchmarks/tokenizer.py [--vocabulary 32000] [--megabytes 8] [--rounds 5]

The corpus is the Python standard library's sources. chalot trains a tokenizer in the style of
Qwen2; `tokenizers` and tiktoken encode with that very tokenizer (their ids are compared), and
sentencepiece with a BPE model of its own, of as many tokens and trained on the same text. Sides
take turns. Each encodes a text once in every round, by an object that was opened anew, as a prompt
is: no cache is warm. One thread encodes on every side. What is not installed is left out. Prints a
table and appends a JSON line to results/tokenizer.jsonl; 0 MB/s is a side that failed.
"""

import argparse
import base64
import io
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from machine import OthersWork, describe_machine, provenance
from make_models import SHAPES, tokenizer_json

HERE = Path(__file__).resolve().parent
PEERS = ("tokenizers", "tiktoken", "sentencepiece")
OPEN = """
import json, sys, time
from pathlib import Path
from chalot.kernels.backend import byte_pairs
from chalot.machine import resident_bytes
from chalot.text.tokenizer import Tokenizer
import tokenizers
raw = Path(sys.argv[1]).read_bytes()
before, start = resident_bytes(), time.perf_counter()
if sys.argv[2] == "tables":
    opened = Tokenizer.from_documents(b"", None, tables=raw, native=byte_pairs)
else:
    opened = Tokenizer.from_documents(raw, None)
opened.encode("Hello")
print(json.dumps([1e3 * (time.perf_counter() - start), (resident_bytes() - before) / 1e6]))
"""


def sources() -> str:
    """The standard library, one file after the other by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                found.append(path.read_text("utf-8"))
            except UnicodeDecodeError:
                continue
    return "\n".join(found)


def texts(corpus: str, size: int) -> dict[str, str]:
    """Texts of about `size` bytes, ordinary and hostile ones."""
    rng = random.Random(1)
    prose = "".join(
        line
        for line in corpus.splitlines(True)
        if line.count(" ") > 6 and not any(sign in line for sign in "()=[]:_")
    )
    letters = "abcdefghijklmnopqrstuvwxyz"
    return {
        "prose": prose[:size],
        "code": corpus[-size:],
        "Chinese": "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(size // 3)),
        "base64": base64.b64encode(rng.randbytes(size * 3 // 4)).decode(),
        "letters, no space": "".join(rng.choice(letters) for _ in range(size)),
        "one letter": "a" * size,
        "spaces": " " * size,
    }


def train_chalot(corpus: str, vocabulary: int) -> bytes:
    from chalot.formats.corpus import CUT
    from chalot.text.training import Recipe, train

    ends = [0, *(m.end() for m in CUT.finditer(corpus)), len(corpus)]
    pieces = (corpus[a:b] for a, b in zip(ends[::50], [*ends[50::50], len(corpus)], strict=True))
    return train(pieces, Recipe("qwen2", vocabulary))


def train_sentencepiece(corpus: str, vocabulary: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 20,
        minloglevel=2,
    )
    return model.getvalue()


def openers(trained: bytes, pieces: bytes | None) -> dict[str, Callable[[], Callable[[str], Any]]]:
    """Of each side, what opens it anew; that gives what encodes."""
    from tokenizers import Tokenizer as Core

    from chalot.kernels.backend import byte_pairs
    from chalot.text.pieces import byte_letters
    from chalot.text.styles import STYLES
    from chalot.text.tokenizer import Tokenizer, compiled

    tables = compiled(trained)

    def chalot() -> Callable[[str], Any]:
        opened = Tokenizer.from_documents(b"", None, tables=tables, native=byte_pairs)
        opened.encode("Hello")
        return opened.encode

    def library() -> Callable[[str], Any]:
        core = Core.from_buffer(trained)
        return lambda text: core.encode(text, add_special_tokens=False).ids

    found = {"chalot": chalot, "tokenizers": library}
    if find_spec("tiktoken"):
        letters = byte_letters()
        vocab = json.loads(trained)["model"]["vocab"]
        ranks = {bytes(letters[c] for c in token): id_ for token, id_ in vocab.items()}

        def tiktoken() -> Callable[[str], Any]:
            from tiktoken import Encoding

            pattern = STYLES["qwen2"].pattern
            opened = Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
            return opened.encode_ordinary

        found["tiktoken"] = tiktoken
    if pieces is not None:

        def sentencepiece() -> Callable[[str], Any]:
            from sentencepiece import SentencePieceProcessor

            return SentencePieceProcessor(model_proto=pieces).encode

        found["sentencepiece"] = sentencepiece
    return found


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def training(corpus: str, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, bytes]]:
    sides = {"chalot": train_chalot}
    if find_spec("sentencepiece"):
        sides["sentencepiece"] = train_sentencepiece
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    made: dict[str, bytes] = {}
    for _ in range(options.training_rounds):
        for name, train in sides.items():
            took, made[name] = seconds(lambda t=train: t(corpus, options.vocabulary))  # type: ignore[misc]
            rounds[name].append(len(corpus.encode()) / 1e6 / took)
    return rounds, made


def encoding(
    made: dict[str, bytes], corpus: str, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    sides = openers(made["chalot"], made.get("sentencepiece"))
    results: dict[str, dict[str, Any]] = {}
    for what, text in texts(corpus, options.size).items():
        size = len(text.encode())
        rounds: dict[str, list[float]] = {name: [] for name in sides}
        ids: dict[str, Any] = {}
        for n in range(options.rounds):
            turns = list(sides.items())
            for name, opener in turns[n % len(turns) :] + turns[: n % len(turns)]:
                encode = opener()
                try:
                    took, ids[name] = seconds(lambda e=encode, t=text: e(t))  # type: ignore[misc]
                except BaseException as error:  # tiktoken panics at a megabyte of spaces
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    took, ids[name] = float("inf"), []
                rounds[name].append(size / 1e6 / took)
        same = {name: list(ids[name]) == ids["chalot"] for name in ids if name in PEERS[:2]}
        assert same["tokenizers"], what
        results[what] = {
            "bytes": size,
            "tokens": {name: len(found) for name, found in ids.items()},
            "same_ids": same,
            "megabytes_per_second": rounds,
        }
        print(row(what, rounds), flush=True)
    return results


def opening(rounds: int) -> dict[str, Any]:
    """A vocabulary of 151,643: from tables and from tokenizer.json, each in a fresh process."""
    from chalot.text.tokenizer import compiled

    raw = json.dumps(tokenizer_json(SHAPES["qwen2.5-0.5b"])).encode()
    found: dict[str, Any] = {"tables": [], "json": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("tables", compiled(raw) or b""), ("json", raw)):
            Path(folder, name).write_bytes(content)
        for _ in range(rounds):
            for name in found:
                command = [sys.executable, "-c", OPEN, str(Path(folder, name)), name]
                found[name].append(json.loads(subprocess.check_output(command)))
    return found


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def row(what: str, rounds: dict[str, list[float]]) -> str:
    return f"{what:<18}" + "".join(f"{n} {spread(v):<22}" for n, v in rounds.items())


def main() -> None:
    """Train, encode, open; print, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--vocabulary", type=int, default=32_000)
    add("--megabytes", type=float, default=8, help="of the corpus to train on")
    add("--size", type=int, default=1_000_000, help="bytes of a text to encode")
    add("--rounds", type=int, default=5)
    add("--training-rounds", type=int, default=2)
    add("--results", type=Path, default=HERE / "results" / "tokenizer.jsonl")
    add("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    whole = sources()
    corpus = whole[: int(options.megabytes * 1e6)]
    result = provenance(sys.argv[1:], ("--results",)) | {"machine": describe_machine()}
    result["versions"] = {name: version(name) for name in PEERS if find_spec(name)}
    with OthersWork() as others:
        trained, made = training(corpus, options)
        print(row("training", trained), flush=True)
        result["training"] = {"bytes": len(corpus.encode()), "megabytes_per_second": trained}
        result["encoding"] = encoding(made, whole, options)
        result["opening"] = opening(options.rounds)
    for name, rounds in result["opening"].items():
        ms, memory = zip(*rounds, strict=True)
        print(f"opening {name}: {spread(list(ms))} ms, {spread(list(memory))} MB")
    result |= others.result
    if not options.no_save:
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
