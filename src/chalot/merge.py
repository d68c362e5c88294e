"""The verb `merge`: two checkpoints of one shape become one, a run of rows at a time.

    linear   (1 - w) a + w b                                  (Wortsman et al., arXiv 2203.05482)
    slerp    (sin((1 - w) t) a + sin(w t) b) / sin t, t the angle between a and b as long vectors;
             matrices alone, and not where they are nearly parallel: those go by `linear`
             (Shoemake, SIGGRAPH 1985)
    task     base + w ((a - base) + (b - base))               (Ilharco et al., arXiv 2212.04089)

The merged checkpoint is a view over the sources (`Merged`): nothing of it is in memory, and it is
written as any other. Whether two models have anything in common that a mean keeps, weights do not
say: they should be tuned from one model. `chalot eval` says what came of it.
"""

import math
import shlex
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chalot.checking import RUN, check_shapes, read_config
from chalot.convert import ConvertReport, check_place
from chalot.convert.conversion import Progress
from chalot.errors import ChalotError, UnsupportedError
from chalot.export import TARGETS, Options, refuse_useless, target_of
from chalot.formats.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from chalot.formats.myai.source import MyaiSource
from chalot.formats.names import hugging_face
from chalot.formats.view import CheckpointView
from chalot.model.config import ModelConfig
from chalot.model.layers import model_tensors
from chalot.typed import MAY_COUNT, MAY_PATH, MAY_TEXT, PATH, check_types

Floats = NDArray[np.float32]
METHODS = {"linear": (0.5, 0.0, 1.0), "slerp": (0.5, 0.0, 1.0), "task": (1.0, -4.0, 4.0)}
PARALLEL = 0.9995  # cosine from which on an angle is too small to divide by its sine
FREE = ("context",)  # of configurations: may differ, the first one's is kept


class MergeError(ChalotError, ValueError):
    """A method or weight that is none."""


@dataclass(frozen=True)
class Recipe:
    """How tensors are merged: a row of METHODS, and `weight`, None for the method's own."""

    method: str = "linear"
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MergeError(
                f"--method {self.method}: not known; choose one of: {', '.join(METHODS)}"
            )
        usual, low, high = METHODS[self.method]
        if self.weight is None:
            object.__setattr__(self, "weight", usual)
        elif not (math.isfinite(self.weight) and low <= self.weight <= high):
            raise MergeError(
                f"--weight {self.weight}: --method {self.method} takes {low:g} to {high:g}"
            )

    @property
    def share(self) -> float:
        """The weight."""
        assert self.weight is not None
        return self.weight


def sine(x: float) -> float:
    """The sine of 0 to pi, by Taylor's series: a library's differs between machines."""
    if x > math.pi / 2:
        x = math.pi - x
    term, total = x, x
    for k in range(3, 28, 2):
        term *= -x * x / (k * (k - 1))
        total += term
    return total


