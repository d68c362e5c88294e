"""A GGUF file's tokens, merges and scores as the documents that its Hugging Face model would have.

Two models of tokens are known. "gpt2": byte-level BPE with merges, cut by the pre-tokenizer that
`tokenizer.ggml.pre` names. "llama": SentencePiece's, where a space is U+2581 and unknown characters
fall back to bytes; its merges follow from scores, unless the scores are a unigram model's.
Makes plain Python values; knows nothing of the library that reads them.
"""

import json
from typing import NamedTuple

import numpy as np

from chalot.errors import FormatError, TokenizerError, UnsupportedError
from chalot.formats.files import quoted
from chalot.formats.gguf.header import Metadata
from chalot.formats.gguf.splits import SPLITS, Spec, byte_level

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
KINDS = range(7)  # 0: not said, taken for NORMAL
SPACE = "\u2581"
# Splitting a token in two at every place takes work by its length; Gemma's have 1.8 million letters
MAX_LETTERS = 4_000_000
MAX_TOKEN = 1024  # letters
MAX_MERGED = 40_000_000  # letters of all merges; Gemma's 580,000 have 5 million
MAX_TEMPLATE = 1_000_000  # bytes
ENDS = (  # control tokens that end an answer, whatever the model calls the end of a text
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>"),
    *("<end_of_turn>", "<|return|>", "<|call|>", "<EOT>", "<|end_of_turn|>"),
)
SAMPLING = {  # of generation_config.json -> general.sampling.*
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
NAMED = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep"}


class Vocabulary(NamedTuple):
    """Tokens by id, and the kind of each."""

    tokens: list[str]
    kinds: list[int]

    def of(self, *kinds: int) -> list[int]:
        """Ids of these kinds."""
        return [i for i, kind in enumerate(self.kinds) if kind in kinds]


def documents(metadata: Metadata) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, generation_config.json; none without a tokenizer.

    Raises FormatError, TokenizerError, or UnsupportedError for models of tokens that are not known.
    """
    if "tokenizer.ggml.model" not in metadata or metadata.text("tokenizer.ggml.model") in (
        "none",
        "no_vocab",
    ):
        return {}
    name = metadata.text("tokenizer.ggml.model")
    model = MODELS.get(name)
    if model is None:
        raise UnsupportedError(
            f"{metadata.where}: tokens of the model {quoted(name)} are not known; "
            f"known: {', '.join(MODELS)}"
        )
    vocabulary = read_vocabulary(metadata)
    found = {
        "tokenizer.json": model(metadata, vocabulary),
        "tokenizer_config.json": tokenizer_config(metadata, vocabulary),
        "generation_config.json": generation_config(metadata, vocabulary),
    }
    return {name: json.dumps(value, ensure_ascii=False).encode() for name, value in found.items()}


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Tokens and kinds. Padding at the end of the list, which no text gives, is left out."""
    tokens = metadata.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise FormatError(f"{metadata.where}: metadata 'tokenizer.ggml.tokens' is empty")
    types = metadata.numbers("tokenizer.ggml.token_type", len(tokens), "iu")
    kinds = [NORMAL] * len(tokens) if types is None else [int(t) for t in types]
    if not set(kinds) <= set(KINDS):
        wrong = next(k for k in kinds if k not in KINDS)
        raise FormatError(f"{metadata.where}: token type {wrong}, expected 1 to 6")
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == UNUSED and token in (f"[PAD{i}]", f"<pad{i}>", f"<|unused{i}|>"):
            kinds[i] = -1
        elif kind in (0, UNUSED):
            kinds[i] = NORMAL
    return Vocabulary(tokens, kinds)


# ---- tokenizer.json


def _tokenizer(
    metadata: Metadata, vocabulary: Vocabulary, added: list[int], begins: bool, parts: Spec
) -> Spec:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": vocabulary.tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": vocabulary.kinds[i] != USER_DEFINED,
            }
            for i in added
        ],
        "post_processor": _post_processor(metadata, vocabulary, begins),
        **parts,
    }


