"""A new tokenizer.json from text: byte-level BPE in the style of a known model (styles.py).

The trainer is the `tokenizers` library's. It counts words and then merges the most frequent pair
again and again (ties: the lower ids), so the same text gives the same file, however many threads
count and in whatever order the files come. Sennrich et al., arXiv 1508.07909.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from chalot.errors import TokenizerError
from chalot.text.pieces import byte_letters
from chalot.text.styles import STYLES

MOST = 4_000_000  # tokens; 15 x the largest vocabulary met
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
)  # fmt: skip
SPECIALS = {"qwen2": CHATML, "llama3": LLAMA3, "gpt2": CHATML}  # by style, where none are given

_CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


class Recipe(NamedTuple):
    """What to train. `specials` take the last ids, and count."""

    style: str = "qwen2"
    vocabulary: int = 4096
    specials: tuple[str, ...] = CHATML
    min_frequency: int = 2


def check(recipe: Recipe) -> None:
    """Raise TokenizerError for a recipe that cannot be."""
    if recipe.style not in STYLES:
        raise TokenizerError(f"style {recipe.style!r:.80} is not known; choose {', '.join(STYLES)}")
    least = 256 + len(recipe.specials)
    if not least <= recipe.vocabulary <= MOST:
        raise TokenizerError(
            f"a vocabulary of {recipe.vocabulary:,} tokens: expected {least:,} (256 bytes and "
            f"{len(recipe.specials)} special tokens) to {MOST:,}"
        )
    if recipe.min_frequency < 1:
        raise TokenizerError(f"a least frequency of {recipe.min_frequency}: expected 1 or more")
    letters = byte_letters()
    for token in recipe.specials:
        if not token or token in letters or recipe.specials.count(token) > 1:
            raise TokenizerError(
                f"special token {token!r:.80}: expected texts of more than one character, each once"
            )
        try:
            token.encode()
        except UnicodeEncodeError:
            raise TokenizerError(f"special token {token!r:.80} is not Unicode text") from None


def train(pieces: Iterable[str], recipe: Recipe, show_progress: bool = False) -> bytes:
    """tokenizer.json, of fewer tokens than asked for where the text has no more.

    `pieces` are cut where words end (formats/corpus.py). Raises TokenizerError (see `check`).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, trainers

    check(recipe)
    style = STYLES[recipe.style]
    core = Tokenizer.from_str(json.dumps(_frame(recipe)))
    core.model = models.BPE(ignore_merges=style.ignore_merges)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary - len(recipe.specials),
        min_frequency=recipe.min_frequency,
        initial_alphabet=list(byte_letters()),
        show_progress=show_progress,
    )
    failed: list[BaseException] = []

    def guarded() -> Iterator[str]:
        """The library would print what an iterator raises, and go on."""
        try:
            yield from pieces
        except BaseException as error:
            failed.append(error)
            raise

    try:
        core.train_from_iterator(guarded(), trainer)
    except BaseException:
        if failed:
            raise failed[0] from None
        raise
    if failed:
        raise failed[0]
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in recipe.specials]
    )
    document: dict[str, Any] = json.loads(core.to_str())
    _add_beginning(document, recipe)
    return (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode()


def _frame(recipe: Recipe) -> dict[str, Any]:
    style = STYLES[recipe.style]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": style.normalizer} if style.normalizer else None,
        "pre_tokenizer": style.pre_tokenizer(),
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }


def _add_beginning(document: dict[str, Any], recipe: Recipe) -> None:
    """Llama 3 begins each text with a token."""
    if recipe.style != "llama3" or LLAMA3[0] not in recipe.specials:
        return
    (id_,) = (t["id"] for t in document["added_tokens"] if t["content"] == LLAMA3[0])

    def text(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    begin = {"SpecialToken": {"id": LLAMA3[0], "type_id": 0}}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text("A")],
        "pair": [begin, text("A"), begin, text("B")],
        "special_tokens": {LLAMA3[0]: {"id": LLAMA3[0], "ids": [id_], "tokens": [LLAMA3[0]]}},
    }


def configuration(specials: Sequence[str]) -> bytes:
    """tokenizer_config.json: which special tokens are which, and a chat template for them."""
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if set(LLAMA3) <= set(specials):
        names = {"bos_token": LLAMA3[0], "eos_token": LLAMA3[4], "pad_token": LLAMA3[1]}
        found |= {**names, "chat_template": _LLAMA3_TEMPLATE}
    elif set(CHATML) <= set(specials):
        found |= {"eos_token": CHATML[2], "pad_token": CHATML[0], "chat_template": _CHATML_TEMPLATE}
    elif specials:
        found |= {"eos_token": specials[0], "pad_token": specials[0]}
    return (json.dumps(found, ensure_ascii=False, indent=1) + "\n").encode()
