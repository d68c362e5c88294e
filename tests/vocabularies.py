"""Small tokenizers of the kinds that language models have, trained here on a few lines."""

import json
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog, it's 1234.5 times faster than 'the' others'.",
    "def encode(text, specials=False):\n    return [i for i in text.split()]  # im_start im_end\n",
    "Tiếng Việt: Trăm năm trong cõi người ta, chữ tài chữ mệnh khéo là ghét nhau. Đà Nẵng",
    "你好，世界。こんにちは世界。안녕하세요 👩‍👩‍👧 🏳️‍🌈 😀",
    "user assistant system model tool think tool_call <| |> [INST] </s> start_of_turn",
] * 3
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = [f"<|{name}|>" for name in ("begin_of_text", "end_of_text", "start_header_id")]
HEADERS += [f"<|{name}|>" for name in ("end_header_id", "eot_id", "eom_id", "python_tag")]
SOFT = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>"]
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
SPLIT += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _trained(core: Tokenizer, specials: list[str], alphabet: list[str] | None = None) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=alphabet or [],
    )
    core.train_from_iterator(TEXTS, trainer)
    return core


@cache
def byte_level() -> bytes:
    """As Qwen2's: NFC, bytes, soft marks that are not called special."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    _trained(core, CHATML, pre_tokenizers.ByteLevel.alphabet())
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in SOFT])
    return core.to_str().encode()


@cache
def llama3() -> bytes:
    """As Llama 3's: bytes, numbers in threes, words that are tokens kept whole, a beginning."""
    core = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    _trained(core, [], pre_tokenizers.ByteLevel.alphabet())
    core.add_special_tokens(HEADERS)  # behind all others
    begin = HEADERS[0]
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{begin} $A",
                pair=f"{begin} $A {begin} $B",
                special_tokens=[(begin, core.token_to_id(begin))],
            ),
        ]
    )
    return core.to_str().encode()


@cache
def sentencepiece(scheme: str = "legacy", beginning: bool = True) -> bytes:
    """As Llama 2's ("legacy": a space after each special token) and as later ones'."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    if scheme == "legacy":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif scheme == "first":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        core.normalizer = replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme != "none":
        steps.append(decoders.Strip(" ", 1, 0))
    core.decoder = decoders.Sequence(steps)
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    _trained(core, ["<unk>", "<s>", "</s>", *letters])
    marks = [
        "[INST]",
        "[/INST]",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
    ]
    core.add_special_tokens([AddedToken(text, normalized=False) for text in marks[:4]])
    core.add_special_tokens([AddedToken(text, normalized=False, rstrip=True) for text in marks[4:]])
    if beginning:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    document = json.loads(core.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] not in letters]
    return json.dumps(document).encode()


@cache
def unigram() -> bytes:
    """As T5's: a special token is among the model's words, and its best one."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁a", -3.0)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz<>/|_.,1"]
    core = Tokenizer(models.Unigram(pieces, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["<s>", "</s>", "<unk>"])
    return core.to_str().encode()


ALL: dict[str, Any] = {
    "bytes": byte_level,
    "llama3": llama3,
    "legacy": sentencepiece,
    "first": lambda: sentencepiece("first"),
    "none": lambda: sentencepiece("none"),
}


@cache
def raw(name: str) -> Tokenizer:
    """The library's own tokenizer of one of ALL."""
    return Tokenizer.from_buffer(ALL[name]())