def _post_processor(metadata: Metadata, vocabulary: Vocabulary, begins: bool) -> Spec | None:
    """Adds the tokens that begin and end a text, where the model wants them."""
    before: list[tuple[str, int]] = []
    after: list[tuple[str, int]] = []
    for place, name, default in ((before, "bos", begins), (after, "eos", False)):
        if metadata.flag(f"tokenizer.ggml.add_{name}_token", default):
            id_ = _named_id(metadata, vocabulary, name)
            if id_ is not None:
                place.append((vocabulary.tokens[id_], id_))
    if not before + after:
        return None

    def template(sequences: tuple[str, ...]) -> list[Spec]:
        steps: list[Spec] = []
        for n, sequence in enumerate(sequences):
            steps += [{"SpecialToken": {"id": token, "type_id": n}} for token, _ in before]
            steps.append({"Sequence": {"id": sequence, "type_id": n}})
            steps += [{"SpecialToken": {"id": token, "type_id": n}} for token, _ in after]
        return steps

    return {
        "type": "TemplateProcessing",
        "single": template(("A",)),
        "pair": template(("A", "B")),
        "special_tokens": {
            token: {"id": token, "ids": [id_], "tokens": [token]} for token, id_ in before + after
        },
    }


def _model_vocabulary(metadata: Metadata, vocabulary: Vocabulary, ids: list[int]) -> dict[str, int]:
    found = {vocabulary.tokens[i]: i for i in ids}
    if len(found) < len(ids):
        twice = next(i for i in ids if found[vocabulary.tokens[i]] != i)
        raise TokenizerError(
            f"{metadata.where}: token {quoted(vocabulary.tokens[twice])} is there twice, "
            "expected it once"
        )
    return found


