"""GGUF: what is hostile is refused in one line that names the file, fast and in little memory."""

import os
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from attacks.gguf import SMALL, array
from chalot.convert import convert
from chalot.errors import ChalotError, FormatError, UnsupportedError
from chalot.formats.gguf import GgufFile
from chalot.formats.gguf.header import MAX_ALIGNMENT, MAX_VALUES, parse_header
from gguf_files import ARRAY, STRING, entries, model_metadata, model_tensors, pack


def refuse(path: Path, message: str, memory: int = 8_000_000) -> None:
    """Opening raises one clear line that names the file, fast and without much memory."""
    begin = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises((FormatError, UnsupportedError)) as caught:
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - begin < 5
    said = str(caught.value)
    assert message in said and path.name in said and "\n" not in said and len(said) < 600, said


def test_a_long_list_of_empty_texts_is_not_believed(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(pack({"a": array(STRING, MAX_VALUES + 1)}))
    os.truncate(path, 9 * MAX_VALUES)  # sparse: texts of no length
    refuse(path, "found more than 2,000,000 values in all")


def test_many_arrays_in_an_array_are_not_made(tmp_path):
    path = tmp_path / "m.gguf"
    count = MAX_VALUES // 8 + 1
    path.write_bytes(pack({"a": array(ARRAY, count, struct.pack("<IQ", 0, 0) * count)}))
    refuse(path, "found more than 2,000,000 values in all")


def test_a_header_without_end_is_not_read(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(pack({"a": array(0, 1 << 34)}))
    os.truncate(path, 1 << 35)
    refuse(path, "header is longer than")


def test_whole_models_with_large_alignment_are_read(tmp_path):
    metadata = model_metadata(**{"general.alignment": MAX_ALIGNMENT // 16})
    tensors = entries(model_tensors())
    path = tmp_path / "m.gguf"
    path.write_bytes(pack(metadata, tensors, alignment=MAX_ALIGNMENT // 16))
    with GgufFile(path) as read:
        assert np.isfinite(read.float32("model.norm.weight")).all()


def test_every_truncation_is_refused(tmp_path):
    whole = pack(model_metadata(), SMALL)
    path = tmp_path / "m.gguf"
    for length in range(len(whole)):
        with pytest.raises((FormatError, UnsupportedError), match=r"m\.gguf: "):
            parse_header(lambda at, size, n=length: whole[:n][at : at + size], length, path)


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(pack(model_metadata(), entries(model_tensors())))
    with GgufFile(path) as read:
        os.truncate(path, path.stat().st_size - 5000)
        with pytest.raises(FormatError, match=r"m\.gguf: file ends at"):
            for name in read.tensors:
                read.float32(name)
        with pytest.raises(FormatError, match="changed since it was opened"):
            read.check_unchanged()
    with pytest.raises(FormatError, match="cannot be read"):
        read.float32("model.norm.weight")


def test_a_folder_a_pipe_and_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "none", tmp_path):
        with pytest.raises(FormatError):
            GgufFile(path)


@pytest.mark.parametrize(
    "drop, add, message",
    [
        ("blk.1.ffn_up.weight", None, "tensor model.layers.1.mlp.up_proj.weight is missing"),
        (None, ("blk.0.attn_x.weight", (32,)), "not in the model that config.json describes"),
        (None, ("blk.2.attn_norm.weight", (32,)), "model.layers.2.input_layernorm.weight"),
        ("blk.0.attn_norm.weight", ("blk.0.attn_norm.weight", (64,)), "has shape (64,)"),
    ],
)
def test_metadata_against_tensors(tmp_path, drop, add, message):
    tensors = [t for t in entries(model_tensors()) if t[0] != drop]
    if add is not None:
        name, shape = add
        tensors.append((name, np.ones(shape, np.float32), 0, tuple(reversed(shape))))
    path = tmp_path / "m.gguf"
    path.write_bytes(pack(model_metadata(), tensors))
    with pytest.raises(FormatError) as caught:
        convert(path, tmp_path / "out.myai")
    assert message in str(caught.value) and not (tmp_path / "out.myai").exists()


def test_weights_that_are_not_finite_are_named(tmp_path):
    made = model_tensors()
    made["blk.1.ffn_down.weight"][3, 3] = np.inf
    path = tmp_path / "m.gguf"
    path.write_bytes(pack(model_metadata(), entries(made)))
    with pytest.raises(ChalotError, match=r"layers\.1\.mlp\.down_proj\.weight has NaN or Inf"):
        convert(path, tmp_path / "out.myai")
    assert not (tmp_path / "out.myai").exists()
