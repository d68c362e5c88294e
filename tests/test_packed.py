"""Checkpoints that others quantised: the numbers they stand for, whatever rows are asked for.

The oracle packs codes a word at a time, as the formats' pages say it, and knows no numpy tricks.
tests/packed_live.py compares with what transformers and compressed-tensors themselves compute.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import chalot
from chalot import cli
from chalot.errors import ChalotError, FormatError, UnsupportedError
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.packed import Found, find
from golden.cases import CASES, write_folder
from safetensors_files import folder_with, pack

Stored = tuple[str, str, tuple[int, ...], bytes]  # name, type, shape, content
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Parts = dict[str, NDArray[Any]]


def write(folder: Path, tensors: list[Stored]) -> None:
    """A safetensors file of tensors that chalot's own writer would not take."""
    header, payload = {}, b""
    for name, kind, shape, content in tensors:
        end = len(payload) + len(content)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(payload), end]}
        payload += content
    folder_with(folder, pack(header, payload))


def words(
    codes: NDArray[np.int64], bits: int, order: tuple[int, ...] | None = None
) -> NDArray[Any]:
    """(rows, n) codes -> (rows, n bits / 32) int32, the first of `order` in the lowest."""
    each = 32 // bits
    out = np.zeros((len(codes), -(-codes.shape[1] // each)), np.uint64)
    for i, row in enumerate(codes):
        for word in range(out.shape[1]):
            for at in range(each):
                column = word * each + (order[at] if order else at)
                if column < len(row):
                    out[i, word] |= np.uint64(int(row[column]) << (bits * at))
    return out.astype(np.uint32).view(np.int32)


class Made:
    """A random matrix in codes, and what it stands for."""

    def __init__(self, rows: int, columns: int, bits: int, size: int, zeros: bool, seed: int,
                 shuffled: bool = False) -> None:  # fmt: skip
        random = np.random.default_rng(seed)
        self.bits, top = bits, 1 << bits
        self.codes = random.integers(0, top, (rows, columns))
        groups = -(-columns // size)
        middle = np.full((rows, groups), top // 2)
        self.zeros = random.integers(0, top, (rows, groups)) if zeros else middle
        self.scales = (random.integers(1, 64, (rows, groups)) / 1024).astype(np.float16)
        self.group = np.arange(columns) // size
        if shuffled:
            self.group = random.permutation(self.group)
        exact = (self.codes - self.zeros[:, self.group]) * self.scales[:, self.group].astype(float)
        self.weights = exact.astype(np.float32)
        self.group = self.group.astype(np.int32)

    def gptq(self, version: int = 1) -> Parts:
        less = (self.zeros - (1 if version == 1 else 0)) % (1 << self.bits)
        return {
            "qweight": words(self.codes, self.bits).T.copy(),
            "qzeros": words(less.T, self.bits),
            "scales": self.scales.T.copy(),
            "g_idx": self.group,
        }

    def awq(self) -> Parts:
        return {
            "qweight": words(self.codes.T, 4, AWQ_ORDER),
            "qzeros": words(self.zeros.T, 4, AWQ_ORDER),
            "scales": self.scales.T.copy(),
        }

    def packed(self) -> Parts:
        return {
            "weight_packed": words(self.codes, self.bits),
            "weight_scale": self.scales,
            "weight_shape": np.array(self.codes.shape, np.int64),
            "weight_zero_point": words(self.zeros.T, self.bits).T.copy(),
            "weight_g_idx": self.group,
        }

    def plain(self) -> Parts:
        return {
            "weight": (self.codes - 128).astype(np.int8),
            "weight_scale": self.scales,
            "weight_zero_point": (self.zeros - 128).astype(np.int8),
        }


def gptq(bits: int, size: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size} | more


def compressed(form: str, bits: int, size: int | None, symmetric: bool = False) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": size}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


def folder_of(place: Path, quantization: dict[str, Any], parts: Parts) -> Path:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    names = {np.dtype("int32"): "I32", np.dtype("int64"): "I64", np.dtype("int8"): "I8",
             np.dtype("float16"): "F16"}  # fmt: skip
    tensors = [("x." + n, names[a.dtype], a.shape, a.tobytes()) for n, a in parts.items()]
    write(place, tensors)
    return place


def numbers(folder: Path, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
    checkpoint = open_checkpoint(folder)
    try:
        assert list(checkpoint.tensors) == ["x.weight"]
        return checkpoint.float32("x.weight", first, last)
    finally:
        checkpoint.close()


CASES_OF = {
    "gptq": lambda bits, size: (
        {"quant_method": "gptq", "bits": bits, "group_size": size},
        Made.gptq,
    ),
    "gptq_v2": lambda bits, size: (
        {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": "gptq_v2"},
        lambda made: made.gptq(2),
    ),
    "awq": lambda bits, size: ({"quant_method": "awq", "bits": 4, "group_size": size}, Made.awq),
    "packed": lambda bits, size: (compressed("pack-quantized", bits, size), Made.packed),
    "plain": lambda bits, size: (compressed("int-quantized", 8, size), Made.plain),
}
ONLY = {"awq": 4, "plain": 8}


@pytest.mark.parametrize("method", CASES_OF)
@given(
    rows=st.integers(1, 5).map(lambda n: 8 * n),
    columns=st.integers(1, 5).map(lambda n: 16 * n),
    bits=st.sampled_from([2, 4, 8]),
    size=st.sampled_from([16, 32, -1]),
    zeros=st.booleans(),
    shuffled=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=15, deadline=None)
def test_numbers_are_what_codes_stand_for(
    method: str, rows: int, columns: int, bits: int, size: int, zeros: bool, shuffled: bool,
    seed: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    bits = ONLY.get(method, bits)
    shuffled = shuffled and method not in ONLY
    made = Made(rows, columns, bits, columns if size < 0 else size, zeros, seed, shuffled)
    quantization, parts = CASES_OF[method](bits, size)
    folder = folder_of(tmp_path_factory.mktemp("packed"), quantization, parts(made))
    np.testing.assert_array_equal(numbers(folder), made.weights)
    first = data.draw(st.integers(0, rows))
    last = data.draw(st.integers(first, rows))
    np.testing.assert_array_equal(numbers(folder, first, last), made.weights[first:last])


def hugging_face_folder(
    place: Path, made: Callable[[NDArray[np.float32]], Made]
) -> tuple[Path, Path]:
    """A tiny Qwen2, its layers' matrices packed by GPTQ, and the same model in numbers."""
    packed, plain = write_folder(CASES["qwen2"], 0, place / "packed"), place / "plain"
    checkpoint = open_checkpoint(packed)
    out: list[Stored] = []
    as_numbers: list[Stored] = []
    for name in checkpoint.tensors:
        values = checkpoint.float32(name)
        stored = (name, "F32", values.shape, values.tobytes())
        if not name.endswith("_proj.weight"):
            out.append(stored)
            as_numbers.append(stored)
            continue
        matrix = made(values)
        as_numbers.append((name, "F32", values.shape, matrix.weights.tobytes()))
        for part, a in matrix.gptq().items():
            kind = {"scales": "F16"}.get(part, "I32")
            out.append((name.removesuffix("weight") + part, kind, a.shape, a.tobytes()))
    config = json.loads((packed / "config.json").read_text())
    plain.mkdir()
    for file in packed.iterdir():
        if file.suffix != ".safetensors":
            (plain / file.name).write_bytes(file.read_bytes())
    write(plain, as_numbers)
    write(packed, out)
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
    }
    (packed / "config.json").write_text(json.dumps(config))
    checkpoint.close()
    return packed, plain


def test_a_model_runs_as_the_numbers_do(tmp_path: Path) -> None:
    """Stored as f32, a packed model and its numbers are the same file but for their sources."""

    def made(values: NDArray[np.float32]) -> Made:
        return Made(*values.shape, 4, 32, False, values.shape[0], True)

    packed, plain = hugging_face_folder(tmp_path, made)
    logits = []
    for source in (packed, plain):
        chalot.convert(source, tmp_path / "m.myai", "f32", threads=1)
        with chalot.load(tmp_path / "m.myai", threads=1) as model:
            logits.append(model.logits(range(1, 20)))
    np.testing.assert_array_equal(*logits)
    report = chalot.convert(packed, tmp_path / "kept.myai", threads=1)
    schemes = {k.kind: k.scheme for k in report.kinds}
    assert schemes["attention"] == schemes["ffn"] == "int4"
    assert all(k.error < 0.01 for k in report.kinds if k.scheme == "int4")  # columns shuffled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits is 3; chalot reads 2, 4, 8"),
        ({"bits": True}, "bits is True"),
        ({"bits": None}, "bits is None"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 2**70}, "qzeros"),
        ({"group_size": "32"}, "group_size"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"quant_method": "awq"}, "qzeros"),
        ({"quant_method": "awq", "version": "gemv"}, "version"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "hqq"}, "chalot reads bitnet, gptq, awq, compressed-tensors"),
        (compressed("pack-quantized", 4, 16), "no matrix"),
        (compressed("float-quantized", 8, 16), "format is"),
        ({**compressed("pack-quantized", 4, 16), "config_groups": {}}, "config_groups"),
        ({**compressed("pack-quantized", 4, 16), "config_groups": {"a": 1}}, "config_groups"),
    ],
)
def test_what_is_not_read_is_said(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = Made(8, 32, 4, 16, True, 0)
    quantization = gptq(4, 16) | change
    folder = folder_of(tmp_path / "m", quantization, made.gptq())
    with pytest.raises((UnsupportedError, FormatError)) as caught:
        open_checkpoint(folder)
    assert message in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
@pytest.mark.parametrize("how", ["gone", "short", "type", "flat"])
def test_parts_that_do_not_fit_are_refused(part: str, how: str, tmp_path: Path) -> None:
    parts = Made(8, 32, 4, 16, True, 0).gptq()
    if how == "gone":
        del parts[part]
    elif how == "short":
        parts[part] = parts[part][:-1].copy()
    elif how == "type":
        parts[part] = parts[part].astype(np.int64)
    else:
        parts[part] = parts[part].reshape(1, -1).copy()
    quantization = gptq(4, 16)
    folder = folder_of(tmp_path / "m", quantization, parts)
    if part == "g_idx" and how == "gone":  # it is not needed where the order was kept
        assert numbers(folder).shape == (8, 32)
        return
    with pytest.raises(FormatError):
        numbers(folder)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_scale_may_be_of_the_whole_matrix(shape: tuple[int, ...], tmp_path: Path) -> None:
    codes = np.arange(-128, 128, dtype=np.int8).reshape(8, 32)
    parts = {"weight": codes, "weight_scale": np.full(shape, 0.5, np.float16)}
    folder = folder_of(tmp_path / "m", compressed("int-quantized", 8, None, True), parts)
    np.testing.assert_array_equal(numbers(folder), codes.astype(np.float32) / 2)


@pytest.mark.parametrize("shape", [(256,), (2, 4, 32), (0, 32)])
def test_codes_of_another_shape_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    parts = Made(8, 32, 8, 16, True, 0).plain()
    parts["weight"] = np.zeros(shape, np.int8)
    folder = folder_of(tmp_path / "m", compressed("int-quantized", 8, 16), parts)
    with pytest.raises(FormatError, match="expected two dimensions"):
        open_checkpoint(folder)


def test_a_column_of_no_group_is_refused(tmp_path: Path) -> None:
    for wrong in (-1, 2, 2**31 - 1):
        parts = Made(8, 32, 4, 16, True, 0).gptq()
        parts["g_idx"][3] = wrong
        quantization = gptq(4, 16)
        folder = folder_of(tmp_path / "m", quantization, parts)
        with pytest.raises(FormatError, match="expected 0 to 1"):
            numbers(folder)


def test_a_shape_that_contradicts_is_refused(tmp_path: Path) -> None:
    parts = Made(8, 32, 4, 16, True, 0).packed()
    parts["weight_shape"][1] = 31
    folder = folder_of(tmp_path / "m", compressed("pack-quantized", 4, 16), parts)
    with pytest.raises(FormatError, match="weight_shape.*31"):
        numbers(folder)


@given(
    settings_=st.dictionaries(
        st.sampled_from(["bits", "group_size", "version", "sym", "format", "config_groups",
                         "checkpoint_format"]),
        st.none() | st.booleans() | st.integers() | st.text(max_size=3)
        | st.dictionaries(st.text(max_size=3), st.integers() | st.dictionaries(
            st.sampled_from(["weights"]), st.dictionaries(st.text(max_size=9), st.integers()))),
    ),
    method=st.sampled_from(["gptq", "awq", "compressed-tensors"]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_settings_are_read_or_refused(settings_: dict[str, Any], method: str) -> None:
    from chalot.formats.checkpoint import TensorInfo

    shapes = {"x.qweight": (4, 8), "x.qzeros": (2, 1), "x.weight_packed": (8, 4)}
    tensors = {n: TensorInfo(n, "i32", shape, 4) for n, shape in shapes.items()}
    tensors["x.scales"] = TensorInfo("x.scales", "f16", (2, 8), 4)
    assert Found(tensors, "x").tensors is tensors
    try:
        found = find(tensors, settings_, method, "here")
    except ChalotError as error:
        assert len(str(error)) < 1000
    else:
        assert found["x.weight"].info.shape == (8, 32)


def test_the_command_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(CASES["qwen2"], 0, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(["convert", str(folder), "-o", str(tmp_path / "m.myai")]) == 1
    assert "Convert the original weights instead" in capsys.readouterr().err
    assert not (tmp_path / "m.myai").exists()