def byte_level_bpe(metadata: Metadata, vocabulary: Vocabulary) -> Spec:
    """The "gpt2" model. Raises UnsupportedError for a pre-tokenizer that is not known."""
    pre = metadata.text("tokenizer.ggml.pre", "default")
    split = SPLITS.get(pre)
    if split is None:
        raise UnsupportedError(
            f"{metadata.where}: pre-tokenizer {quoted(pre)} is not known; "
            f"known: {', '.join(SPLITS)}"
        )
    added = vocabulary.of(CONTROL, USER_DEFINED, UNKNOWN)
    ids = vocabulary.of(NORMAL, BYTE)
    if [*ids, *added] != list(range(len(ids) + len(added))):
        # added tokens are numbered behind the model's own: those that lie elsewhere are both
        ids = sorted(ids + added)
    vocab = _model_vocabulary(metadata, vocabulary, ids)
    merges = _merges(metadata, vocab)
    model = _bpe(vocab, merges) | {"ignore_merges": split.whole_words}
    parts = {
        "normalizer": split.normalizer,
        "pre_tokenizer": split.pre_tokenizer,
        "decoder": byte_level(regex=True),
        "model": model,
    }
    return _tokenizer(metadata, vocabulary, added, split.begins, parts)


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Spec:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def _merges(metadata: Metadata, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs in order of rank. Raises TokenizerError for one whose parts or whole are no tokens."""
    found = []
    for n, merge in enumerate(metadata.texts("tokenizer.ggml.merges")):
        at = merge.find(" ", 1)  # as llama.cpp: a part may begin with a space
        left, right = merge[:at], merge[at + 1 :]
        if at < 0 or any(part not in vocab for part in (left, right, left + right)):
            raise TokenizerError(
                f"{metadata.where}: merge {n}, {quoted(merge)}, is not made of two tokens"
            )
        found.append((left, right))
    return found


def sentence_pieces(metadata: Metadata, vocabulary: Vocabulary) -> Spec:
    """The "llama" model: BPE by scores, or a unigram model where the scores are logarithms."""
    tokens = vocabulary.tokens
    scores = metadata.numbers("tokenizer.ggml.scores", len(tokens), "f")
    if scores is None or not np.isfinite(scores).all():
        raise TokenizerError(
            f"{metadata.where}: metadata 'tokenizer.ggml.scores' is missing or has NaN"
        )
    added = vocabulary.of(CONTROL, USER_DEFINED, UNKNOWN)
    ids = [i for i, kind in enumerate(vocabulary.kinds) if kind > 0]
    vocab = _model_vocabulary(metadata, vocabulary, ids)
    unknown = _named_id(metadata, vocabulary, "unknown")
    if unknown is None:
        unknown = next(iter(vocabulary.of(UNKNOWN)), None)
    fallback = all(f"<0x{n:02X}>" in vocab for n in range(256))
    normal = vocabulary.of(NORMAL)
    values = scores[normal]
    if np.any(values != np.trunc(values)):
        model = _unigram(vocabulary, scores.tolist(), unknown)
    else:
        same = len(normal) > 1 and bool(np.all(values == values[0]))
        order = [-i for i in range(len(tokens))] if same else scores.tolist()
        merges = _merges_by_score(metadata, vocabulary, vocab, order)
        model = _bpe(vocab, merges) | {"fuse_unk": True}
        model["unk_token"] = None if unknown is None else tokens[unknown]
    model["byte_fallback"] = fallback
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    begin = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [*begin, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }
    return _tokenizer(metadata, vocabulary, added, True, parts)


def _unigram(vocabulary: Vocabulary, scores: list[float], unknown: int | None) -> Spec:
    """Ids are places in the list, so that those of other kinds stay in it, out of reach."""
    least = min(scores) - 1e6
    table = [
        (token, score if kind == NORMAL else least)
        for token, kind, score in zip(vocabulary.tokens, vocabulary.kinds, scores, strict=True)
    ]
    return {"type": "Unigram", "unk_id": unknown, "vocab": table}


def _merges_by_score(
    metadata: Metadata, vocabulary: Vocabulary, vocab: dict[str, int], scores: list[float]
) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best score first, then the longer left part."""
    tokens = [vocabulary.tokens[i] for i in vocabulary.of(NORMAL)]
    longest = max(map(len, tokens), default=0)
    if sum(map(len, tokens)) > MAX_LETTERS or longest > MAX_TOKEN:
        raise TokenizerError(
            f"{metadata.where}: found tokens of {longest:,} letters, expected at most "
            f"{MAX_TOKEN:,}, and {MAX_LETTERS:,} in all"
        )
    allowed = {token: vocab[token] for token in tokens}
    found, letters = [], 0
    for token in tokens:
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in allowed and right in allowed:
                order = (-scores[allowed[token]], -at, allowed[left], allowed[right])
                found.append((order, left, right))
                letters += len(token)
        if letters > MAX_MERGED:
            raise TokenizerError(
                f"{metadata.where}: found tokens that are made of others in too many ways; "
                "no tokenizer of a model is like that"
            )
    return [(left, right) for _, left, right in sorted(found)]


MODELS = {"gpt2": byte_level_bpe, "llama": sentence_pieces}


# ---- the other documents


def _named_id(metadata: Metadata, vocabulary: Vocabulary, name: str) -> int | None:
    """The id of a token with a part to play. Raises FormatError if there is no such token."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in metadata:
        return None
    id_ = metadata.integer(key)
    if id_ in (-1, 0xFFFFFFFF):  # "none" in some files
        return None
    if not 0 <= id_ < len(vocabulary.tokens):
        raise FormatError(
            f"{metadata.where}: metadata {key!r} is {id_}, expected 0 to "
            f"{len(vocabulary.tokens) - 1}"
        )
    return id_


def tokenizer_config(metadata: Metadata, vocabulary: Vocabulary) -> Spec:
    """Special tokens by name, and the chat templates."""
    config: Spec = {"clean_up_tokenization_spaces": False}
    for name, short in NAMED.items():
        id_ = _named_id(metadata, vocabulary, name)
        config[f"{short}_token"] = None if id_ is None else vocabulary.tokens[id_]
    names = metadata.texts("tokenizer.chat_templates", [])
    others = {n: metadata.text(f"tokenizer.chat_template.{n}") for n in names if n != "default"}
    default = metadata.text("tokenizer.chat_template", "")
    if sum(map(len, [default, *others.values()])) > MAX_TEMPLATE:
        raise FormatError(f"{metadata.where}: chat templates of more than {MAX_TEMPLATE:,} letters")
    if others:
        named = {"default": default} | others if default else others
        config["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
    elif default:
        config["chat_template"] = default
    return config


def generation_config(metadata: Metadata, vocabulary: Vocabulary) -> Spec:
    """Ids that end an answer, and sampling where the file recommends some."""
    named = [_named_id(metadata, vocabulary, name) for name in ("eos", "eot", "eom")]
    ends = [i for i in vocabulary.of(CONTROL, USER_DEFINED) if vocabulary.tokens[i] in ENDS]
    config: Spec = {
        "bos_token_id": _named_id(metadata, vocabulary, "bos"),
        "eos_token_id": list(dict.fromkeys([i for i in named if i is not None] + ends)),
        "pad_token_id": _named_id(metadata, vocabulary, "padding"),
    }
    for field, key in SAMPLING.items():
        if f"general.sampling.{key}" in metadata:
            config[field] = metadata.number(f"general.sampling.{key}")
    if "top_k" in config:
        config["top_k"] = int(config["top_k"])
    return {key: value for key, value in config.items() if value is not None}
