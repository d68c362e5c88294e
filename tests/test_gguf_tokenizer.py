"""Tokenizers rebuilt from GGUF's metadata give the ids of the original, and of llama.cpp."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from chalot.demo import FOLDER
from chalot.errors import FormatError, TokenizerError, UnsupportedError
from chalot.formats.gguf import tokenizer as gguf_tokenizer
from chalot.formats.gguf.header import Metadata
from chalot.formats.gguf.splits import SPLITS
from chalot.formats.safetensors import SafetensorsFolder
from chalot.text.tokenizer import Tokenizer, check_same, from_source
from gguf_cases import TEXTS, bundled, bundled_vocabulary

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gguf.json").read_text("utf-8"))
PIECES = GOLDEN["sentencepiece"]


class Source:
    """Documents made of metadata."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.documents = gguf_tokenizer.documents(Metadata(metadata, "x.gguf"))

    def document(self, name: str) -> bytes | None:
        return self.documents.get(name)


def rebuilt(metadata: dict[str, Any]) -> Tokenizer:
    return from_source(Source(metadata))


def spm(case: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """Metadata of a vocabulary that sentencepiece trained."""
    found = {key: value for key, value in case.items() if key.startswith("tokenizer.")}
    found["tokenizer.ggml.scores"] = np.array(found["tokenizer.ggml.scores"], "<f4")
    found["tokenizer.ggml.token_type"] = np.array(found["tokenizer.ggml.token_type"], "<i4")
    ids = {"bos": 1, "eos": 2, "unknown": 0}
    found |= {f"tokenizer.ggml.{name}_token_id": id_ for name, id_ in ids.items()}
    return found | {"tokenizer.ggml.model": "llama"} | changed


def bpe(**changed: Any) -> dict[str, Any]:
    return bundled_vocabulary("qwen2") | {
        f"tokenizer.ggml.{key}": value for key, value in changed.items()
    }


def test_the_bundled_tokenizer_comes_back():
    configuration = json.loads((FOLDER / "tokenizer_config.json").read_text())
    pad = bundled()["added_tokens"][0]["id"]
    metadata = bpe(padding_token_id=pad, bos_token_id=-1) | {
        "tokenizer.chat_template": configuration["chat_template"]
    }
    folder = SafetensorsFolder(FOLDER)
    check_same(from_source(folder), rebuilt(metadata))
    ours = json.loads(Source(metadata).documents["tokenizer.json"])
    for part in ("pre_tokenizer", "normalizer", "post_processor", "added_tokens", "model"):
        assert ours[part] == bundled()[part], part
    folder.close()


@pytest.mark.parametrize("pre", GOLDEN["splits"])
def test_ids_are_those_of_llama_cpp(pre):
    tokenizer = rebuilt(bundled_vocabulary(pre))
    for text, ids in zip(TEXTS, GOLDEN["splits"][pre], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


def patterns(name: str) -> list[str]:
    steps = SPLITS[name].pre_tokenizer["pretokenizers"]
    return [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]


@cache
def trained(name: str) -> Library:
    """A small tokenizer of that style, by the `tokenizers` package alone."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    cut: Any = level
    if name == "smollm":
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    elif name != "gpt-2":
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns(name)]
        cut = pre_tokenizers.Sequence([*splits, plain])
    found = Library(models.BPE(ignore_merges=SPLITS[name].whole_words))
    found.pre_tokenizer, found.decoder = cut, decoders.ByteLevel()
    if name == "qwen2":
        found.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator([(FOLDER / "calibration.txt").read_text("utf-8")], trainer)
    found.add_special_tokens(["<|begin|>", "<|end|>"])
    found.add_tokens(["<tool>"])
    return found


@pytest.mark.parametrize("name", ["gpt-2", "llama3", "qwen2", "smollm", "tekken", "default"])
def test_ids_are_those_of_the_original(name):
    original = trained(name)
    written = json.loads(original.to_str())
    vocab = original.get_vocab()
    kinds = np.ones(len(vocab), "<i4")
    for token in written["added_tokens"]:
        kinds[token["id"]] = 3 if token["special"] else 4
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in written["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = rebuilt(metadata)
    for text in (*TEXTS, "Tie\u0302\u0301ng Vie\u0323\u0302t"):
        assert tokenizer.encode(text) == original.encode(text).ids, text
    marked = "<|begin|>a<tool>b <|end|>c"
    assert tokenizer.encode(marked, specials=True) == original.encode(marked).ids
    assert tokenizer.decode(original.encode(marked).ids) == "a<tool>b c"


@pytest.mark.parametrize("case", PIECES)
def test_ids_are_those_of_sentencepiece(case):
    tokenizer = rebuilt(spm(case))
    for text, ids in zip(TEXTS, case["ids"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("case", [c for c in PIECES if c["model"] == "bpe"])
def test_pieces_are_merged_as_llama_cpp_merges_them(case):
    assert case["ids"] == case["llama.cpp"]


def test_pieces_without_scores_of_their_own_are_ranked_by_id():
    case = PIECES[0]
    flat = np.full(len(case["tokenizer.ggml.tokens"]), -1000, "<f4")
    tokenizer = rebuilt(spm(case, **{"tokenizer.ggml.scores": flat}))
    assert [tokenizer.encode(text) for text in TEXTS] == case["ids"]


def test_user_defined_pieces_stay_whole():
    case = PIECES[0]
    tokens = [*case["tokenizer.ggml.tokens"], "<tool>", "   "]
    kinds = np.array([*case["tokenizer.ggml.token_type"], 4, 4], "<i4")
    scores = np.array([*case["tokenizer.ggml.scores"], 0, 0], "<f4")
    changed = {"tokens": tokens, "token_type": kinds, "scores": scores}
    named = {f"tokenizer.ggml.{key}": value for key, value in changed.items()}
    tokenizer = rebuilt(spm(case, **named))
    ids = tokenizer.encode("a<tool>b   c")
    assert ids.count(len(tokens) - 2) == ids.count(len(tokens) - 1) == 1
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}


@pytest.mark.parametrize("begins, ends", [(True, False), (False, True), (True, True)])
def test_beginning_and_end_are_added_where_the_file_says_so(begins, ends):
    metadata = bpe(add_bos_token=begins, add_eos_token=ends)
    begin = [metadata["tokenizer.ggml.bos_token_id"]] * begins
    end = [metadata["tokenizer.ggml.eos_token_id"]] * ends
    plain = rebuilt(bpe()).encode("a b")
    assert rebuilt(metadata).encode("a b") == begin + plain + end


def test_llama3_begins_a_text_unless_told_otherwise():
    metadata = bundled_vocabulary("llama-bpe")
    del metadata["tokenizer.ggml.add_bos_token"]
    begin = metadata["tokenizer.ggml.bos_token_id"]
    assert rebuilt(metadata).encode("a")[0] == begin
    metadata["tokenizer.ggml.pre"] = "qwen2"
    assert rebuilt(metadata).encode("a")[0] != begin


def test_ends_of_answers_are_named_or_known():
    metadata = bpe(eot_token_id=5)
    metadata["general.sampling.temp"] = 0.7
    metadata["general.sampling.top_k"] = 20
    configuration = json.loads(Source(metadata).documents["generation_config.json"])
    named = {text["content"]: text["id"] for text in bundled()["added_tokens"]}
    ends = [named["<|im_end|>"], 5, named["<|endoftext|>"]]
    assert configuration["eos_token_id"] == ends
    assert configuration["temperature"] == 0.7 and configuration["top_k"] == 20


def test_templates_by_name():
    metadata = bpe() | {
        "tokenizer.chat_template": "A",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "B",
    }
    tokenizer = rebuilt(metadata)
    hello = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render(hello) == "A" and tokenizer.render(hello, tools=[{}]) == "B"


def test_padding_at_the_end_is_no_token():
    metadata = bpe()
    tokens = [*metadata["tokenizer.ggml.tokens"], "[PAD4096]", "[PAD4097]"]
    kinds = np.array([*metadata["tokenizer.ggml.token_type"], 5, 5], "<i4")
    padded = metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    check_same(rebuilt(metadata), rebuilt(padded))


def test_special_tokens_may_lie_anywhere():
    vocab = bundled()["model"]["vocab"]
    metadata = bundled_vocabulary("qwen2")
    tokens = metadata["tokenizer.ggml.tokens"]
    last = len(tokens) - 1
    tokens[:] = [tokens[last], *tokens[:last]]  # as DeepSeek and others: first of all
    kinds = np.roll(metadata["tokenizer.ggml.token_type"], 1)
    metadata |= {"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.eos_token_id": 0}
    tokenizer = rebuilt(metadata)
    assert tokenizer.special_tokens["<|im_end|>"] == 0 and tokenizer.eos_ids >= {0}
    assert tokenizer.encode("a<|im_end|>", specials=True) == [vocab["a"] + 1, 0]
    assert 0 not in tokenizer.encode("a<|im_end|>")


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"model": "bert"}, UnsupportedError, "'bert' are not known; known: gpt2, llama"),
        ({"model": 7}, FormatError, "'tokenizer.ggml.model' is 7, expected a text"),
        ({"pre": "chatglm-bpe"}, UnsupportedError, "'chatglm-bpe' is not known; known: gpt-2"),
        ({"tokens": []}, FormatError, "is empty"),
        ({"tokens": np.arange(3, dtype="<i4")}, FormatError, "expected a list of texts"),
        ({"merges": np.arange(3, dtype="<i4")}, FormatError, "expected a list of texts"),
        ({"tokens": ["a", "a"], "token_type": None, "merges": []}, TokenizerError, "there twice"),
        ({"merges": ["a"]}, TokenizerError, "merge 0, 'a', is not made of two"),
        ({"merges": ["a \u4e00"]}, TokenizerError, "merge 0"),
        ({"merges": None}, FormatError, "'tokenizer.ggml.merges' is missing"),
        ({"token_type": np.ones(3, "<i4")}, FormatError, "expected a list of 4,096 numbers"),
        ({"token_type": np.full(4096, 9, "<i4")}, FormatError, "token type 9"),
        ({"token_type": np.ones(4096, "<f4")}, FormatError, "expected a list of 4,096 numbers"),
        ({"eos_token_id": 4096}, FormatError, "is 4096, expected 0 to 4095"),
        ({"eos_token_id": "x"}, FormatError, "expected a whole number"),
        ({"add_bos_token": 1}, FormatError, "expected a truth value"),
    ],
)
def test_hostile_vocabularies(changed, error, message):
    metadata = bpe(**changed)
    for key in [key for key, value in metadata.items() if value is None]:
        del metadata[key]
    with pytest.raises(error, match=r"x\.gguf: ") as caught:
        gguf_tokenizer.documents(Metadata(metadata, "x.gguf"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"scores": np.full(len(PIECES[0]["tokenizer.ggml.tokens"]), np.nan)}, "has NaN"),
        ({"scores": np.zeros(3, "<f4")}, "numbers"),
        ({"scores": None}, "is missing or has NaN"),
    ],
)
def test_hostile_scores(changed, message):
    metadata = spm(PIECES[0], **{f"tokenizer.ggml.{k}": v for k, v in changed.items()})
    for key in [key for key, value in metadata.items() if value is None]:
        del metadata[key]
    with pytest.raises((FormatError, TokenizerError), match=message):
        gguf_tokenizer.documents(Metadata(metadata, "x.gguf"))


@pytest.mark.parametrize(
    "pieces, message",
    [
        (["a" * 5000], "tokens of 5,000 letters"),
        ([f"{i:04}" + "a" * 1000 for i in range(4000)], "letters, expected at most 1,024, and"),
        (["a" * i for i in range(1, 1000)], "made of others in too many ways"),
    ],
)
def test_pieces_that_would_take_long_are_refused(pieces, message):
    tokens = ["<unk>", "<s>", "</s>", *pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.arange(len(tokens), dtype="<f4"),
    }
    with pytest.raises(TokenizerError, match=message):
        gguf_tokenizer.documents(Metadata(metadata, "x.gguf"))


def test_no_tokenizer_is_no_error():
    assert gguf_tokenizer.documents(Metadata({}, "x")) == {}
    assert gguf_tokenizer.documents(Metadata({"tokenizer.ggml.model": "none"}, "x")) == {}
