"""What drafting needs of files: a small model with the same ids, and what passes cost here.

Costs are kept in CHALOT_HOME for each model file, instruction set and number of threads. They
decide how fast an answer comes and nothing else, so a file that is missing or damaged is no error.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import msgspec

from chalot.engine.draft_model import ModelDrafter
from chalot.engine.drafting import Drafter, Several, TextDrafter
from chalot.engine.generate import CHUNK, Engine
from chalot.engine.layer_draft import LayerDrafter, Shallow
from chalot.engine.pacing import Costs, StepCosts
from chalot.engine.sampler import SamplingError
from chalot.errors import OutputError, TokenizerError
from chalot.formats.myai import MyaiFile
from chalot.home import home
from chalot.typed import DRAFT, check_types

if TYPE_CHECKING:
    from chalot.text.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
MOST_BYTES = 100_000  # of a file with costs
ENOUGH = 8  # passes of one token, below which an average is not worth keeping
Draft = bool | str | Path  # whether to draft, or the file of a small model that drafts too
MOST_TOKENS = 256  # of a pass whose cost is kept
Tokens = Annotated[int, msgspec.Meta(ge=2, le=MOST_TOKENS)]
Ratio = Annotated[float, msgspec.Meta(ge=1, le=256)]


class Speaker(Protocol):
    """What is asked of a loaded model."""

    @property
    def file(self) -> MyaiFile: ...

    @property
    def engine(self) -> Engine: ...

    @property
    def tokenizer(self) -> "Tokenizer": ...

    def close(self) -> None: ...


class Drafters:
    """Makes what drafts a model's texts, and keeps the small models that it opened."""

    def __init__(
        self,
        engine: Engine,
        opened: Callable[[Path], Speaker],
        draft: Draft,
        most: int,
        shallow: Shallow | None = None,
    ) -> None:
        """`opened` opens a small model, or refuses; `draft` and `most` are the defaults.

        `shallow` drafts too, where it is there and no small model does.

        Raises what `make` raises.
        """
        self.engine = engine
        self.opened = opened
        self.shallow = shallow
        self.defaults = draft, most
        self.small: dict[Path, Speaker] = {}
        self.make(draft, most)

    def chosen(self, draft: Draft | None, most: int | None) -> tuple[Draft, int]:
        """The defaults in place of None."""
        default, limit = self.defaults
        return default if draft is None else draft, limit if most is None else most

    def make(self, draft: Draft, most: int) -> Drafter | None:
        """What drafts a text of its own, at most so many tokens at a time; None for nothing.

        Raises SamplingError for a length that is none, TokenizerError for a model with other ids.
        """
        check_types(draft=(draft, DRAFT))
        if not (isinstance(most, int) and 0 <= most < CHUNK):
            raise SamplingError(f"draft_tokens is {most!r}; expected 0 to {CHUNK - 1}")
        if not most or draft is False:
            return None
        costs = self.engine.costs
        from_text = TextDrafter(costs, most)
        if draft is True and self.shallow is not None:
            return Several([from_text, LayerDrafter(self.shallow, costs, most)])
        if draft is True:
            return from_text
        path = Path(draft).expanduser()
        if path not in self.small:
            self.small[path] = self.opened(path)
        by_model = ModelDrafter(self.small[path].engine, self.engine.vocabulary, costs, most)
        return Several([from_text, by_model])

    def by_text(self) -> Callable[[Costs], Drafter] | None:
        """What makes drafters of texts that share passes; small models do not draft there."""
        draft, most = self.defaults
        return partial(TextDrafter, most=most) if draft and most else None

    def close(self) -> None:
        """Close the small models."""
        while self.small:
            self.small.popitem()[1].close()
        self.opened = _closed  # what was there knows the model, which would hold itself in memory


def _closed(path: Path) -> Speaker:
    """In place of what opens small models, when the model is closed."""
    raise TokenizerError(f"{path}: cannot draft for a model that is closed; open it again")


def check_same_ids(model: Speaker, small: Speaker) -> None:
    """Raise TokenizerError unless the tokens of both models have the same ids.

    Equal documents are enough, whatever the size of the embedding, which may be padded; else every
    token is compared. Models without a tokenizer must have equally many ids.
    """
    files = model.file, small.file
    documents = [file.manifest.documents.get(TOKENIZER) for file in files]
    sizes = [file.manifest.config["vocabulary"] for file in files]
    remedy = "choose a draft model of the same family, or --no-draft"
    if not all(documents):
        if not any(documents) and sizes[0] == sizes[1]:
            return
        expected, found = (
            f"{size} ids without a tokenizer" if document is None else "a tokenizer"
            for size, document in zip(sizes, documents, strict=True)
        )
        raise TokenizerError(
            f"{small.file.path}: found {found}, expected {expected} as in {model.file.path}; "
            f"{remedy}"
        )
    if len({d.sha256 for d in documents if d}) == 1:
        return
    large, little = model.tokenizer, small.tokenizer
    if large.vocabulary_size != little.vocabulary_size:
        raise TokenizerError(
            f"{small.file.path}: found {little.vocabulary_size} tokens, expected "
            f"{large.vocabulary_size} as in {model.file.path}; {remedy}"
        )
    for n in range(large.vocabulary_size):
        if large.piece(n) != little.piece(n):
            raise TokenizerError(
                f"{small.file.path}: found {little.piece(n)!r:.60} as token {n}, expected "
                f"{large.piece(n)!r:.60} as in {model.file.path}; {remedy}"
            )


def costs_at(file: MyaiFile, isa: str, threads: int) -> Path:
    """Where what passes cost is kept."""
    return home() / "costs" / f"{file.digest[:24]}-{isa}-{threads}.json"


def read_costs(file: MyaiFile, isa: str, threads: int) -> StepCosts:
    """What was measured earlier, or nothing."""
    costs = StepCosts()
    with suppress(OSError, OutputError, msgspec.MsgspecError, UnicodeDecodeError):
        with costs_at(file, isa, threads).open("rb") as kept:
            raw = kept.read(MOST_BYTES + 1)
        if len(raw) <= MOST_BYTES:
            costs.relative.update(msgspec.json.decode(raw, type=dict[Tokens, Ratio]))
    return costs


def keep_costs(costs: StepCosts, file: MyaiFile, isa: str, threads: int) -> None:
    """Keep what was measured for the next time, where there is enough of it and a place for it."""
    if costs.passes.get(1, 0) < ENOUGH or len(costs.passes) < 2:
        return
    with suppress(OSError, OutputError):
        place = costs_at(file, isa, threads)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}.partial")
        try:
            known = {n: round(ratio, 4) for n, ratio in costs.relative.items() if n <= MOST_TOKENS}
            partial.write_bytes(msgspec.json.encode(dict(sorted(known.items()))))
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)
