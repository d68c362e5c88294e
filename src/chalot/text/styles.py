"""How GPT-2, Llama 3 and Qwen2 split a text into words, before bytes are merged within each.

The patterns are those of the models' own tokenizer.json. Texts of such models are split by the
compiled kernels, which know these patterns by what differs between them (native/byte_pairs.h);
`style_of` says which one a tokenizer.json has. Every other is left to the `tokenizers` library.
"""

import base64
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chalot.text.kinds import RUNS

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
MODERN = rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s"
MODERN += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Rules(NamedTuple):
    """Style of native/byte_pairs.h, in its order."""

    folds: bool  # contractions in capitals too
    any_lead: bool  # one character of any kind before letters, else only a space
    digit_lead: bool  # a space before digits
    newline_tail: bool  # newlines after signs belong to them
    newline_runs: bool  # white space up to its last newline is one word
    digits: int  # most in a word, 0: no limit


class Style(NamedTuple):
    """A model family's splitting. `pattern` "" is the one built into the ByteLevel step."""

    pattern: str
    normalizer: str | None
    ignore_merges: bool  # a word that is a token stays whole
    rules: Rules

    def pre_tokenizer(self) -> dict[str, Any]:
        """As tokenizer.json says it."""
        if not self.pattern:
            return _byte_level(True)
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated"}
        steps = [{**split, "invert": False}, _byte_level(False)]
        return {"type": "Sequence", "pretokenizers": steps}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


STYLES = {
    "qwen2": Style(MODERN % r"\p{N}", "NFC", False, Rules(True, True, False, True, True, digits=1)),
    "llama3": Style(
        MODERN % r"\p{N}{1,3}", None, True, Rules(True, True, False, True, True, digits=3)
    ),
    "gpt2": Style("", None, False, Rules(False, False, True, False, False, digits=0)),
}


def style_of(pre_tokenizer: Any) -> Style | None:
    """The style that a tokenizer.json's "pre_tokenizer" has, if it is a known one."""

    def plain(found: Any) -> Any:
        if isinstance(found, list):
            return [plain(one) for one in found]
        if not isinstance(found, Mapping):
            return found
        # offsets are not used here, and older files leave out what is the default
        kept = {key: plain(value) for key, value in found.items() if key != "trim_offsets"}
        return {"use_regex": True, **kept} if kept.get("type") == "ByteLevel" else kept

    wanted = plain(pre_tokenizer)
    return next((s for s in STYLES.values() if plain(s.pre_tokenizer()) == wanted), None)


def kinds() -> NDArray[np.uint8]:
    """(0x110000,) 0 other, 1 letter, 2 number, 3 white space, as `tokenizers` sees characters."""
    runs = np.frombuffer(zlib.decompress(base64.b85decode(RUNS)), np.uint8).reshape(-1, 4)
    lengths = runs[:, 1] + (runs[:, 2].astype(np.int64) << 8) + (runs[:, 3].astype(np.int64) << 16)
    return np.repeat(runs[:, 0], lengths)
