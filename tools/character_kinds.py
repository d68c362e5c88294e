#!/usr/bin/env python3
"""Writes src/chalot/text/kinds.py: letters, numbers and spaces as `tokenizers` sees them.

    python tools/character_kinds.py > src/chalot/text/kinds.py

Python's own tables are of another version of Unicode in every release.
"""

import base64
import zlib
from itertools import groupby

from tokenizers import Regex, pre_tokenizers

PATTERNS = {1: r"\p{L}+", 2: r"\p{N}+", 3: r"\s+"}


def kinds() -> bytearray:
    """A number of native/byte_pairs.h's Kind for each code point."""
    out = bytearray(0x110000)
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for kind, pattern in PATTERNS.items():
        split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        for at in range(0, len(every), 20_000):
            for word, _ in split.pre_tokenize_str("".join(every[at : at + 20_000])):
                for letter in word:
                    out[ord(letter)] = kind
    return out


def main() -> None:
    """The module, on stdout."""
    runs = bytearray()
    for kind, group in groupby(kinds()):
        length = sum(1 for _ in group)
        runs += bytes((kind,)) + length.to_bytes(3, "little")
    packed = base64.b85encode(zlib.compress(bytes(runs), 9)).decode()
    print('"""Kinds of characters; written by tools/character_kinds.py."""\n')
    print("# zlib, base 85: runs of a kind (1 byte) and a length (3 bytes, little-endian)")
    print("RUNS = (")
    for at in range(0, len(packed), 88):
        print(f'    "{packed[at : at + 88]}"')
    print(")")


if __name__ == "__main__":
    main()
