"""One checkpoint on its way into one file, a tensor at a time.

Nothing larger than a layer is in memory at once. Weights are read in runs of rows, checked, folded,
encoded and written; errors are measured on the way, on some rows of each run.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from chalot.calibration_text import few_ids
from chalot.checking import RUN, check_shapes, read_config
from chalot.convert.keeping import keeps
from chalot.convert.refining import Refining
from chalot.convert.storing import DOCUMENTS, Storing, scheme_of
from chalot.errors import WeightError
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.journal import Finished
from chalot.formats.myai.source import MyaiSource
from chalot.formats.myai.writer import MyaiWriter
from chalot.formats.names import hugging_face
from chalot.kernels.backend import Backend
from chalot.mixture import check_alike, refuse_mixture
from chalot.model.calibration import Calibration, Plan, ordered_sum, some_rows
from chalot.model.config import inverse_frequencies
from chalot.model.layers import KINDS, TensorSpec, layer_tensors, model_tensors
from chalot.quant import coarse, codes, packing
from chalot.quant.carried import carried
from chalot.quant.grids import tables_of
from chalot.quant.scheme import PANEL, SCHEMES, Scheme

Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # what, done, of


@dataclass(frozen=True)
class KindReport:
    """What storing one kind of tensor cost. `error` is relative squared error."""

    kind: str
    scheme: str
    tensors: int
    weights: int
    bytes: int
    error: float
    wide: int  # tensors that ask for 16-bit activations
    folded: int  # tensors whose columns were balanced
    source_error: float | None = None  # what was lost when the source was quantised
    product_errors: tuple[float, float] | None = None  # before and after refinement: refining.py


class Conversion:
    """One checkpoint on its way into one file."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        how: Storing,
        backend: Backend,
        progress: Progress,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = read_config(checkpoint)
        check_shapes(self.config, checkpoint)
        self.specs = model_tensors(self.config)
        matrices = [s for s in self.specs if s.kind != "vector"]
        self.schemes = {s.name: scheme_of(how.schemes, s) for s in matrices}
        self.balanced = {s.name: scheme_of(how.balance or how.schemes, s) for s in matrices}
        check_alike(self.schemes)
        self.absmean = how.ternary == "absmean"
        if self.absmean:
            own = {n for n, s in self.schemes.items() if s.fit == "ternary"}
            self.balanced |= dict.fromkeys(own, SCHEMES["f32"])
        self.offsets = {s.name: np.float32(s.offset) for s in self.specs if s.offset}
        held = checkpoint.tensors
        self.kept = {n for n, s in self.schemes.items() if keeps(held[hugging_face(n)], s)}
        self.backend = backend
        self.progress = progress
        self.digest = hashlib.sha256()
        self.plan = Plan()
        self.refining: Refining | None = None
        if how.refine is not None:
            refuse_mixture(self.config, "--refine", "leave --refine out")
            self.refining = Refining(how.refine, checkpoint, self.config, self.schemes, backend)
        self.errors: dict[str, tuple[float, float]] = {}
        self.taken: set[str] = set()  # tensors that have the source's own codes
        self.shared: set[str] = set()  # tensors that lie in another one's extent
        ours = {hugging_face(s.name): s.name for s in self.specs}
        same = getattr(checkpoint, "aliases", {})  # of a Checkpoint that knows such
        again = how.refine or how.balance or self.absmean
        self.source = checkpoint if isinstance(checkpoint, MyaiSource) and not again else None
        self.copied = all(self._stays(s) for s in self.specs)
        self.same = {ours[n]: ours[of] for n, of in same.items() if n in ours and of in ours}
        self.done = 0
        self.total = sum(int(np.prod(s.shape)) for s in self.specs)

    def _stays(self, spec: TensorSpec) -> bool:
        """Whether a tensor goes into the file as the source, a `.myai` file, has it."""
        scaled = any(spec.name in factors for factors in (self.plan.rows, self.plan.columns))
        if self.source is None or scaled:
            return False
        wanted = str(self.schemes.get(spec.name, "f32"))  # vectors are f32
        return self.source.file.manifest.tensors[spec.name].scheme == wanted

    def _bits(self, name: str) -> int:
        """To how many bits the inputs of a matrix are quantised."""
        if self.copied and self.source is not None:
            return self.source.file.manifest.tensors[name].activation
        return self.plan.planes.get(name, 1) * 8

    def read(self, name: str, first: int = 0, last: int | None = None) -> Floats:
        """Rows of a tensor as it is computed with. Raises WeightError for NaN or Inf."""
        values = self.checkpoint.float32(hugging_face(name), first, last)
        if not np.isfinite(values).all():
            raise WeightError(
                f"{self.checkpoint.path}: tensor {hugging_face(name)} has NaN or Inf among its "
                "weights; take another checkpoint"
            )
        return values + self.offsets[name] if name in self.offsets else values

    def write(self, writer: MyaiWriter) -> None:
        """All tensors, in the order in which a forward pass meets them."""
        frequencies = inverse_frequencies(self.config)
        calibration = self._calibration(frequencies)
        planned = -1
        later = None  # a tied embedding: it is refined as a head, by what comes last
        for spec in self.specs:
            layer = int(spec.name.split(".")[1]) if spec.name.startswith("layers.") else None
            if calibration is not None and layer is not None and layer > planned:
                calibration.layer(layer, self.read, self._source_scheme(layer))
                planned = layer
            if self.refining is not None and spec.name == "embedding" and self.config.tied:
                later = spec
                self._digest(spec)
                continue
            if self.refining is not None and spec.name == "head":
                assert calibration is not None
                self.refining.head(calibration.head_inputs(self.read))
            self._tensor(writer, spec)
        if calibration is not None:  # the head's activations are known only now
            head = "embedding" if self.config.tied else "head"
            rows = np.concatenate(
                [self.read(head, int(i), int(i) + 1) for i in some_rows(self.config.vocabulary)]
            )
            calibration.head(head, self.read, rows)
            if head in writer.tensors:
                writer.tensors[head] = msgspec.structs.replace(
                    writer.tensors[head], activation=8 * self.plan.planes.get(head, 1)
                )
        if later is not None:
            assert calibration is not None and self.refining is not None
            self.refining.head(calibration.head_inputs(self.read))
            digest = self.digest.copy()  # which has it already
            self._tensor(writer, later)
            self.digest = digest
        writer.constants["rope.inverse_frequency"] = writer.extent([frequencies.astype("<f4")])
        for s in SCHEMES.values():
            tables = tables_of(s)
            if tables is not None and s in self.schemes.values():
                writer.constants[f"tables.{s}"] = writer.extent([tables])
        for name in DOCUMENTS:
            raw = self.checkpoint.document(name)
            if raw is not None:
                writer.documents[name] = writer.extent([raw])
        self._tokenizer_tables(writer)
        self.checkpoint.check_unchanged()

    def _tokenizer_tables(self, writer: MyaiWriter) -> None:
        """What opens faster than tokenizer.json, where there is such a thing."""
        raw = self.checkpoint.document("tokenizer.json")
        if raw is not None:
            from chalot.text.byte_pairs import TABLES
            from chalot.text.tokenizer import compiled

            tables = compiled(raw)
            if tables is not None:
                writer.documents[TABLES] = writer.extent([tables])

    def _calibration(self, frequencies: Floats) -> Calibration | None:
        if self.copied or not any(s.is_coded for s in self.balanced.values()):
            return None
        ids = few_ids(self.checkpoint, self.config)
        if self.refining is not None:
            ids = self.refining.ids
        hidden = np.concatenate([self.read("embedding", i, i + 1) for i in ids])
        hidden *= np.float32(self.config.embedding_scale)
        calibration = Calibration(
            self.config, self.balanced, self.backend, frequencies, hidden, self.kept, self.same
        )
        if self.refining is not None:
            calibration.watch = self.refining.watch
        calibration.plan = self.plan
        return calibration

    def _source_scheme(self, layer: int) -> Scheme:
        """The dense scheme that holds a layer's weights as the source stores them."""
        specs = [s for s in layer_tensors(self.config, layer) if s.kind not in ("vector", "router")]
        types = {self.checkpoint.tensors[hugging_face(s.name)].dtype for s in specs}
        dtype = types.pop()
        return SCHEMES[dtype if not types and dtype in packing.DENSE else "f32"]

    def _digest(self, spec: TensorSpec) -> None:
        """Let the source's digest have a tensor that is written later, or was earlier."""
        self.digest.update(f"{spec.name} {spec.shape}".encode())
        size = max(PANEL, RUN // int(np.prod(spec.shape[1:])))
        for first in range(0, spec.shape[0], size):
            values = self.read(spec.name, first, min(first + size, spec.shape[0]))
            self.digest.update(np.ascontiguousarray(values).data)

    def _is_shared(self, name: str, of: str | None) -> bool:
        """Whether a tensor that is another one in the source is stored as that one is."""
        plan = self.plan
        return (
            of is not None
            and self.schemes.get(name) == self.schemes.get(of)
            and all(
                np.array_equal(factors.get(name, 1), factors.get(of, 1))
                for factors in (plan.rows, plan.columns)
            )
        )

    def _share(self, writer: MyaiWriter, spec: TensorSpec, of: str) -> None:
        """Give a tensor the extent of another one."""
        self.digest.update(f"{spec.name} {spec.shape} is {of}".encode())
        writer.alias(spec.name, of, self._bits(spec.name))
        self.shared.add(spec.name)
        if of in self.errors:
            self.errors[spec.name] = self.errors[of]
        if of in self.taken:
            self.taken.add(spec.name)
        self._advance(spec, int(np.prod(spec.shape)))

    def _tensor(self, writer: MyaiWriter, spec: TensorSpec) -> None:
        of = self.same.get(spec.name)
        if of in writer.tensors and self._is_shared(spec.name, of):
            self._share(writer, spec, str(of))
        elif not self._is_there(writer, spec):
            self._make(writer, spec)
            refined = None if self.refining is None else self.refining.errors.get(spec.name)
            said = (self.errors.get(spec.name), refined, spec.name in self.taken)
            entry = writer.tensors[spec.name]
            writer.finished(Finished(spec.name, self._made_of(spec), entry, *said))

    def _is_there(self, writer: MyaiWriter, spec: TensorSpec) -> bool:
        """Whether an interrupted conversion left this very tensor. Its weights are only read."""
        if writer.left is None:
            return False
        before = self.digest.copy()
        self._digest(spec)
        found = writer.take(spec.name, self._made_of(spec))
        if found is None:
            self.digest = before
            return False
        self.errors |= {spec.name: found.errors} if found.errors else {}
        self.taken |= {spec.name} if found.taken else set()
        if found.products is not None and self.refining is not None:
            self.refining.errors[spec.name] = found.products
        self._advance(spec, int(np.prod(spec.shape)))
        return True

    def _made_of(self, spec: TensorSpec) -> str:
        """A digest of all weights up to a tensor's own, and of what those behind it change in it.

        With `storing.making` it decides the tensor's bytes.
        """
        found = self.digest.copy()
        for factors in (self.plan.rows, self.plan.columns):
            found.update(factors[spec.name].tobytes() if spec.name in factors else b"none")
        found.update(bytes([self.plan.planes.get(spec.name, 1)]))
        return found.hexdigest()

    def _copy(self, writer: MyaiWriter, spec: TensorSpec) -> None:
        """A tensor as the source has it, byte for byte."""
        assert self.source is not None
        file = self.source.file
        entry = file.manifest.tensors[spec.name]
        self._digest(spec)
        pieces = file.pieces(entry.extent)
        writer.tensor(spec.name, entry.scheme, entry.shape, pieces, self._bits(spec.name))
        if spec.kind != "vector":
            writer.tensors[spec.name] = msgspec.structs.replace(
                writer.tensors[spec.name], error=entry.error
            )
            sample = self.read(spec.name, 0, min(PANEL, spec.shape[0]))
            self.errors[spec.name] = 0.0, ordered_sum(sample)
            self.taken.add(spec.name)
        self._advance(spec, int(np.prod(spec.shape)))

    def _make(self, writer: MyaiWriter, spec: TensorSpec) -> None:
        if self._stays(spec):
            self._copy(writer, spec)
            return
        self.digest.update(f"{spec.name} {spec.shape}".encode())
        if spec.kind == "vector":
            values = self.read(spec.name)
            self.digest.update(values.data)
            values = self.plan.apply(spec.name, values, 0)
            writer.tensor(spec.name, "f32", spec.shape, [values.astype("<f4")])
            self._advance(spec, values.size)
            return
        scheme, bits = self.schemes[spec.name], self._bits(spec.name)
        writer.tensor(spec.name, str(scheme), spec.shape, self._pieces(spec), bits)
        lost, had = self.errors[spec.name]
        writer.note_error(spec.name, float(f"{lost / max(had, 1e-30):.3g}"))

    def _unit(self, spec: TensorSpec) -> np.float32 | None:
        """The one scale of a matrix; None where each row and segment has its own.

        What is ternary already keeps its scales: the mean would count its zeros.
        """
        held = self.checkpoint.tensors[hugging_face(spec.name)].scheme
        fit = self.schemes[spec.name].fit
        if not self.absmean or fit != "ternary" or held == "ternary":
            return None
        rows, columns = spec.shape
        size = max(PANEL, RUN // columns)
        return coarse.absmean(
            self.plan.apply(spec.name, self.read(spec.name, first, min(first + size, rows)), first)
            for first in range(0, rows, size)
        )

    def _runs(self, spec: TensorSpec) -> Iterator[Floats]:
        """The tensor's rows, folded, in runs that are a multiple of a panel."""
        rows, columns = spec.shape
        size = max(PANEL, RUN // columns // PANEL * PANEL)
        with ThreadPoolExecutor(1) as beside:
            for first in range(0, rows, size):
                values = self.read(spec.name, first, min(first + size, rows))
                digested = beside.submit(self.digest.update, np.ascontiguousarray(values).data)
                yield self.plan.apply(spec.name, values, first)
                digested.result()
                self._advance(spec, values.size)

    def _pieces(self, spec: TensorSpec) -> Iterator[NDArray[np.generic]]:
        """The bytes of a matrix's extent in order: panels, then the other parts of its layout."""
        scheme = self.schemes[spec.name]
        lost, had, at, unit = 0.0, 0.0, 0, self._unit(spec)
        behind: list[list[NDArray[np.uint8]]] = []  # of each part but the panels
        for values in self._runs(spec):
            sample = values[:PANEL]
            if not scheme.is_coded:
                data = packing.pack_dense(values, scheme)
                yield data
                shape = (len(sample), values.shape[1])
                part = data[: packing.stored_bytes(scheme, *shape)]
                again = packing.numbers(packing.Matrix(scheme, shape, part))[:, : shape[1]]
            else:
                layout = packing.Layout(scheme, *values.shape)
                data = self._encoded(spec, at, values, unit)
                yield data[layout.parts[0]]
                # a view would keep all
                behind.append([data[part].copy() for part in layout.parts[1:]])
                few = packing.Layout(scheme, len(sample), values.shape[1])
                part = packing.take_panels(data, layout, few)
                again = codes.dequantize(packing.unpack(part, scheme, (few.rows, few.columns)))
            at += len(values)
            lost += ordered_sum(again - sample)
            had += ordered_sum(sample)
        self.errors[spec.name] = lost, had
        if scheme.is_coded:
            whole = packing.Layout(scheme, spec.shape[0], spec.shape[1])
            for i, (before, after) in enumerate(pairwise(whole.parts)):
                yield np.zeros(after.start - before.stop, np.uint8)
                yield from (of_run[i] for of_run in behind)

    def _encoded(
        self, spec: TensorSpec, first: int, values: Floats, unit: np.float32 | None
    ) -> NDArray[np.uint8]:
        """The extent of some rows: a source's own codes where they are of this form already."""
        scheme, name = self.schemes[spec.name], hugging_face(spec.name)
        held = getattr(self.checkpoint, "codes", None)  # of NpzModel
        is_same = self.checkpoint.tensors[name].scheme == str(scheme)
        if held is not None and is_same and spec.name not in self.plan.columns:
            rows = held(name, first, first + len(values))
            rows = replace(rows, scale=self.plan.apply_rows(spec.name, rows.scale, first))
            found = carried(rows, scheme)
            if found is not None:
                self.taken.add(spec.name)
                return packing.pack(found)
        if unit is not None:
            return packing.pack(codes.quantize(values, scheme, unit))
        data = self.backend.encode(values, scheme)
        if self.refining is None:
            return data
        return self.refining.encoded(spec, values, data, self.plan.columns.get(spec.name))

    def _advance(self, spec: TensorSpec, weights: int) -> None:
        self.done += weights
        self.progress(spec.name, self.done, self.total)

    def is_as_it_was(self, name: str) -> bool:
        """Whether a matrix was not quantised, or not again."""
        scheme, info = self.schemes[name], self.checkpoint.tensors[hugging_face(name)]
        same = keeps(info, scheme) and not self.errors[name][0]
        return not scheme.is_coded or same

    def kinds(self, writer: MyaiWriter) -> Iterator[KindReport]:
        """A row for each kind of tensor there is."""
        for kind in (*KINDS, "vector"):
            names = [s.name for s in self.specs if s.kind == kind]
            if not names:
                continue
            entries = [writer.tensors[n] for n in names]
            lost = sum(self.errors.get(n, (0.0, 0.0))[0] for n in names)
            had = sum(self.errors.get(n, (0.0, 0.0))[1] for n in names)
            yield KindReport(
                kind,
                ", ".join(sorted({e.scheme for e in entries})),
                len(names),
                sum(int(np.prod(e.shape)) for e in entries),
                sum({e.extent: e.extent.bytes for e in entries}.values()),
                lost / had if had else 0.0,
                sum(e.activation == 16 for e in entries),
                sum(n in self.plan.columns for n in names),
                source_error(self.checkpoint, {n: self.errors.get(n, (0.0, 0.0)) for n in names}),
                self.refining.gain(names) if self.refining is not None else None,
            )


def source_error(checkpoint: Checkpoint, sizes: Mapping[str, tuple[float, float]]) -> float | None:
    """The mean error that a source's tensors have, where all that are in codes say so.

    `sizes` has each tensor's (error, sum of squares) of this conversion, by chalot's names.
    """
    infos = {n: checkpoint.tensors[hugging_face(n)] for n in sizes}
    if any(i.error is None for i in infos.values()):
        return None
    had = sum(size for _, size in sizes.values())
    lost = sum((infos[n].error or 0.0) * size for n, (_, size) in sizes.items())
    return lost / had if had else None
