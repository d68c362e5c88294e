"""A tokenizer's documents as the metadata of a GGUF file: the other direction of tokenizer.py.

llama.cpp has two models of tokens that chalot writes. "gpt2": byte-level BPE with merges, cut by a
pre-tokenizer that goes by a name. "llama": SentencePiece's BPE, which merges the pair whose whole
has the best score, so that a list of merges fits only if it is that of such scores. What neither
can say is a TokenizerError; what llama.cpp does otherwise is a line.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np

from chalot.errors import TokenizerError, one_line
from chalot.formats.files import quoted
from chalot.formats.gguf.splits import SPLITS
from chalot.formats.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from chalot.formats.gguf.writer import Value

Document = Mapping[str, Any]
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}
CALLED = {"llama3": "llama-bpe"}  # what llama.cpp's own converter calls a pre-tokenizer
BYTES = [f"<0x{n:02X}>" for n in range(256)]


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    type: str = "BPE"
    vocab: dict[str, int] | list[Any] = {}
    merges: list[str | tuple[str, str]] = []
    byte_fallback: bool = False
    ignore_merges: bool = False
    unk_token: str | None = None


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None


class _Tokens(NamedTuple):
    """Texts and kinds by id, and ids by text."""

    texts: list[str]
    kinds: list[int]
    ids: dict[str, int]


def refused(what: str) -> TokenizerError:
    """The error for what GGUF cannot say."""
    return TokenizerError(
        f"tokenizer.json: {what}, which a GGUF file cannot say; --no-tokenizer writes the weights "
        "without it"
    )


def tokenizer_metadata(
    documents: Mapping[str, Document], template: str | None, rows: int
) -> tuple[dict[str, Value], list[str]]:
    """The pairs of a tokenizer, and a line for each thing that llama.cpp does otherwise.

    `documents` are parsed, by name; `template` is chat_template.jinja; `rows` is the number of rows
    of the embedding. Raises TokenizerError.
    """
    try:
        read = msgspec.convert(documents["tokenizer.json"], _Tokenizer)
    except (msgspec.ValidationError, RecursionError) as error:
        raise TokenizerError(f"tokenizer.json: {one_line(error)}") from None
    if read.model.type != "BPE" or not isinstance(read.model.vocab, dict):
        raise refused(f"a model of type {quoted(read.model.type)}")
    tokens = _tokens(read, read.model.vocab, rows)
    byte_level = _has_type(read.pre_tokenizer, "ByteLevel")
    model, notes = (_byte_level if byte_level else _sentence_pieces)(read, tokens)
    model["tokenizer.ggml.tokens"] = tokens.texts
    model["tokenizer.ggml.token_type"] = np.array(tokens.kinds, "<i4")
    roles = _roles(read, documents, tokens)
    for name, id_ in roles.items():
        model[f"tokenizer.ggml.{ROLES[name]}_token_id"] = id_
    begin, end = _template_ends(read, tokens)
    for name, there in (("bos", begin), ("eos", end)):
        if there is not None and there != roles.get(name):
            raise refused(f"token {there} at the {name[0]}eginning or end of every text")
        model[f"tokenizer.ggml.add_{name}_token"] = there is not None
    return model | _chat(documents, template), notes


def _tokens(read: _Tokenizer, vocab: dict[str, int], rows: int) -> _Tokens:
    texts = [f"[PAD{i}]" for i in range(rows)]
    kinds = [UNUSED] * rows
    fallback = set(BYTES) if read.model.byte_fallback else set()
    ids: dict[str, int] = {}
    entries = [
        *((t, i, BYTE if t in fallback else NORMAL) for t, i in vocab.items()),
        *((a.content, a.id, CONTROL if a.special else USER_DEFINED) for a in read.added_tokens),
    ]
    for text, i, kind in entries:
        if not 0 <= i < rows:
            raise TokenizerError(
                f"tokenizer.json: token {quoted(text)} has id {i}, the embedding has {rows} rows"
            )
        if kinds[i] != UNUSED and texts[i] != text:
            raise TokenizerError(
                f"tokenizer.json: {quoted(texts[i])} and {quoted(text)} both have id {i}"
            )
        texts[i], kinds[i], ids[text] = text, kind, i
    if read.model.unk_token in ids:
        kinds[ids[str(read.model.unk_token)]] = UNKNOWN
    return _Tokens(texts, kinds, ids)


# ---- the two models


def _steps(spec: Document | None, key: str) -> list[Document]:
    """A pre-tokenizer, normalizer or processor as the list of what it does."""
    if spec is None:
        return []
    parts = spec.get(key)
    if spec.get("type") != "Sequence" or not isinstance(parts, list):
        return [spec]
    return [step for part in parts if isinstance(part, dict) for step in _steps(part, key)]


def _has_type(spec: Document | None, name: str) -> bool:
    return any(step.get("type") == name for step in _steps(spec, "pretokenizers"))


def _cuts(spec: Document | None) -> list[tuple[Any, ...]]:
    """What a pre-tokenizer does, without what makes no difference."""
    keys = ("type", "pattern", "behavior", "invert", "add_prefix_space", "use_regex")
    usual = {"add_prefix_space": True, "use_regex": True}
    return [
        tuple((k, str(step.get(k, usual.get(k)))) for k in (*keys, "individual_digits"))
        for step in _steps(spec, "pretokenizers")
    ]


def _byte_level(read: _Tokenizer, tokens: _Tokens) -> tuple[dict[str, Value], list[str]]:
    """The "gpt2" model."""
    found = _cuts(read.pre_tokenizer)
    name = next((n for n, split in SPLITS.items() if _cuts(split.pre_tokenizer) == found), None)
    if name is None:
        raise refused("a pre-tokenizer that none of llama.cpp's that chalot knows is equal to")
    notes = []
    if read.model.ignore_merges != SPLITS[name].whole_words:
        if read.model.ignore_merges:
            raise refused(f"ignore_merges with the pre-tokenizer {name}")
        notes.append("llama.cpp takes words that are tokens whole, this tokenizer merges them")
    normal = [str(s.get("type")) for s in _steps(read.normalizer, "normalizers")]
    if set(normal) - {"NFC"}:
        raise refused(f"normalizers {', '.join(map(quoted, normal))}")
    if normal:
        notes.append(
            "llama.cpp does not normalise text, this tokenizer does (NFC): letters whose accents "
            "are written apart get other tokens there"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in read.model.merges]
    if any(m.count(" ") != 1 for m in merges):
        raise refused("a merge of parts with spaces in them")
    pre = CALLED.get(name, name)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": merges,
    }, notes


def _sentence_pieces(read: _Tokenizer, tokens: _Tokens) -> tuple[dict[str, Value], list[str]]:
    """The "llama" model."""
    if not read.model.byte_fallback:
        raise refused("a BPE of letters without a fallback to bytes")
    scores = _scores(read, tokens)
    prefix = _space_prefix(read)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }, []


def _space_prefix(read: _Tokenizer) -> bool:
    """Whether texts begin with a space that is added. Raises TokenizerError for other steps."""
    prefix = replaced = False
    for step in _steps(read.normalizer, "normalizers"):
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind == "Replace" and step.get("pattern") == {"String": " "}:
            replaced = step.get("content") == SPACE
        else:
            raise refused(f"a normalizer of type {quoted(kind)}")
    for step in _steps(read.pre_tokenizer, "pretokenizers"):
        if step.get("type") != "Metaspace" or step.get("replacement", SPACE) != SPACE:
            raise refused(f"a pre-tokenizer of type {quoted(step.get('type'))}")
        replaced = True
        scheme = step.get("prepend_scheme")
        prefix = step.get("add_prefix_space", True) if scheme is None else scheme != "never"
    if not replaced:
        raise refused("spaces that do not become " + SPACE)
    return bool(prefix)


def _scores(read: _Tokenizer, tokens: _Tokens) -> Any:
    """(tokens,) float32: the better, the earlier a token is merged; 0 where nothing is.

    Raises TokenizerError unless merging by these scores is merging by the list.
    """
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else m for m in read.model.merges]
    order: dict[str, int] = {}
    last = ""
    for pair in pairs:
        whole = "".join(pair)
        if whole != last and whole in order:
            raise refused("merges of one token at several places of the list")
        order.setdefault(whole, len(order))
        last = whole
    listed = set(pairs)
    mergeable = {t for t, i in tokens.ids.items() if tokens.kinds[i] == NORMAL}
    for token in order:
        if token not in mergeable:
            raise refused(f"merges into {quoted(token)}, which is no plain token")
        for at in range(1, len(token)):
            halves = (token[:at], token[at:])
            if halves[0] in mergeable and halves[1] in mergeable and halves not in listed:
                raise refused(
                    f"a list of merges without {quoted(' + '.join(halves))}, as SentencePiece's "
                    "has it"
                )
    scores = np.zeros(len(tokens.texts), "<f4")
    letters = 0
    for text, i in sorted(tokens.ids.items(), key=lambda item: item[1]):
        if tokens.kinds[i] == NORMAL:
            scores[i] = -order.get(text, len(order) + letters)
            letters += text not in order
    return scores


# ---- ids and templates


def _roles(read: _Tokenizer, documents: Mapping[str, Document], tokens: _Tokens) -> dict[str, int]:
    """Ids of tokens with a part to play: by name in tokenizer_config.json, else by number."""
    found: dict[str, int] = {}
    named = documents.get("tokenizer_config.json", {})
    for role in ROLES:
        text = named.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if role == "unk" and text is None:
            text = read.model.unk_token
        numbers = [documents.get(n, {}).get(f"{role}_token_id") for n in ("config.json",)]
        numbers.append(documents.get("generation_config.json", {}).get(f"{role}_token_id"))
        if isinstance(text, str) and text in tokens.ids:
            found[role] = tokens.ids[text]
            continue
        for number in numbers:
            first = number[0] if isinstance(number, list) and number else number
            if type(first) is int and 0 <= first < len(tokens.texts):
                found[role] = first
                break
    return found


def _template_ends(read: _Tokenizer, tokens: _Tokens) -> tuple[int | None, int | None]:
    """Ids of the tokens that begin and end every text, where there are such."""
    begin: list[str] = []
    end: list[str] = []
    for step in _steps(read.post_processor, "processors"):
        if step.get("type") == "ByteLevel":
            continue
        if step.get("type") != "TemplateProcessing" or not isinstance(step.get("single"), list):
            raise refused(f"a post-processor of type {quoted(step.get('type'))}")
        where = begin
        for item in step["single"]:
            special = item.get("SpecialToken") if isinstance(item, dict) else None
            if special is None:
                where = end
            else:
                where.append(str(special.get("id")))
    if len(begin) > 1 or len(end) > 1 or not all(t in tokens.ids for t in begin + end):
        raise refused("several tokens at the beginning or end of every text")
    both = [tokens.ids[t[0]] if t else None for t in (begin, end)]
    return both[0], both[1]


def _chat(documents: Mapping[str, Document], template: str | None) -> dict[str, Value]:
    """Chat templates: the usual one, and others by name."""
    found = documents.get("tokenizer_config.json", {}).get("chat_template")
    if isinstance(found, list):
        pairs = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
    else:
        pairs = dict(found) if isinstance(found, dict) else {"default": found}
    if template is not None:
        pairs["default"] = template
    named = {str(n): t for n, t in pairs.items() if isinstance(t, str)}
    out: dict[str, Value] = {}
    if "default" in named:
        out["tokenizer.chat_template"] = named.pop("default")
    if named:
        out["tokenizer.chat_templates"] = list(named)
        out |= {f"tokenizer.chat_template.{n}": t for n, t in named.items()}
    return out
