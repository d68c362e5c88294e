"""Pre-tokenizers by the name that GGUF gives them (`tokenizer.ggml.pre`): a row each.

Patterns are those of the models' own tokenizer.json, in the names of the `tokenizers` library.
"""

from typing import Any, NamedTuple

Spec = dict[str, Any]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?"
    r"[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
    rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+"
    rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_CONTRACTIONS}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(*patterns: str) -> Spec:
    """Each pattern's matches become pieces of their own, then bytes become letters."""
    steps: list[Spec] = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*steps, byte_level(regex=False)]}


def byte_level(regex: bool) -> Spec:
    """Bytes as letters; with `regex` after GPT-2's split."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": regex,
    }


class Split(NamedTuple):
    """How texts are cut before merging. `whole_words`: a word that is a token is not merged."""

    pre_tokenizer: Spec
    whole_words: bool = False
    begins: bool = False  # whether a beginning of text is added where metadata does not say
    normalizer: Spec | None = None


_DIGITS: Spec = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(regex=True)],
}
_KINDS = {
    "gpt-2": Split(byte_level(regex=True)),
    "llama3": Split(_split(_LLAMA3), whole_words=True, begins=True),
    "qwen2": Split(_split(_QWEN2), normalizer={"type": "NFC"}),
    "smollm": Split(_DIGITS),
    "tekken": Split(_split(_TEKKEN), whole_words=True, begins=True),
    "gpt-4o": Split(_split(_O200K)),
    "deepseek-coder": Split(
        _split(
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
            r"\p{N}",
        )
    ),
    # what llama.cpp makes of files whose converter did not know the model
    "default": Split(_split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
_ALIASES = {
    "gpt-2": ("phi-2", "jina-es", "jina-de", "olmo", "roberta-bpe", "mpt"),
    "llama3": ("llama-v3", "llama-bpe", "falcon3", "pixtral", "smaug-bpe", "dbrx"),
    "qwen2": ("deepseek-r1-qwen", "megrez"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell"),
}
SPLITS: dict[str, Split] = {
    **_KINDS,
    **{alias: _KINDS[name] for name, aliases in _ALIASES.items() for alias in aliases},
}
