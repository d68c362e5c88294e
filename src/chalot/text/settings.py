"""What the documents beside tokenizer.json say: special tokens, their ids, chat templates.

Read without opening tokenizer.json, which takes 0.4 s for a large vocabulary. Shapes are those that
transformers 4 and 5 write: https://huggingface.co/docs/transformers/main_classes/tokenizer
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec

from chalot.errors import TokenizerError, one_line

Shape = TypeVar("Shape")
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Token(msgspec.Struct):
    """A token written as an object."""

    content: str
    special: bool = True


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


_Text = str | _Token


class _TokenizerConfig(msgspec.Struct):
    bos_token: _Text | None = None
    eos_token: _Text | None = None
    unk_token: _Text | None = None
    sep_token: _Text | None = None
    pad_token: _Text | None = None
    cls_token: _Text | None = None
    mask_token: _Text | None = None
    additional_special_tokens: list[_Text] | None = None
    extra_special_tokens: list[_Text] | dict[str, _Text] | None = None
    added_tokens_decoder: dict[str, _Token] | None = None
    chat_template: str | list[_NamedTemplate] | dict[str, str] | None = None


class _GenerationConfig(msgspec.Struct):
    bos_token_id: TokenId | list[TokenId] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | list[TokenId] | None = None


@dataclass(frozen=True)
class Settings:
    """See module. `named` goes from "bos_token" and the like to texts."""

    named: Mapping[str, str]
    special: frozenset[str]  # every text that is called special here, the named ones included
    ids: Mapping[str, int]  # of the texts in added_tokens_decoder
    eos_ids: frozenset[int]  # by generation_config.json alone
    default_ids: Mapping[str, int]  # of "bos_token" and "pad_token" by generation_config.json
    templates: Mapping[str, str]


def _text(token: _Text) -> str:
    return token if isinstance(token, str) else token.content


def _read(document: Mapping[str, Any] | None, shape: type[Shape], name: str) -> Shape:
    try:
        return msgspec.convert({} if document is None else dict(document), shape)
    except (msgspec.ValidationError, TypeError, RecursionError) as error:
        raise TokenizerError(
            f"{name}: {one_line(error)}; expected what transformers writes"
        ) from None


def _as_list(found: int | list[int] | None) -> list[int]:
    return found if isinstance(found, list) else [] if found is None else [found]


def read_settings(
    tokenizer_config: Mapping[str, Any] | None,
    generation_config: Mapping[str, Any] | None,
    chat_template: str | None,
) -> Settings:
    """Read the two configurations; `chat_template` (chat_template.jinja) comes before theirs.

    Raises TokenizerError for a value of another type than expected; keys not used here are ignored.
    """
    config = _read(tokenizer_config, _TokenizerConfig, "tokenizer_config.json")
    generation = _read(generation_config, _GenerationConfig, "generation_config.json")
    named = {name: _text(token) for name in NAMES if (token := getattr(config, name)) is not None}
    extra = config.extra_special_tokens or []
    more = [
        *(config.additional_special_tokens or []),
        *(extra.values() if isinstance(extra, dict) else extra),
    ]
    added = config.added_tokens_decoder or {}
    flagged = [token.content for token in added.values() if token.special]
    defaults = {"bos_token": generation.bos_token_id, "pad_token": generation.pad_token_id}
    return Settings(
        named=named,
        special=frozenset(text for text in [*named.values(), *map(_text, more), *flagged] if text),
        ids={
            token.content: int(key)
            for key, token in added.items()
            if key.isascii() and key.isdigit()
        },
        eos_ids=frozenset(_as_list(generation.eos_token_id)),
        default_ids={name: found[0] for name, ids in defaults.items() if (found := _as_list(ids))},
        templates=_templates(config, chat_template),
    )


def _templates(config: _TokenizerConfig, chat_template: str | None) -> dict[str, str]:
    """Templates by name; the usual one is "default"."""
    found = config.chat_template
    if isinstance(found, list):
        templates = {one.name: one.template for one in found}
    else:
        templates = (
            found if isinstance(found, dict) else {} if found is None else {"default": found}
        )
    return templates if chat_template is None else {**templates, "default": chat_template}
