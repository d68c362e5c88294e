"""The documents of a tokenizer: tokenizer.json, what stands beside it, chat templates."""

import json
from pathlib import Path
from random import Random
from typing import Any

import vocabularies
from attacks.changes import BOMBS, changed_bytes, changed_text
from attacks.reader import Reader as Base
from chalot.text.tokenizer import compiled, from_source

TEXT = "Hello, 12 world! Ti\u1ebfng <|im_end|> \U0001f600\n\n x"
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRICKS = ("{% for i in range(10**9) %}x{% endfor %}", "{{ 'a' * 10**9 }}", "{{ m.__class__ }}")
TRICKS += (
    "{{ ''.__class__.__mro__ }}",
    "{% include '/etc/passwd' %}",
    "{{ 9**9**9 }}",
    "{% raw %}",
)
CONFIG = {
    "eos_token": "<|im_end|>",
    "pad_token": {"content": "<|endoftext|>", "special": True},
    "additional_special_tokens": ["<|im_start|>"],
    "added_tokens_decoder": {"900": {"content": "<|im_end|>", "special": True}},
    "extra_special_tokens": {"image_token": "<img>"},
    "chat_template": TEMPLATE,
}
GENERATION = {"eos_token_id": [2, 0], "pad_token_id": 0, "bos_token_id": 1, "temperature": 0.7}

JSON, BESIDE, GENERATE, CHAT = (
    *("tokenizer.json", "tokenizer_config.json"),
    *("generation_config.json", "chat_template.jinja"),
)
BEGUN = json.loads(vocabularies.sentencepiece())
BEGIN = BEGUN["post_processor"]["special_tokens"]
BEGIN["x"] = BEGIN.pop("<s>")
CASES = {  # name -> ((document, its content), part of the message)
    "bytes": ((JSON, b"\xff\x00"), JSON),
    "deep": ((JSON, b"[" * 100_000), JSON),
    "nothing": ((JSON, b""), JSON),
    "a token of two lines": (
        (JSON, vocabularies.byte_level().replace(b'"merges":[', b'"merges":[["\\n\\n","a"],')),
        "out of vocabulary",
    ),
    "a beginning that is not there": ((JSON, json.dumps(BEGUN).encode()), "no entry found"),
    "beside: list": ((BESIDE, b"[]"), "expected an object"),
    **{f"bomb: {name}": ((JSON, bomb), JSON) for name, bomb in BOMBS.items()},
    **{f"beside: bomb: {n}": ((BESIDE, bomb), "found more than") for n, bomb in BOMBS.items()},
    "beside: cut": ((BESIDE, b"{"), "expected JSON"),
    "beside: deep": ((BESIDE, b"[" * 100_000), "expected JSON"),
    "beside: a number": ((BESIDE, b'{"eos_token": 5}'), BESIDE),
    "beside: added": ((BESIDE, b'{"added_tokens_decoder": {"1": 2}}'), BESIDE),
    "beside: template": ((BESIDE, b'{"chat_template": [{"name": 1}]}'), BESIDE),
    "end: negative": ((GENERATE, b'{"eos_token_id": -1}'), GENERATE),
    "end: huge": ((GENERATE, b'{"eos_token_id": 99999999999999999999}'), GENERATE),
    "end: text": ((GENERATE, b'{"eos_token_id": ["2"]}'), GENERATE),
    "template: bytes": ((CHAT, b"\xff"), "is not UTF-8"),
    "template: long": ((CHAT, b"x" * 300_000), "expected at most"),
    **{
        f"template: {n}": ((CHAT, trick.encode()), "chat template")
        for n, trick in enumerate(TRICKS[:5])
    },
}


class Reader(Base):
    """Small tokenizers of four kinds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        v = vocabularies
        self.wholes = [
            json.loads(made()) for made in (v.byte_level, v.llama3, v.sentencepiece, v.unigram)
        ]

    def write(self, rng: Random | None) -> None:
        """See Base."""
        parsed: dict[str, Any] = {
            "tokenizer.json": self.wholes[0] if rng is None else rng.choice(self.wholes),
            "tokenizer_config.json": CONFIG,
            "generation_config.json": GENERATION,
        }
        files = {name: json.dumps(found).encode() for name, found in parsed.items()}
        files["chat_template.jinja"] = TEMPLATE.encode()
        if rng is not None:
            name = rng.choice(["tokenizer.json", *files])
            if name in parsed:
                files[name] = changed_text(parsed[name], rng)
            elif rng.random() < 0.4:
                at = rng.randrange(len(TEMPLATE))
                files[name] = (TEMPLATE[:at] + rng.choice(TRICKS) + TEMPLATE[at:]).encode()
            else:
                files[name] = changed_bytes(files[name], rng)
        for name, content in files.items():
            (self.folder / name).write_bytes(content)

    def put(self, content: tuple[str, bytes]) -> None:
        """A document and its content."""
        (self.folder / content[0]).write_bytes(content[1])

    def document(self, name: str) -> bytes | None:
        """As a checkpoint gives it."""
        path = self.folder / name
        return path.read_bytes() if path.exists() else None

    def read(self) -> None:
        """See Base."""
        use(self)
        tables = compiled(self.document("tokenizer.json") or b"")
        use(self, tables)


def use(source: Any, *tables: Any) -> None:
    """Ids of a text and of a conversation, and back."""
    tokenizer = from_source(source, *tables)
    ids = tokenizer.encode(TEXT)
    tokenizer.decode(ids)
    tokenizer.encode(TEXT, specials=True)
    _ = tokenizer.eos_ids, tokenizer.vocabulary_size
    tokenizer.encode_chat(TALK)
