"""One model measured on a text, against the source it was made from where that is named."""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from chalot import __version__
from chalot.convert import convert
from chalot.errors import FormatError
from chalot.evaluate.protocols import PROTOCOLS, check_count, check_protocol
from chalot.evaluate.quality import Quality, Window, compare
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.files import read_text
from chalot.formats.scratch import scratch
from chalot.home import home
from chalot.load import Model
from chalot.quant.packing import DENSE
from chalot.sources import resolve
from chalot.table import pairs


@dataclass(frozen=True)
class EvalReport:
    """What `eval` found. `base` is the source's own quality."""

    model: str
    bytes: int
    bits_per_weight: float
    text: str
    protocol: str
    quality: Quality
    against: str | None = None
    base: Quality | None = None


class Unfinished:
    """Windows measured so far, in a file that the next run goes on from; gone when finished."""

    def __init__(self, key: str) -> None:
        digest = hashlib.sha256(f"{__version__} {key}".encode()).hexdigest()
        self.path = home() / "eval" / f"{digest[:24]}.jsonl"
        self.kept = 0

    def read(self, models: int) -> list[list[Window]]:
        """What an interrupted run left, a line a window; one that is cut or out of turn ends it."""
        found: list[list[Window]] = []
        try:
            for line in self.path.read_bytes().splitlines():
                number, windows = msgspec.json.decode(line, type=tuple[int, list[Window]])
                if number != len(found) or len(windows) != models:
                    break
                found.append(windows)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
        self.kept = len(found)
        return found

    def keep(self, windows: list[Window]) -> None:
        """Add one window's figures; a disk that is full costs only the resuming."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                line = [self.kept, [asdict(w) for w in windows]]
                file.write(msgspec.json.encode(line) + b"\n")
            self.kept += 1
        except OSError:
            pass

    def drop(self) -> None:
        """Forget it."""
        self.path.unlink(missing_ok=True)


@contextmanager
def uncut(source: str | Path, threads: int | None, balance: str | None = None) -> Iterator[Path]:
    """A `.myai` of a source's own numbers: itself, or made for as long as this lasts.

    With `balance` its channels are folded as that scheme would have them, and codes are written as
    numbers; the function of the weights is the same.
    """
    path = resolve(source)
    checkpoint = open_checkpoint(path)
    kinds = {t.dtype for t in checkpoint.tensors.values()}
    is_own = path.suffix == ".myai"
    checkpoint.close()
    if is_own and balance is None:
        yield path
        return
    scheme = next(iter(kinds)) if len(kinds) == 1 else "f32"
    with scratch(home() / "eval", "base-") as made:
        out = made / "base.myai"
        stored = scheme if scheme in DENSE else "f32"
        convert(path, out, stored, threads=threads, balance=balance)
        yield out


def evaluate(
    path: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    protocol: str = "chalot",
    tokens: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> EvalReport:
    """Perplexity of a `.myai` file on a text file; KL and agreement `against` its source.

    `tokens` takes so many of the text's first. The source computes in its own numbers, with a
    float32 cache. What was measured before an interruption is taken up again. Raises FormatError
    for a text that is none, ContextError for one of fewer than two tokens, TokenizerError where
    the models read text differently.
    """
    check_protocol(protocol)
    check_count("--tokens", tokens)
    way = PROTOCOLS[protocol]
    written = read_text(Path(text))
    with Model(path, threads=threads) as model:
        ids = model.tokenizer.encode(written)[:tokens]
        said_of = str(way.within(model.context, len(ids)))
        size = model.file.all_bytes
        bits = model.file.bits_per_weight
        begin = model.tokenizer.bos_id
        said = hashlib.sha256(msgspec.json.encode(ids)).hexdigest()
        if against is None:
            key = Unfinished(f"{model.file.digest} {said} {protocol}")
            found = compare(
                model, [], ids, progress, protocol=way, begin=begin, done=key.read(1), keep=key.keep
            )
            key.drop()
            return EvalReport(str(path), size, bits, str(text), said_of, found[0])
        with uncut(against, threads) as made, Model(made, threads=threads, kv="f32") as base:
            if base.tokenizer.encode(written)[:tokens] != ids:
                raise FormatError(
                    f"{against}: reads this text as other tokens than {path}; expected the model "
                    "that it was made from"
                )
            key = Unfinished(
                f"{model.file.digest} {base.file.manifest.source.digest} {said} {protocol}"
            )
            found = compare(
                base,
                [model],
                ids,
                progress,
                protocol=way,
                begin=begin,
                done=key.read(2),
                keep=key.keep,
            )
            key.drop()
    return EvalReport(str(path), size, bits, str(text), said_of, found[1], str(against), found[0])


def with_error(value: float | None, error: float | None, form: str) -> str:
    """A number, and its error where there is one."""
    if value is None:
        return "-"
    bar = "" if error is None or math.isnan(error) else f" +- {error:{form.lstrip('+')}}"
    return f"{value:{form}}{bar}"


def render(report: EvalReport) -> str:
    """The figures, each with its error."""
    q, base = report.quality, report.base
    size = f"{report.bytes:,} bytes, {report.bits_per_weight:.2f} bits a weight"
    lines = [
        ("model", f"{report.model}, {size}"),
        ("text", f"{report.text}, {q.tokens:,} tokens scored"),
        ("protocol", report.protocol),
        ("perplexity", with_error(q.perplexity, q.perplexity_error, ".4f")),
    ]
    if base is not None:
        spread = f"(median {q.kl_median:.5f}, 99 % {q.kl_99:.4f})"
        lines += [
            ("perplexity of the source", with_error(base.perplexity, base.perplexity_error, ".4f")),
            (
                "loss above the source",
                with_error(q.excess, q.excess_error, "+.5f") + " nats a token",
            ),
            ("KL to the source", f"{with_error(q.kl, q.kl_error, '.5f')} {spread}"),
            ("same top token", f"{q.same_top:.2%}"),
        ]
    if math.isnan(q.loss_error):
        lines.append(("note", "one window only: no error can be given"))
    return pairs(lines)
