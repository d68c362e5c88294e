"""What int8 codes of keys and values cost, and which form of keys costs least.

    python benchmarks/cache.py [--tokens 8192]

First the product: KL of the next token of the bundled model and of its outlier twin, with bf16,
int8 and nl4 weights (`convert` balances the keys of the last two with their queries), cache types
against a float32 cache, in windows of 256 and of 1,024 held-out tokens.
Then forms of keys against each other, in numpy: the bf16 models' forward pass, and made-up keys
with outliers. Keys as they are, rotated by a Hadamard matrix (the product's form), less the first
key of their page, both, or rotated after rope's pairs were balanced with those of the queries;
values are int8 throughout. Appends a JSON line to results/cache.jsonl.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.convert import convert
from chalot.demo import FOLDER, write_twin
from chalot.evaluate import compare, log_softmax, standard_error
from chalot.evaluate.protocols import windows
from chalot.formats.checkpoint import open_checkpoint
from chalot.kernels.program import PAGE
from chalot.load import Model
from machine import provenance

Floats = NDArray[np.float32]
# keys (heads, positions, head_dim) as the cache gives them back; the queries are there to look at
Form = Callable[[Floats, Floats], Floats]
WINDOWS = (256, 1024)
TOP = np.float32(127)


# ---- forms of keys


def coded(x: Floats) -> Floats:
    """Through int8 codes with a scale a position and head."""
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True) / TOP, np.float32(1e-30))
    return np.rint(x / scale) * scale


def hadamard(size: int) -> Floats:
    """The orthogonal matrix (size, size); size is a power of two."""
    h = np.ones((1, 1), np.float32)
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h / np.float32(np.sqrt(size))


def rotated(x: Floats) -> Floats:
    """Coded after a Hadamard rotation, and turned back."""
    h = hadamard(x.shape[-1])
    return coded(x @ h) @ h.T


def first_of_page(x: Floats) -> Floats:
    """For each key the first of its page, which counts as kept without loss."""
    return np.repeat(x[:, ::PAGE], PAGE, axis=1)[:, : x.shape[1]]


def balance(k: Floats, q: Floats) -> Floats:
    """(heads, 1, head_dim): powers of two near sqrt(rms of keys / rms of queries), one a pair.

    Keys divided and queries multiplied by them give the same scores. Queries of all heads that
    share a key head count together.
    """

    def size(x: Floats) -> Floats:  # (heads, head_dim / 2)
        pairs = x.reshape(len(k), -1, 2, x.shape[-1] // 2)
        return np.sqrt((pairs**2).mean(axis=(1, 2)) + np.float32(1e-30))

    factor = np.exp2(np.rint(np.log2(size(k) / size(q)) / 2))
    return np.concatenate([factor, factor], axis=-1)[:, None]


FORMS: dict[str, Form] = {
    "int8": lambda k, _: coded(k),
    "int8, rotated": lambda k, _: rotated(k),
    "less page's first": lambda k, _: first_of_page(k) + coded(k - first_of_page(k)),
    "less page's first, rotated": lambda k, _: first_of_page(k) + rotated(k - first_of_page(k)),
    "balanced, rotated": lambda k, q: rotated(k / balance(k, q)) * balance(k, q),
}


# ---- a Qwen2 in numpy


class Numpy:
    """The checkpoint's forward pass in float32, its cache in a given form."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        self.weights = {name: checkpoint.float32(name) for name in checkpoint.tensors}
        checkpoint.close()

    def norm(self, x: Floats, name: str) -> Floats:
        mean = (x * x).mean(axis=-1, keepdims=True) + np.float32(self.config["rms_norm_eps"])
        return x / np.sqrt(mean) * self.weights[name + ".weight"]

    def linear(self, x: Floats, name: str) -> Floats:
        y = x @ self.weights[name + ".weight"].T
        bias = self.weights.get(name + ".bias")
        return y if bias is None else y + bias

    def rope(self, x: Floats) -> Floats:
        """(heads, positions, head_dim), pairs half a head apart."""
        half = x.shape[-1] // 2
        frequency = self.config["rope_theta"] ** (-np.arange(half) / half)
        angle = np.arange(x.shape[1])[:, None] * frequency
        cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)

    def attention(self, x: Floats, prefix: str, keys: Form | None) -> Floats:
        c = self.config

        def heads(name: str) -> Floats:
            y = self.linear(x, f"{prefix}{name}_proj").reshape(len(x), -1, c["head_dim"])
            return np.ascontiguousarray(y.transpose(1, 0, 2))

        share = c["num_attention_heads"] // c["num_key_value_heads"]
        q, k, v = self.rope(heads("q")), self.rope(heads("k")), heads("v")
        if keys is not None:
            k, v = keys(k, q), coded(v)
        scores = q @ np.repeat(k, share, 0).transpose(0, 2, 1) / np.float32(np.sqrt(c["head_dim"]))
        scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = p / p.sum(axis=-1, keepdims=True) @ np.repeat(v, share, 0)
        return self.linear(out.transpose(1, 0, 2).reshape(len(x), -1), prefix + "o_proj")

    def logits(self, ids: list[int], keys: Form | None) -> Floats:
        """(tokens, vocabulary), keys in a form and values in int8; without one, as computed."""
        x = self.weights["model.embed_tokens.weight"][ids]
        for i in range(self.config["num_hidden_layers"]):
            p = f"model.layers.{i}."
            normed = self.norm(x, p + "input_layernorm")
            x = x + self.attention(normed, p + "self_attn.", keys)
            fed = self.norm(x, p + "post_attention_layernorm")
            g = self.linear(fed, p + "mlp.gate_proj")
            inner = g / (1 + np.exp(-g)) * self.linear(fed, p + "mlp.up_proj")
            x = x + self.linear(inner, p + "mlp.down_proj")
        return self.norm(x, "model.norm") @ self.weights["model.embed_tokens.weight"].T


