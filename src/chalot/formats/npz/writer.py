"""Writes NAME_quantized_qB.npz and NAME_manifest_qB.json, member by member, whole or not at all.

Members are stored, not deflated: any row can be read where it lies, and the file is as large as its
codes. Dates are fixed, so equal weights give equal bytes. Described in docs/npz.md.
"""

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from chalot.errors import OutputError
from chalot.formats.files import whole_file
from chalot.formats.npy import header_bytes
from chalot.formats.npz.manifest import VERSION, encode
from chalot.quant.rows import Rows, pack_bits, row_bytes

METHODS = {1: "sign_mean_abs", 2: "affine_minmax", 4: "affine_minmax", 8: "affine_minmax"}
PACKING = "1 bit: highest bit first; 2 and 4 bits: lowest bits first; rows fill whole bytes"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date that a zip file can say


def file_names(name: str, bits: int) -> tuple[str, str]:
    """The names of the arrays' file and of the manifest."""
    return f"{name}_quantized_q{bits}.npz", f"{name}_manifest_q{bits}.json"


class NpzWriter:
    """Both files on their way. Leaving the block without `finish` drops them."""

    def __init__(self, folder: Path, name: str, bits: int) -> None:
        """Raises OutputError if `folder`, made where it is missing, cannot be written."""
        self.bits = bits
        self.weights: list[dict[str, Any]] = []
        self.documents: dict[str, str] = {}
        self.npz_path, self.manifest_path = (folder / n for n in file_names(name, bits))
        self._was_there = self.npz_path.exists()
        self._finished = False
        self._made = None if folder.exists() else folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror})") from None

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        # the manifest, written last, is renamed last: where it is, the arrays are
        self._manifest: BinaryIO = self._stack.enter_context(whole_file(self.manifest_path))
        self._file: BinaryIO = self._stack.enter_context(whole_file(self.npz_path))
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and not self._finished:
            kind, error = OutputError, OutputError(f"{self.npz_path}: was left unfinished")
        if kind is not None:
            self._zip.fp = None  # or it would write its listing once more when it is collected
        try:
            self._stack.__exit__(kind, error, trace)
        except BaseException:
            if self._finished and not self._was_there:  # the manifest's rename failed
                with suppress(OSError):
                    self.npz_path.unlink()
            raise
        finally:
            if self._made is not None:
                with suppress(OSError):  # only where nothing is in it
                    self._made.rmdir()

    @contextmanager
    def _member(self, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[Any]:
        """An array's member, its header written."""
        info = zipfile.ZipInfo(name + ".npy", EPOCH)
        info.create_system, info.external_attr = 3, 0o600 << 16
        with self._zip.open(info, "w", force_zip64=True) as member:
            member.write(header_bytes(dtype, shape))
            yield member

    def array(self, name: str, values: NDArray[Any]) -> str:
        """A whole array; its name."""
        with self._member(name, values.dtype.str, values.shape) as member:
            member.write(np.ascontiguousarray(values).data)
        return name

    def codes(self, name: str, shape: tuple[int, ...], runs: Iterable[Rows]) -> None:
        """A quantised matrix, in runs of its rows."""
        scales, zeros = [], []
        packed = (shape[0], row_bytes(shape[1], self.bits))
        with self._member(f"{name}.q", "|u1", packed) as member:
            for run in runs:
                member.write(np.ascontiguousarray(pack_bits(run.codes, self.bits)).data)
                scales.append(run.scale)
                zeros.append(run.zero)
        q_scales = self.array(f"{name}.q_scales", np.concatenate(scales))
        q_zeros = self.array(f"{name}.q_zero_point", np.concatenate(zeros))
        self._entry(name, shape, self.bits, f"{name}.q", q_scales, q_zeros, METHODS[self.bits])

    def floats(self, name: str, values: NDArray[np.float32]) -> None:
        """A vector, as numbers."""
        array = self.array(name, values)
        self._entry(name, values.shape, 32, array, None, None, "float32")

    def _entry(
        self,
        name: str,
        shape: tuple[int, ...],
        bits: int,
        codes: str,
        scales: str | None,
        zeros: str | None,
        method: str,
    ) -> None:
        kind = "none" if scales is None else "perrow_int"
        self.weights.append(
            {
                "name": name,
                "shape": list(shape),
                "bit_width": bits,
                "q": codes,
                "q_scales": scales,
                "q_zero_point": zeros,
                "scale_axis": None if scales is None else {"index": 0, "name": "row"},
                "quantization": {"type": kind, "bits": bits, "method": method},
            }
        )

    def document(self, name: str, content: bytes) -> None:
        """A small file, as an array of bytes."""
        self.documents[name] = self.array(f"documents/{name}", np.frombuffer(content, np.uint8))

    def finish(
        self, model: Mapping[str, Any], architecture: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> None:
        """The listing of the arrays, and the manifest; both appear when the block ends."""
        self._zip.close()
        self._file.flush()
        own = {
            "weights_file": self.npz_path.name,
            "weights_bytes": self._file.tell(),
            "documents": self.documents,
            "packing": PACKING,
        }
        manifest = {
            "format_version": VERSION,
            "model": model,
            "architecture": architecture,
            "quantization": {
                "type": "perrow_int",
                "bit_width": self.bits,
                "method": METHODS[self.bits],
            },
            "metadata": {**metadata, **own},
            "weights": self.weights,
        }
        self._manifest.write(encode(manifest))
        self._manifest.flush()
        self._finished = True