def angle(cosine: float) -> float:
    """The angle, 0 to pi, of a cosine, by halving: cos t = 1 - 2 sin^2(t / 2) falls with t."""
    low, high = 0.0, math.pi
    for _ in range(60):
        middle = (low + high) / 2
        if 1 - 2 * sine(middle / 2) ** 2 > cosine:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class Merged(CheckpointView):
    """A `Checkpoint` (see formats/checkpoint.py): what two give together, documents of the first.

    It closes its sources with itself.
    """

    def __init__(self, sources: list[Checkpoint], recipe: Recipe) -> None:
        """`sources` are A, B, and for "task" their base.

        Raises FormatError for a checkpoint that is not whole, UnsupportedError for those that are
        not of one shape.
        """
        infos: dict[str, TensorInfo] = {}
        for spec in model_tensors(check_alike(sources)):
            name = hugging_face(spec.name)
            infos[name] = TensorInfo(name, "f32", spec.shape, 4 * math.prod(spec.shape))
        super().__init__(sources[0], infos)
        self.sources, self.recipe = sources, recipe
        self.shares: dict[str, tuple[np.float32, np.float32]] = {}

    def raw(self, name: str) -> NDArray[Any]:
        """As `float32`: what is merged is stored nowhere."""
        return self.float32(name)

    def float32(self, name: str, first: int = 0, last: int | None = None) -> Floats:
        """Rows `first:last` as float32. Raises FormatError, and IndexError for missing rows."""
        last = self.end(name, first, last)
        a, b, *base = (source.float32(name, first, last) for source in self.sources)
        if base:
            moved: Floats = (a - base[0]) + (b - base[0])
            moved *= np.float32(self.recipe.share)
            moved += base[0]
            return moved
        of_a, of_b = self._shares(name)
        merged: Floats = of_a * a + of_b * b
        return merged

    def _shares(self, name: str) -> tuple[np.float32, np.float32]:
        """What a tensor of A and of B is multiplied with."""
        if name not in self.shares:
            w = self.recipe.share
            of_a, of_b = 1 - w, w
            matrix = len(self.infos[name].shape) > 1
            if self.recipe.method == "slerp" and matrix and 0 < w < 1:
                t = self._angle(name)
                if t is not None:
                    of_a, of_b = (sine(part * t) / sine(t) for part in (1 - w, w))
            self.shares[name] = np.float32(of_a), np.float32(of_b)
        return self.shares[name]

    def _angle(self, name: str) -> float | None:
        """The angle between a tensor of A and of B; None where a sine of it would be nearly 0."""
        rows, columns = self.infos[name].shape
        size, sums = max(1, (RUN // 8) // columns), [0.0, 0.0, 0.0]
        for first in range(0, rows, size):
            a, b = (
                s.float32(name, first, min(first + size, rows)).ravel().astype(np.float64)
                for s in self.sources
            )
            for i, product in enumerate((a * b, a * a, b * b)):  # exact, then added in order
                sums[i] += float(np.add.accumulate(product)[-1])
        if not (sums[1] > 0 and sums[2] > 0 and all(map(math.isfinite, sums))):
            return None
        cosine = sums[0] / (math.sqrt(sums[1]) * math.sqrt(sums[2]))
        return None if abs(cosine) > PARALLEL else angle(cosine)

    def check_unchanged(self) -> None:
        """Raise FormatError if a source changed since it was opened."""
        for source in self.sources:
            source.check_unchanged()

    def close(self) -> None:
        """Give back the sources' files."""
        for source in self.sources:
            source.close()


def check_alike(sources: list[Checkpoint]) -> ModelConfig:
    """The configuration of all. Raises FormatError, UnsupportedError where they differ."""
    first, *others = (read_config(source) for source in sources)
    for source, config in zip(sources[1:], others, strict=True):
        for field in ModelConfig.__struct_fields__:
            found, here = getattr(config, field), getattr(first, field)
            if found != here and field not in FREE:
                raise UnsupportedError(
                    f"{source.path}: {field} is {found!r:.60}, of {sources[0].path} it is "
                    f"{here!r:.60}; only models of one shape and function can be merged"
                )
    for source in sources:
        if isinstance(source, MyaiSource) and any(t.scheme for t in source.tensors.values()):
            raise UnsupportedError(
                f"{source.path}: was balanced and coded when it was converted, its weights are no "
                "longer those of other models; merge the checkpoints that it was made from"
            )
        check_shapes(first, source)
    return first


def merge(
    a: str | Path,
    b: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    base: str | Path | None = None,
    to: str | None = None,
    scheme: str | None = None,
    type: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> ConvertReport:
    """Write what checkpoints `a` and `b` give together to `out`; tokenizer and texts are a's.

    `base` is what both were tuned from, for the method "task". `to`, `scheme` and `type` are as for
    `chalot.export`. The file or folder appears whole or not at all. Raises MergeError for a recipe
    that is none, UnsupportedError for models of different shapes, and any other ChalotError for
    what is wrong with sources or place.
    """
    from chalot.sources import called, resolve

    check_types(a=(a, PATH), b=(b, PATH), out=(out, PATH), base=(base, MAY_PATH))
    check_types(to=(to, MAY_TEXT), scheme=(scheme, MAY_TEXT), type=(type, MAY_TEXT))
    check_types(threads=(threads, MAY_COUNT))
    recipe = recipe or Recipe()
    if (base is not None) != (recipe.method == "task"):
        needs = "needs" if recipe.method == "task" else "has no use for"
        raise MergeError(f"--method {recipe.method} {needs} --base, what both were tuned from")
    to = target_of(to, out)
    given = {"type": type, "scheme": scheme}
    refuse_useless(to, lambda setting: bool(given.get(setting)))
    watch = progress or (lambda *_: None)
    with ExitStack() as opened:
        sources: list[Checkpoint] = []
        for named in (a, b) if base is None else (a, b, base):
            found = resolve(named, progress)
            check_place(Path(out), found)
            sources.append(open_checkpoint(found))
            opened.callback(sources[-1].close)
        said = command or shlex.join(["chalot", "merge", str(a), str(b), "-o", str(out)])
        options = Options(
            f"{called(a)} + {called(b)}",
            type,
            scheme,
            command=said,
            threads=threads,
            progress=watch,
        )
        report = TARGETS[to].write(Merged(sources, recipe), Path(out), options)
        if sources[0].document("tokenizer.json") != sources[1].document("tokenizer.json"):
            note = (
                f"the tokenizers of the two differ; what was written is that of {sources[0].path}"
            )
            report = replace(report, notes=(*report.notes, note))
        return report
