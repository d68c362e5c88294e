"""The small files beside a checkpoint's weights: which, how large, and JSON read strictly.

Sizes are bounded well above what is met in the wild (tokenizer.json of 256k tokens: 34 MB) and well
below what would hurt. JSON is refused where readers would disagree: duplicate keys, NaN, lone
surrogates, nesting without end, or more values than any model has.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from chalot.errors import FormatError
from chalot.formats.files import open_inside, quoted, read_at

MEGABYTE = 1_000_000

DOCUMENTS: dict[str, int] = {  # name -> most bytes
    "config.json": 4 * MEGABYTE,
    "generation_config.json": MEGABYTE,
    "tokenizer.json": 128 * MEGABYTE,
    "tokenizer_config.json": 16 * MEGABYTE,
    "chat_template.jinja": MEGABYTE,
    "special_tokens_map.json": 4 * MEGABYTE,
    "added_tokens.json": 16 * MEGABYTE,
    "vocab.json": 64 * MEGABYTE,
    "merges.txt": 64 * MEGABYTE,
    "model.safetensors.index.json": 64 * MEGABYTE,
}

# A value, a key or a bracket takes up to 110 bytes and 0.6 us. Beyond the free ones a text may have
# one for so many bytes, so that it takes 22 MB and eleven times its length at most. Our manifests
# have one for 10.6, headers of safetensors files one for 8, and never so many.
FREE_VALUES, BYTES_A_VALUE = 200_000, 10
MAX_JSON_VALUES = 2_000_000  # the largest tokenizer's has 1.3 million
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_document(folder: Path, name: str) -> bytes | None:
    """The bytes of one of `DOCUMENTS` in `folder`, or None if it is not there.

    Raises FormatError if it is too large, not UTF-8, or not a regular file of that folder.
    """
    if name not in DOCUMENTS:
        raise ValueError(f"{name} is none of the documents {', '.join(DOCUMENTS)}")
    path = folder / name
    if not path.is_symlink() and not path.exists():
        return None
    limit = DOCUMENTS[name]
    with open_inside(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise FormatError(
                f"{path}: found more than {limit:,} bytes, expected at most that many"
            )
        content = read_at(file, path, 0, size)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: byte {error.start} is not UTF-8; damaged download?") from None
    return content


def parse_json(content: bytes, where: object, dense: bool = False) -> Any:
    """A JSON text as Python values, checked. Raises FormatError that begins with `where`.

    Refuses what is not UTF-8, more than `MAX_JSON_VALUES` values, more than a text of that length
    has unless it is `dense` as vocabularies are, duplicate keys, NaN and infinity, lone surrogates,
    and nesting past Python's recursion limit.
    """
    if content.count(b",") > MAX_JSON_VALUES:
        raise FormatError(f"{where}: found more than {MAX_JSON_VALUES:,} values; not a model's")
    most = FREE_VALUES + len(content) // BYTES_A_VALUE
    if not dense and sum(map(content.count, (b",", b":", b"[", b"{"))) > most:
        raise FormatError(f"{where}: found more than {most:,} values and keys; not a model's")

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise FormatError(f"{where}: key {quoted(name)} is there twice; expected once")
        return found

    def refuse_constant(text: str) -> NoReturn:
        raise FormatError(f"{where}: found {text}, which is not JSON")

    try:
        found = json.loads(
            content.decode(),
            object_pairs_hook=without_duplicates,
            parse_constant=refuse_constant,
        )
        if SURROGATE.search(content):  # a lone one, which could not be printed, is a ValueError
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: byte {error.start} is not UTF-8; damaged download?") from None
    except RecursionError:
        raise FormatError(f"{where}: nested too deeply; not a model's") from None
    except ValueError as error:  # also integers of more than 4,300 digits
        raise FormatError(f"{where}: is not JSON ({error}); damaged download?") from None
