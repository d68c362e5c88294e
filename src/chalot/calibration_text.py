"""The text by which scales, experts and bits are chosen: the bundled one or a user's, as tokens."""

import hashlib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from chalot.errors import FormatError, TokenizerError
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.files import read_text
from chalot.model.config import ModelConfig

BUNDLED = ("demo", "model", "calibration.txt")  # disjoint from the held-out text
READ = 1 << 18  # characters of a text that are looked at
FEW = 128  # tokens of it that are enough where only scales are chosen


@dataclass(frozen=True)
class CalibrationText:
    """A text and its name."""

    words: str = field(repr=False)
    name: str

    @staticmethod
    def of(path: str | Path | None = None) -> "CalibrationText":
        """A file's text, or the bundled one. Raises FormatError for a file that is no text."""
        if path is None:
            words = resources.files("chalot").joinpath(*BUNDLED).read_text("utf-8")
            return CalibrationText(words, f"chalot/{'/'.join(BUNDLED)}")
        path = Path(path).expanduser()
        return CalibrationText(read_text(path, f"calibration text {path}"), str(path))

    def __str__(self) -> str:
        return f"{self.name}, sha256 {self.digest[:16]}"

    @property
    def digest(self) -> str:
        """SHA-256 of its bytes in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.words.encode()).hexdigest()

    def ids(self, checkpoint: Checkpoint, config: ModelConfig, least: int) -> list[int]:
        """Its tokens, by the checkpoint's own tokenizer.

        Raises TokenizerError where there is no tokenizer, or one of another vocabulary, and
        FormatError for fewer than `least` tokens.
        """
        ids = _encode(checkpoint, self.words[:READ])
        if ids is None:
            raise TokenizerError(
                f"{checkpoint.path}: has no tokenizer.json; a calibration text cannot be read"
            )
        if ids and max(ids) >= config.vocabulary:
            raise TokenizerError(
                f"{checkpoint.path}: tokenizer.json gives id {max(ids)}, the model has "
                f"{config.vocabulary}; take the tokenizer that belongs to these weights"
            )
        if len(ids) < least:
            raise FormatError(
                f"calibration text {self.name}: {len(ids)} tokens, expected at least {least}; "
                "take a longer text"
            )
        return ids


def few_ids(checkpoint: Checkpoint, config: ModelConfig) -> list[int]:
    """FEW tokens of the bundled text; counted ids where the checkpoint has no tokenizer."""
    ids = _encode(checkpoint, CalibrationText.of().words[:2000]) or ()
    found = [i for i in ids if i < config.vocabulary]
    return found[:FEW] or [(i * 7919) % config.vocabulary for i in range(FEW)]


def _encode(checkpoint: Checkpoint, words: str) -> list[int] | None:
    raw = checkpoint.document("tokenizer.json")
    if raw is None:
        return None
    from chalot.text.tokenizer import Tokenizer

    return Tokenizer.from_documents(raw, None, None, None).encode(words)
