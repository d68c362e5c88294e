"""Codes of rows that come over from npz to `.myai` are the codes that were stored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import chalot
from chalot.demo import FOLDER
from chalot.export import export
from chalot.formats.myai import MyaiFile
from chalot.formats.names import hugging_face
from chalot.formats.npz import NpzModel
from chalot.quant import codes, packing
from chalot.quant.carried import carried
from chalot.quant.rows import BITS, Rows, dequantize_rows, quantize_rows
from chalot.quant.scheme import SCHEMES


@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 70))),
    st.sampled_from(BITS),
    st.integers(-20, 20),
)
def test_carried_codes_stand_for_the_same_numbers(q: Any, bits: int, zero: int) -> None:
    rows = len(q)
    scale = np.linspace(0, 2, rows, dtype=np.float32)
    zeros = np.full(rows, 0 if bits == 1 else zero, np.float32)
    given_ = Rows(bits, q & np.uint8(2**bits - 1), scale, zeros)
    found = carried(given_, SCHEMES[f"row{bits}"])
    assert found is not None
    stored = packing.unpack(packing.pack(found), found.scheme, found.shape)
    assert np.allclose(codes.dequantize(stored), dequantize_rows(given_), rtol=1e-5, atol=1e-4)


def test_other_forms_are_not_carried() -> None:
    rows = quantize_rows(np.ones((2, 4), np.float32), 4)
    assert carried(rows, SCHEMES["row8"]) is None and carried(rows, SCHEMES["nl4"]) is None
    wide = Rows(4, np.full((2, 4), 16, np.uint8), rows.scale, rows.zero)
    assert carried(wide, SCHEMES["row4"]) is None


@pytest.mark.parametrize("bits", BITS)
def test_a_model_s_codes_come_over(tmp_path: Path, bits: int) -> None:
    """Every code of every matrix, also of rows that would be quantised otherwise a second time."""
    made = Path(export(FOLDER, tmp_path, "npz", bits=str(bits)).path)
    chalot.convert(made, tmp_path / "m.myai", f"row{bits}")
    file, source = MyaiFile(tmp_path / "m.myai"), NpzModel(made)
    others = []
    for name, entry in file.manifest.tensors.items():
        if len(entry.shape) == 1:
            continue
        assert entry.scheme == f"row{bits}"
        matrix = file.matrix(name)
        stored = packing.unpack(matrix.data, matrix.scheme, matrix.shape).codes
        if bits == 8:
            stored = stored ^ np.uint8(128)
        wanted = source.codes(hugging_face(name)).codes
        if not np.array_equal(stored[: entry.shape[0], : entry.shape[1]], wanted):
            others.append(name)
    source.close()
    file.close()
    assert "embedding" not in others
    assert len(others) <= (2 if bits == 8 else 0)  # whose columns were balanced, to some gain
