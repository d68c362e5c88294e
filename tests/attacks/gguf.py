"""A GGUF file: its pairs, its tensors' infos, its header's bytes."""

import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from attacks.changes import NUMBERS, TEXTS, changed_bytes, value
from attacks.reader import Reader as Base
from chalot.checking import check_shapes, read_config
from chalot.formats.gguf import GgufFile
from chalot.text.tokenizer import from_source
from gguf_files import ARRAY, STRING, Raw, entries, info, model_metadata, model_tensors, pack, text

FILE = "m.gguf"
WORDS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<x>"],
    "tokenizer.ggml.token_type": np.array([1, 1, 1, 3], "<i4"),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}
MORE = {  # keys that the whole file does not have, with values that others do
    "general.alignment": 32,
    "general.type": "model",
    "split.count": 1,
    "split.no": 0,
    "{}.rope.scaling.type": "yarn",
    "{}.rope.scaling.factor": 4.0,
    "{}.attn_logit_softcapping": 50.0,
    "{}.expert_count": 4,
    "{}.expert_used_count": 2,
    "{}.attention.sliding_window": 20,
    "{}.attention.key_length": 8,
    "{}.vocab_size": 4,
    "general.sampling.top_k": 5,
    "tokenizer.ggml.scores": np.zeros(4, "<f4"),
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
    "tokenizer.chat_templates": ["a"],
}
ARRAYS = (np.zeros(4, "<i4"), np.full(4, np.nan, "<f4"), np.arange(4, dtype="u1"), ["", "a b"])
FAMILIES = (*["llama"] * 8, "qwen2", "gemma2", "bitnet", "qwen3moe")

SMALL = [("token_embd.weight", np.zeros((4, 32), np.float32), 0, (32, 4))]
BIG = 1 << 60


def array(kind: int, count: int, content: bytes = b"") -> Raw:
    return Raw(struct.pack("<IIQ", ARRAY, kind, count) + content)


def nested(depth: int) -> Raw:
    return Raw(struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * depth)


def with_info(dimensions, kind=0, offset=0, name="token_embd.weight") -> bytes:
    """A file whose one tensor is described like that, with 512 bytes of payload."""
    return pack(model_metadata(), infos=[info(name, dimensions, kind, offset)]) + bytes(512)


