"""Text to token ids and back as the model's own tokenizer does it, and the model's chat template.

Marks (see marks.py) are the added tokens that tokenizer.json calls special, those that the
configurations name, and the bracketed added tokens that the chat template writes ("<tool_call>"
in many). Typed by a user they stay text: `encode` and `encode_chat` spell them with ordinary
tokens.

Beginning of text: tokenizer.json's post-processor decides, and add_bos_token in
tokenizer_config.json does not, as in transformers 5 (in 4 it did for the Llama, Gemma and Cohere
classes alone). A chat template writes its own, so encode_chat adds none. Decoding never removes
spaces before punctuation.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol

import msgspec

from chalot.errors import TokenizerError, one_line
from chalot.text.byte_pairs import BytePairs, Native, compile_tables
from chalot.text.marks import Disguise, is_mark, private_characters
from chalot.text.pieces import Incremental
from chalot.text.settings import Settings, read_settings
from chalot.text.template import ChatTemplate, plain, plain_messages
from chalot.text.vocabulary import Vocabulary, parse

Messages = Sequence[Mapping[str, Any]]

MOST_VALUES = 400_000  # and keys in a document, of 110 bytes at most; the largest known has 100,000

# What check_same compares: scripts, both normal forms of Vietnamese, emoji, spaces, numbers, code.
SAMPLE = (
    "Hello,  world! It's 3.14159 or 1,000,000.\n\n\tdef f(x): return x**2  # ok\r\n"
    "Tiếng Việt có dấu; Tie\u0302\u0301ng Vie\u0323\u0302t. Größe, naïve, Ελλάδα, Привет, "
    "שלום, مرحبا, नमस्ते, ไทย, "
    "你好世界，こんにちは、안녕하세요. 👩‍👩‍👧‍👦🏳️‍🌈 ½ €100 \u00a0\u200b<|end|> </s> [INST] ▁ Ġ \x00"
)
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "a\n"},
        {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"},
        {"role": "user", "content": "d"},
    ],
)


class Tokenizer:
    """One model's tokenizer. May be used from any thread."""

    def __init__(self, make_core: Callable[[], Any], settings: Settings) -> None:
        self._make_core: Callable[[], Any] | None = make_core
        self._settings = settings
        self._templates = {
            name: ChatTemplate(source) for name, source in settings.templates.items()
        }
        self._lock = threading.Lock()
        self._open: Vocabulary | None = None
        self.now: datetime | None = None  # what templates see as the date; None for today

    @classmethod
    def from_documents(
        cls,
        tokenizer_json: bytes,
        tokenizer_config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        tables: bytes | None = None,
        native: Native | None = None,
    ) -> "Tokenizer":
        """From the documents of a Hugging Face folder, those in JSON already parsed.

        `tables` were compiled from tokenizer.json, which then is not read; `native`, the
        extension's BytePairs, reads them fast. Raises TokenizerError if a configuration has values
        of another type; what is wrong with tokenizer.json itself is found when text is first used.
        """

        def core() -> Any:
            return parse(tokenizer_json) if tables is None else BytePairs(tables, parse, native)

        return cls(core, read_settings(tokenizer_config, generation_config, chat_template))

    @property
    def _opened(self) -> Vocabulary:
        with self._lock:
            if self._open is None:
                assert self._make_core is not None
                self._open = Vocabulary(self._make_core(), self._settings)
                self._make_core = None  # holds up to 30 MB
            return self._open

    # ---- ids

    def _id(self, name: str) -> int | None:
        text = self._settings.named.get(name)
        if text is None:
            return self._settings.default_ids.get(name)
        found = self._settings.ids.get(text)
        return self._opened.core.token_to_id(text) if found is None else found

    @cached_property
    def bos_id(self) -> int | None:
        """The token that begins a text, if there is one."""
        return self._id("bos_token")

    @cached_property
    def pad_id(self) -> int | None:
        """The token that fills up a batch, if there is one."""
        return self._id("pad_token")

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end an answer, by generation_config.json, tokenizer and chat template."""
        found = {self._id("eos_token"), self._turn_end()} - {None}
        return self._settings.eos_ids | {id_ for id_ in found if id_ is not None}

    def _turn_end(self) -> int | None:
        """The special token that the chat template writes right behind what the model said.

        Some configurations leave it out: Gemma's first name <eos> alone, and not <end_of_turn>.
        """
        said = "Said by the model."
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
        try:
            text = self.render(turns, add_generation_prompt=False)
        except TokenizerError:  # no template, or one of another kind of model
            return None
        behind = text.rpartition(said)[2].lstrip() if said in text else ""
        special = self._opened.special
        ends = [token for token in special if behind.startswith(token) and is_mark(token)]
        return special[max(ends, key=len)] if ends else None

    @property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids; `decode` leaves them out."""
        return dict(self._opened.special)

    @property
    def vocabulary_size(self) -> int:
        """One more than the greatest token id: rows that an embedding needs at least."""
        return self._opened.size

    # ---- text

    def encode(self, text: str, *, specials: bool = False, start: bool = True) -> list[int]:
        """Ids of a text; at its `start`, with a beginning where the model's tokenizer adds one.

        Special tokens in it are text, unless `specials`. Raises TokenizerError for text that is not
        Unicode (half of a surrogate pair).
        """
        return self._opened.encode(text, marks=specials, post_process=start)

    def decode(self, ids: Iterable[int], skip_specials: bool = True) -> str:
        """Text of ids. Bytes that are not UTF-8 become U+FFFD, ids without a token nothing."""
        stream = self.incremental(skip_specials=skip_specials)
        return "".join([stream.push(id_) for id_ in ids]) + stream.flush()

    def piece(self, id_: int) -> bytes:
        """The bytes that a token stands for inside a text; none for an id without a token."""
        return self._opened.pieces.piece(id_, False)

    def incremental(self, *, skip_specials: bool = True) -> Incremental:
        """A decoder that takes one id after the other."""
        return Incremental(
            self._opened.pieces, self._opened.hidden if skip_specials else frozenset()
        )

    # ---- chat

    @property
    def has_chat_template(self) -> bool:
        """Whether `render` and `encode_chat` can be used."""
        return bool(self._templates)

    def chat_template(self, tools: Any = None) -> ChatTemplate:
        """The template for a conversation. Raises TokenizerError if the model has none."""
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        if not self._templates:
            raise TokenizerError(
                "this model has no chat template, so it was not made for conversations; "
                "give it a text to continue instead (`chalot run`)"
            )
        raise TokenizerError(
            f"found chat templates named {', '.join(map(repr, self._templates))}, "
            "expected one named 'default'"
        )

    def _variables(
        self, messages: Messages, add_generation_prompt: bool, tools: Any, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        messages = plain_messages(messages)
        given = {"tools": tools, "documents": None, **kwargs}
        return {
            **plain(given),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        tools: Any = None,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation by the model's own template, as transformers renders it.

        `tools` are JSON schemas, `kwargs` further names that the template knows (enable_thinking,
        ...). Raises TokenizerError if there is no template, or it refuses the messages, fails or
        finds no end.
        """
        variables = self._variables(messages, add_generation_prompt, tools, kwargs)
        return self.chat_template(tools).render({**self._settings.named, **variables}, self.now)

    def encode_chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        tools: Any = None,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of a conversation: those of `render`, where marks in the messages are text.

        Two renderings are compared, one of them disguised. If a template looks for brackets in the
        messages they differ, and a lighter disguise, of whole marks only, is used.
        """
        template, opened = self.chat_template(tools), self._opened
        variables = self._variables(messages, add_generation_prompt, tools, kwargs)
        taken = private_characters({**variables, "": template.source + "".join(opened.marks)})
        disguise = Disguise(opened.marks, opened.soft, taken)
        now = self.now or datetime.now()
        text = template.render({**self._settings.named, **variables}, now)
        disguised = ""
        for strength in (disguise.everywhere, disguise.on_marks):
            hidden = {
                **{name: disguise.put_on(value, strength) for name, value in variables.items()},
                "messages": disguise.put_on_messages(variables["messages"], strength),
            }
            try:
                disguised = template.render({**self._settings.named, **hidden}, now)
            except TokenizerError:
                if strength == disguise.on_marks:
                    raise
                continue
            if disguise.remove(disguised) == text:
                break
        return opened.encode(disguised, marks=True, finish=disguise.remove)


class Source(Protocol):
    """Where documents come from: a checkpoint or a `.myai` file."""

    def document(self, name: str) -> bytes | None:
        """A small file's content, or None if there is none of that name."""


def compiled(tokenizer_json: bytes) -> bytes | None:
    """Tables that open faster than this tokenizer.json; None where there is nothing to gain."""
    return compile_tables(tokenizer_json, parse)


def from_source(
    source: Source, tables: bytes | None = None, native: Native | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint or a `.myai` file; from its tables, if it has them.

    Raises TokenizerError if there is none.
    """
    content = source.document("tokenizer.json") if tables is None else b""
    if content is None:
        raise TokenizerError("found no tokenizer.json; token ids can still be used")
    template = source.document("chat_template.jinja")
    try:
        jinja = None if template is None else template.decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"chat_template.jinja: byte {error.start} is not UTF-8") from None
    return Tokenizer.from_documents(
        content,
        # Older checkpoints name their special tokens in a file of its own.
        {**_json(source, "special_tokens_map.json"), **_json(source, "tokenizer_config.json")},
        _json(source, "generation_config.json"),
        jinja,
        tables,
        native,
    )


def check_same(expected: Tokenizer, found: Tokenizer) -> None:
    """Raise TokenizerError, naming what differs, unless both tokenizers do the same.

    Compared are vocabulary size, special ids, a text of many scripts and rendered conversations.
    """

    def chat(tokenizer: Tokenizer, messages: Messages) -> str:
        try:
            return tokenizer.render(messages)
        except TokenizerError as error:  # a template may refuse a system message; then both must
            return f"refused: {error}"

    marked = " a ".join(sorted(expected.special_tokens)[:300])

    def facts(tokenizer: Tokenizer) -> dict[str, Any]:
        conversations = {
            f"chat template's rendering of conversation {n}": chat(tokenizer, messages)
            for n, messages in enumerate(CONVERSATIONS)
        }
        return {
            "vocabulary size": tokenizer.vocabulary_size,
            "id of the beginning of text": tokenizer.bos_id,
            "ids of the end of text": sorted(tokenizer.eos_ids),
            "padding id": tokenizer.pad_id,
            "special tokens": dict(sorted(tokenizer.special_tokens.items())),
            "chat templates": dict(tokenizer._settings.templates),
            **conversations,
            "ids of a sample text": tokenizer.encode(SAMPLE),
            "ids of a text with special tokens": tokenizer.encode(marked, specials=True),
        }

    dates = expected.now, found.now
    expected.now = found.now = datetime(2001, 2, 3)
    try:
        wanted, got = facts(expected), facts(found)
    finally:
        expected.now, found.now = dates
    for name, value in wanted.items():
        if got[name] != value:
            raise TokenizerError(
                f"tokenizer changed: {name}: found {got[name]!r:.200}, expected {value!r:.200}; "
                "nothing was kept, please report it"
            )


def _json(source: Source, name: str) -> dict[str, Any]:
    content = source.document(name)
    if content and sum(map(content.count, (b",", b":", b"[", b"{"))) > MOST_VALUES:
        raise TokenizerError(
            f"{name}: found more than {MOST_VALUES:,} values and keys; not a model's"
        )
    try:
        found = {} if content is None else msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"{name}: {one_line(error)}; expected JSON; damaged download?"
        ) from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{name}: found a {type(found).__name__}, expected an object")
    return found