def forms_in_model(folder: Path, ids: list[int], window: int) -> list[dict[str, Any]]:
    """KL of each form of keys to keys and values of float32."""
    model = Numpy(folder)
    found: dict[str, list[float]] = {name: [] for name in FORMS}
    for part in windows(ids, window):
        truth = log_softmax(model.logits(part, None))
        for name, form in FORMS.items():
            q = log_softmax(model.logits(part, form))
            found[name].append(float((np.exp(truth) * (truth - q)).sum(axis=1).mean()))
    return [
        {"form": name, "kl": float(np.mean(each)), "kl_error": standard_error(each)}
        for name, each in found.items()
    ]


# ---- made-up keys


def made_up(kind: str, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Queries and keys (2 heads, 1024, 64), about normal but for four channels."""
    q, k = rng.standard_normal((2, 2, 1024, 64)).astype(np.float32)
    some = rng.choice(64, 4, replace=False)
    if kind == "channels x 20, queries / 20":
        k[..., some] *= 20
        q[..., some] /= 20
    elif kind == "channels x 20":
        k[..., some] *= 20
    elif kind.startswith("channels + "):
        k[..., some] += np.float32(kind.split()[-1])
    return q, k


def forms_of_made_up() -> list[dict[str, Any]]:
    """For each kind of keys: error of scores, and KL of the weights that softmax makes of them.

    The error is relative, root of mean squares, each query's mean over the keys taken off both
    sides, because softmax does not see it.
    """
    out = []
    for kind in (
        "normal", "channels x 20, queries / 20", "channels x 20", "channels + 20", "channels + 100"
    ):  # fmt: skip
        q, k = made_up(kind, np.random.default_rng(0))
        scores = (q @ k.transpose(0, 2, 1)).astype(np.float64)
        truth = log_softmax(scores.reshape(-1, 1024) / 8)
        for name, form in FORMS.items():
            there = (q @ form(k, q).transpose(0, 2, 1)).astype(np.float64)
            error = there - scores
            error -= error.mean(axis=-1, keepdims=True)
            spread = scores - scores.mean(axis=-1, keepdims=True)
            got = log_softmax(there.reshape(-1, 1024) / 8)
            out.append(
                {
                    "keys": kind,
                    "form": name,
                    "error": float(np.sqrt((error**2).mean() / (spread**2).mean())),
                    "kl": float((np.exp(truth) * (truth - got)).sum(axis=1).mean()),
                }
            )
    return out


# ---- the product


def product(
    folder: Path, name: str, source: Path, window: int, tokens: int
) -> list[dict[str, Any]]:
    """Rows of cache types: KL to bf16 weights, and to the same weights, with a float32 cache."""
    models: dict[tuple[str, str], Model] = {}
    for scheme in ("bf16", "int8", "nl4"):
        path = folder / f"{name}-{scheme}.myai"
        if not path.exists():
            convert(source, path, scheme)
        for kv in ("f32", "f16", "int8"):
            models[scheme, kv] = Model(path, context=1024, kv=kv)
    base = models["bf16", "f32"]
    ids = base.tokenizer.encode((FOLDER / "heldout.txt").read_text("utf-8"))[:tokens]
    others = list(models)[1:]
    against = compare(base, [models[o] for o in others], ids, window=window)
    own = {("bf16", kv): against[1 + i] for i, kv in enumerate(("f16", "int8"))}
    for scheme in ("int8", "nl4"):
        caches = [models[scheme, kv] for kv in ("f32", "f16", "int8")]
        same = compare(caches[0], caches[1:], ids, window=window)
        own |= {(scheme, kv): same[1 + i] for i, kv in enumerate(("f16", "int8"))}
    rows = []
    for key, q in zip(others, against[1:], strict=True):
        row = {"weights": key[0], "cache": key[1], "perplexity": q.perplexity, "kl": q.kl}
        row |= {"kl_error": q.kl_error, "same_top": q.same_top}
        if key in own:
            alone = own[key]
            row |= {"kl_of_cache": alone.kl, "kl_of_cache_error": alone.kl_error}
            row |= {"kl_of_cache_99": alone.kl_99, "same_top_of_cache": alone.same_top}
        rows.append(row)
    for model in models.values():
        model.close()
    return rows


def main() -> None:
    """Both models, both lengths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens")
    options = parser.parse_args()
    line: dict[str, Any] = {**provenance(sys.argv[1:], ()), "tokens": options.tokens}
    line |= {"product": [], "forms": [], "made_up": forms_of_made_up()}
    for row in line["made_up"]:
        print("{keys:28} {form:26} error {error:.4f}  KL {kl:.6f}".format(**row), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_twin(FOLDER, folder / "twin")
        for name, source in (("demo", FOLDER), ("twin", folder / "twin")):
            for window in WINDOWS:
                where = {"model": name, "window": window}
                for row in product(folder, name, source, window, options.tokens):
                    line["product"].append({**where, **row})
                    print(
                        "{} {:5} {weights:4} {cache:4} KL {kl:.6f} +- {kl_error:.6f}".format(
                            name, window, **row
                        ),
                        "of the cache alone {:.6f} +- {:.6f}".format(
                            row.get("kl_of_cache", 0), row.get("kl_of_cache_error", 0)
                        ),
                        flush=True,
                    )
                text = (FOLDER / "heldout.txt").read_text("utf-8")
                with Model(folder / f"{name}-bf16.myai") as model:
                    ids = model.tokenizer.encode(text)[: options.tokens]
                for row in forms_in_model(source, ids, window):
                    line["forms"].append({**where, **row})
                    print(
                        "{} {:5} {form:26} KL {kl:.6f} +- {kl_error:.6f}".format(
                            name, window, **row
                        ),
                        flush=True,
                    )
    path = Path(__file__).parent / "results" / "cache.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