CASES = {  # name -> (content, part of the message)
    "empty": (b"", "begins with b'', expected a GGUF file"),
    "magic": (b"GGML" + bytes(60), "begins with b'GGML', expected a GGUF file"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    "only magic": (b"GGUF", "found 4 bytes"),
    "version 0": (pack(version=0), "is GGUF version 0"),
    "version 1": (pack(version=1), "make the file again with a newer llama.cpp"),
    "version 4": (pack(version=4), "version 4, expected 2 or 3; update chalot"),
    "big-endian": (pack(version=3 << 24), "is big-endian; convert it with"),
    "pairs": (pack(counts=(0, BIG)), "says it has 1,152,921,504,606,846,976 metadata pairs"),
    "pairs, some": (pack(model_metadata(), counts=(0, 90_000)), "90,000 metadata pairs"),
    "tensors": (pack(counts=(BIG, 0)), "says it has 1,152,921,504,606,846,976 tensors"),
    "one pair more": (pack(model_metadata(), SMALL, counts=(1, 10)), "name of tensor 0 has"),
    "long key": (pack()[:16] + struct.pack("<QQ", 1, BIG) + bytes(50), "key 0 has"),
    "key past the end": (pack()[:16] + struct.pack("<QQ", 1, 999) + bytes(50), "truncated"),
    "long text": (pack({"a": Raw(struct.pack("<IQ", STRING, BIG))}), "expected at most"),
    "text past the end": (pack({"a": Raw(struct.pack("<IQ", STRING, 5000))}), "truncated"),
    "not UTF-8": (pack({"a": b"\xff"}), "metadata 'a': byte 0 is not UTF-8"),
    "key not UTF-8": (pack([(b"\xff", 1)]), "key 0: byte 0 is not UTF-8"),
    "value type": (pack({"a": Raw(struct.pack("<I", 13))}), "value type 13 does not exist"),
    "element type": (pack({"a": array(13, 1, bytes(64))}), "value type 13 does not exist"),
    "truth": (pack({"a": Raw(struct.pack("<IB", 7, 2))}), "found 2 as a truth value"),
    "truths": (pack({"a": array(7, 3, b"\0\1\5")}), "found 5 as a truth value"),
    "numbers": (pack({"a": array(0, BIG)}), "truncated download?"),
    "wide numbers": (pack({"a": array(12, 1 << 61)}), "truncated download?"),
    "texts": (pack({"a": array(STRING, BIG)}), "truncated download?"),
    "arrays": (pack({"a": array(ARRAY, BIG)}), "truncated download?"),
    "deep": (pack({"a": nested(1000)}), "nested deeper than 4"),
    "duplicate key": (pack([("a", 1), ("a", 2)]), "key 'a' is there twice"),
    "alignment 0": (pack({"general.alignment": 0}), "alignment is 0, expected a power of two"),
    "alignment 24": (pack({"general.alignment": 24}), "is 24, expected a power of two"),
    "alignment huge": (pack({"general.alignment": 1 << 31}), "expected a power of two"),
    "alignment text": (pack({"general.alignment": "x"}), "is 'x', expected a power of two"),
    "alignment true": (pack({"general.alignment": True}), "is True, expected a power of two"),
    "alignment float": (pack({"general.alignment": 32.0}), "expected a power of two"),
    "duplicate tensor": (pack(model_metadata(), SMALL * 2), "'token_embd.weight' is there twice"),
    "no dimensions": (with_info(()), "has 0 dimensions, expected 1 to 4"),
    "five dimensions": (with_info((1,) * 5), "has 5 dimensions"),
    "many dimensions": (pack(infos=[text("a") + struct.pack("<I", 1 << 31)]), "dimensions"),
    "dimension 0": (with_info((32, 0)), "impossible dimensions"),
    "dimension 2^63": (with_info((1 << 63,)), "impossible dimensions"),
    "product 2^64": (with_info((1 << 32, 1 << 32)), "impossible dimensions"),
    "product 2^64 + 32": (with_info(((1 << 60) + 2, 16)), "impossible dimensions"),
    "type": (with_info((32, 4), kind=99), "has type 99, which is not known"),
    "removed type": (with_info((32, 4), kind=4), "has type 4, which is not known"),
    "woven rows": (with_info((32, 4), kind=31), "has type 31, Q4_0_4_4, rows woven for one kind"),
    "bitnet.cpp's": (with_info((32, 4), kind=36), "has type 36, I2_S of bitnet.cpp, which lays it"),
    "blocks": (with_info((48, 4), kind=8), "no whole blocks of Q8_0, which have 32"),
    "misaligned": (with_info((32, 4), offset=8), "begins at 8, expected a multiple of 32"),
    "past the end": (with_info((32, 5)), "file has"),
    "offset 2^60": (with_info((32, 4), offset=BIG), "truncated download?"),
    "offset 2^64": (with_info((32, 4), offset=(1 << 64) - 32), "truncated download?"),
    "overlap": (
        pack(model_metadata(), infos=[info("a", (32, 4), 0, 0), info("b", (32,), 0, 480)])
        + bytes(600),
        "tensor 'b' overlaps 'a'; do not use this file",
    ),
    "same extent": (
        pack(model_metadata(), infos=[info("a", (32,), 0, 0), info("b", (32,), 0, 0)])
        + bytes(600),
        "overlaps",
    ),
    "nothing": (pack(), "metadata 'general.architecture' is missing"),
    "architecture": (pack({"general.architecture": "mamba"}), "'mamba' is not known; chalot runs"),
    "architecture 7": (pack({"general.architecture": 7}), "is 7, expected a text"),
    "adapter": (pack({"general.type": "adapter"}), "holds a 'adapter', expected a whole model"),
    "experts": (pack(model_metadata(**{"llama.expert_count": 8}), SMALL), "holds experts"),
    "a scale of its own": (
        pack(model_metadata(**{"llama.embedding_scale": 12.0}), SMALL),
        "metadata llama.embedding_scale is 12.0; chalot runs llama models without it",
    ),
    "many scales": (
        pack(model_metadata(**{"llama.logit_scale": np.ones(4, "<f4")}), SMALL),
        "chalot runs llama models without it",
    ),
    "no heads": (pack(model_metadata(**{"llama.attention.head_count": 0}), SMALL), "found 0 heads"),
    "head of 0": (
        pack(model_metadata(**{"llama.attention.head_count": 33}), SMALL),
        "heads have 0 numbers",
    ),
    "no embedding": (pack(model_metadata()), "token_embd.weight is missing or no matrix"),
    "vector": (
        pack(model_metadata(), [("token_embd.weight", np.zeros(32, np.float32), 0, (32,))]),
        "token_embd.weight is missing or no matrix",
    ),
    "tokens without rows": (
        pack(model_metadata(**{"tokenizer.ggml.tokens": list("abcde")}), SMALL),
        "has 5 tokens, its embedding 4 rows",
    ),
    "a window of OLMo 3": (
        pack(model_metadata("olmo2", **{"olmo2.attention.sliding_window": 4096}), SMALL),
        "olmo2.attention.sliding_window is 4096; chalot runs olmo2 models without it",
    ),
    "value heads": (
        pack(model_metadata(**{"llama.attention.value_length": 16}), SMALL),
        "value_length is 16, expected the 8 numbers",
    ),
    "partial rope": (
        pack(
            model_metadata(
                **{"llama.attention.key_length": 8, "llama.rope.dimension_count": 4}
            ),
            SMALL,
        ),
        "rope.dimension_count is 4, expected the 8 numbers",
    ),
    "heads by layer": (
        pack(model_metadata(**{"llama.attention.head_count": np.array([4, 8], "<i4")}), SMALL),
        "expected a whole number, the same for all layers",
    ),
    "theta 0": (pack(model_metadata(**{"llama.rope.freq_base": 0.0}), SMALL), "rope's base"),
    "theta NaN": (
        pack(model_metadata(**{"llama.rope.freq_base": float("nan")}), SMALL),
        "expected a finite number",
    ),
    "divisors": (
        pack(model_metadata(), [*SMALL, ("rope_freqs.weight", np.ones(9, np.float32), 0, (9,))]),
        "has shape (9,), expected (4,)",
    ),
    "divisors NaN": (
        pack(
            model_metadata(),
            [*SMALL, ("rope_freqs.weight", np.full(4, np.nan, np.float32), 0, (4,))],
        ),
        "values that are no divisors",
    ),
    "half a head": (
        pack(
            model_metadata(),
            [*SMALL, ("blk.0.attn_q.weight", np.zeros((12, 32), np.float32), 0, (32, 12))],
        ),
        "has 12 rows, no whole heads of 8",
    ),
    "unread type": (
        pack(
            model_metadata(),
            [*SMALL, ("blk.0.attn_q.weight", np.zeros(50 * 8, np.uint8), 19, (256, 8))],
        ),
        "is IQ1_S; chalot reads F32, F16",
    ),
}  # fmt: skip


class Reader(Base):
    """A model of 2 layers with a tokenizer."""

    file = FILE

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tensors = entries(model_tensors())
        self.whole = pack(model_metadata(**WORDS), self.tensors)
        self.header = self.whole.index(b"blk.1.ffn_down.weight") + 60

    def write(self, rng: Random | None) -> None:
        """See Base."""
        content = self.whole
        if rng is not None and rng.random() < 0.4:
            content = changed_bytes(content, rng, self.header)
        elif rng is not None:
            content = self.packed(rng)
        (self.folder / FILE).write_bytes(content)

    def packed(self, rng: Random) -> bytes:
        """Other pairs or infos, in a file that is well formed but for those."""
        family = rng.choice(FAMILIES)
        metadata: dict[str, Any] = model_metadata(family, **WORDS)
        for _ in range(rng.randint(0, 2)):
            key = rng.choice([*metadata, *MORE])
            found = metadata.get(key, MORE.get(key))
            metadata[key.format(family)] = changed_value(found, rng)
        tensors = list(self.tensors)
        extra = ("rope_freqs.weight", np.full(4, rng.choice((1, 0, np.nan)), np.float32), 0, (4,))
        tensors += [extra] if rng.random() < 0.2 else []
        plain = pack({}, tensors)
        infos, at = [], 0
        for name, stored, kind, dimensions in tensors:
            at += -at % 32
            infos.append([name, list(dimensions), kind, at])
            at += stored.nbytes
        for _ in range(rng.randint(0, 2)):
            one = rng.choice(infos)
            which = rng.randrange(4)
            if which == 0:
                one[0] = rng.choice([rng.choice(TEXTS), rng.choice(infos)[0]])
            elif which == 1:
                one[1][rng.randrange(len(one[1]))] = rng.choice(NUMBERS) % (1 << 64)
            else:
                one[which] = rng.choice((rng.randrange(40), rng.choice(NUMBERS) % (1 << 32)))
        said = [
            info(n.encode("utf-8", "surrogatepass"), d, k % (1 << 32), o) for n, d, k, o in infos
        ]
        head = pack(metadata, infos=said)
        return head + plain[len(pack({}, infos=said)) :]

    def read(self) -> None:
        """See Base."""
        with GgufFile(self.folder / FILE) as found:
            for name, tensor in found.tensors.items():
                found.float32(name, 0, min(2, tensor.shape[0]))
            check_shapes(read_config(found), found)
            if found.document("tokenizer.json") is not None:
                tokenizer = from_source(found)
                tokenizer.decode(tokenizer.encode("ab <x> a"))
                assert tokenizer.eos_ids is not None


def changed_value(found: Any, rng: Random) -> Any:
    """A value that `gguf_files.value` can pack, or one that is packed wrongly."""
    if rng.random() < 0.3:
        return Raw(struct.pack("<I", rng.randrange(14)) + rng.randbytes(rng.choice((1, 8, 40))))
    if rng.random() < 0.5:
        return rng.choice(ARRAYS)
    made = value(rng, found if isinstance(found, (int, float, str)) else None)
    if isinstance(made, str):
        return made.encode("utf-8", "surrogatepass")
    if isinstance(made, (bool, float)):
        return made if isinstance(made, bool) or abs(made) < 3e38 else float("inf")
    return made % (1 << 32) if isinstance(made, int) else ["x"]
