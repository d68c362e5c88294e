"""NPZ with a manifest: the quantiser's law, both forms read, the whole model written, and run."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import chalot
from chalot.cli import main
from chalot.demo import FOLDER
from chalot.errors import FormatError, OutputError, SchemeError, UnsupportedError, WeightError
from chalot.export import export
from chalot.formats import safetensors
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.npz import NpzModel
from chalot.formats.npz.writer import NpzWriter
from chalot.formats.safetensors import SafetensorsFolder
from chalot.formats.zip_members import ZipMembers
from chalot.quant.rows import BITS, Rows, dequantize_rows, pack_bits, quantize_rows, unpack_bits
from myai_files import checkpoint

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
MATRICES = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=FLOATS
)


# ---- the quantiser


@given(MATRICES, st.sampled_from(BITS))
def test_codes_are_the_nearest_of_a_row_s_range(w: Any, bits: int) -> None:
    """(q - zero) * scale is a step from w at most: half for q, half for zero; and floats."""
    coded = quantize_rows(w, bits)
    again = dequantize_rows(coded)
    assert np.isfinite(again).all() and coded.codes.max() < 2**bits
    if bits == 1:
        wide = np.abs(w.astype(np.float64)).mean(axis=1)
        assert np.allclose(np.abs(again), wide[:, None], rtol=1e-6, atol=1e-44)
        assert ((again > 0) | (w < 0) | (coded.scale[:, None] == 0)).all()
        return
    step = coded.scale[:, None].astype(np.float64)
    reach = np.abs(w).max(axis=1, keepdims=True).astype(np.float64)
    assert (np.abs(again - w.astype(np.float64)) <= 1.01 * step + 1e-6 * reach + 1e-35).all()


@given(MATRICES, st.sampled_from(BITS))
def test_what_was_quantised_is_quantised_to_itself(w: Any, bits: int) -> None:
    """Codes come over unchanged where a row uses its whole range, as rows that are quantised do."""
    coded = quantize_rows(np.tanh(w), bits)
    whole = (coded.codes.min(axis=1) == 0) & (coded.codes.max(axis=1) == 2**bits - 1)
    near = np.abs(coded.zero) < 2**16  # beyond, a row is a constant and some dust
    again = quantize_rows(dequantize_rows(coded), bits)
    kept = whole & near
    assert np.array_equal(again.codes[kept], coded.codes[kept])
    assert np.allclose(again.scale[kept], coded.scale[kept], rtol=1e-3)


@given(
    st.sampled_from(BITS).flatmap(
        lambda bits: st.tuples(
            st.just(bits),
            arrays.arrays(
                np.uint8,
                st.tuples(st.integers(1, 4), st.integers(1, 40)),
                elements=st.integers(0, 2**bits - 1),
            ),
        )
    )
)
def test_unpack_undoes_pack(given_: Any) -> None:
    bits, codes = given_
    packed = pack_bits(codes, bits)
    rows, columns = codes.shape
    assert packed.shape == (rows, -(-columns * bits // 8))
    stored = unpack_bits(packed.reshape(-1), bits).reshape(rows, -1)
    assert np.array_equal(stored[:, :columns], codes) and not stored[:, columns:].any()


def test_the_order_of_bits() -> None:
    one = np.array([[1, 0, 0, 0, 0, 0, 0, 1, 1]], np.uint8)
    assert pack_bits(one, 1).tolist() == [[0x81, 0x80]]
    assert pack_bits(np.array([[1, 2, 3, 0, 1]], np.uint8), 2).tolist() == [[0x39, 1]]
    assert pack_bits(np.array([[0xA, 0xB, 0xC]], np.uint8), 4).tolist() == [[0xBA, 0xC]]


@pytest.mark.parametrize("bits", BITS)
def test_rows_without_a_range_are_exact(bits: int) -> None:
    flat = np.array([0, 1.5, -1.5, 3e38, -1e-30], np.float32)
    rows = np.repeat(flat[:, None], 7, axis=1)
    assert np.array_equal(dequantize_rows(quantize_rows(rows, bits)), rows)
    tiny = np.array([[1e-45, -1e-45, 0]], np.float32)
    assert np.isfinite(dequantize_rows(quantize_rows(tiny, bits))).all()
    widest = np.array([[1.5e38, -3e38, 0]], np.float32)
    assert np.isfinite(dequantize_rows(quantize_rows(widest, bits))).all()


def test_the_formula_word_for_word() -> None:
    w = np.random.default_rng(0).standard_normal((3, 50), np.float32)
    coded = quantize_rows(w, 4)
    for row, q, scale, zero in zip(w, coded.codes, coded.scale, coded.zero, strict=True):
        s = (row.max() - row.min()) / np.float32(15)
        z = np.round(-row.min() / s)
        assert s == scale and z == zero
        assert np.array_equal(np.clip(np.round(row / s + z), 0, 15), q)


# ---- written


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """bits -> manifest of the bundled model."""
    folder = tmp_path_factory.mktemp("npz")
    return {b: Path(export(FOLDER, folder, "npz", bits=str(b)).path) for b in BITS}


@pytest.mark.parametrize("bits", BITS)
def test_the_whole_model_is_written_and_numpy_reads_it(made: dict[int, Path], bits: int) -> None:
    """A reader of ten lines, numpy alone, gives the weights that ours gives."""
    manifest = json.loads(made[bits].read_text("utf-8"))
    assert made[bits].name == f"model_manifest_q{bits}.json"
    assert manifest["format_version"] == "2" and isinstance(manifest["weights"], list)
    assert manifest["model"] == {
        **{"name": "model", "family": "qwen2", "context_length": 1024, "hidden_dim": 256},
        **{"num_layers": 6, "num_heads": 4},
    }
    arrays = np.load(made[bits].with_name(f"model_quantized_q{bits}.npz"), allow_pickle=False)
    per, found = 8 // bits, {}
    for entry in manifest["weights"]:
        q = arrays[entry["q"]]
        assert entry["quantization"]["bits"] == entry["bit_width"]
        if entry["bit_width"] == 32:
            found[entry["name"]] = q
            continue
        if bits == 1:
            codes = np.unpackbits(q, axis=1)
        else:
            codes = np.stack([q >> i * bits & 2**bits - 1 for i in range(per)], axis=2)
        codes = codes.reshape(len(q), -1)[:, : entry["shape"][1]].astype(np.float32)
        zero, scale = (arrays[entry[k]][:, None] for k in ("q_zero_point", "q_scales"))
        found[entry["name"]] = (2 * codes - 1 if bits == 1 else codes - zero) * scale
    with NpzModel(made[bits]) as ours, SafetensorsFolder(FOLDER) as source:
        assert found.keys() == ours.tensors.keys() == source.tensors.keys()
        for name, values in found.items():
            assert values.shape == source.tensors[name].shape
            assert np.array_equal(ours.float32(name), values), name
            if values.ndim == 1:
                assert np.array_equal(values, source.float32(name))
            else:
                assert np.array_equal(
                    values, dequantize_rows(quantize_rows(source.float32(name), bits))
                )
        for document in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert ours.document(document) == source.document(document)
        assert ours.document("chat_template.jinja") is None
        assert json.loads(ours.document("config.json") or b"")["model_type"] == "qwen2"


def test_either_file_finds_the_other(made: dict[int, Path]) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    found = []
    for file in (made[4].name, "model_quantized_q4.npz"):
        opened = open_checkpoint(made[4].with_name(file))
        found.append(opened.float32(name, 5, 9))
        opened.close()
    assert np.array_equal(*found) and found[0].shape == (4, 256)


def test_equal_weights_are_equal_bytes_and_bits_are_packed(
    made: dict[int, Path], tmp_path: Path
) -> None:
    again = Path(export(FOLDER, tmp_path, "npz", bits="2").path).with_name("model_quantized_q2.npz")
    first = made[2].with_name(again.name)
    assert again.read_bytes() == first.read_bytes()
    with SafetensorsFolder(FOLDER) as source:
        weights = sum(np.prod(t.shape) for t in source.tensors.values() if len(t.shape) == 2)
    documents = sum(p.stat().st_size for p in FOLDER.glob("*.json"))
    for bits in BITS:
        size = made[bits].with_name(f"model_quantized_q{bits}.npz").stat().st_size
        assert weights * bits / 8 < size < weights * (bits + 0.3) / 8 + documents + 60_000


def test_it_runs_as_the_floats_that_it_decodes_to(made: dict[int, Path], tmp_path: Path) -> None:
    with NpzModel(made[8]) as source:
        tensors = [(n, "f32", i.shape, source.float32(n)) for n, i in source.tensors.items()]
        safetensors.write(tmp_path / "model.safetensors", tensors)
        (tmp_path / "config.json").write_bytes(source.document("config.json") or b"")
    logits = []
    for folder in (made[8], tmp_path):
        chalot.convert(folder, tmp_path / "out.myai", "f32")
        with chalot.load(tmp_path / "out.myai") as model:
            logits.append(model.logits(list(b"def f(x):")))
    assert np.array_equal(*logits)


def test_run_generates_text(
    made: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CHALOT_HOME", str(tmp_path))
    argv = [
        "run",
        str(made[8]),
        "def read_lines(path):",
        "--max-tokens",
        "12",
        "--temperature",
        "0",
    ]
    assert main([*argv, "-q"]) == 0
    assert capsys.readouterr().out.strip()


def test_another_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="--bits 6"):
        export(FOLDER, tmp_path / "out", "npz", bits="6")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_leave_nothing(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "source")
    with SafetensorsFolder(folder) as source:
        tensors = {n: source.float32(n) for n in source.tensors}
    tensors["lm_head.weight"][129, 3] = np.nan
    safetensors.write(
        folder / "model.safetensors", [(n, "f32", t.shape, t) for n, t in tensors.items()]
    )
    with pytest.raises(WeightError, match=r"lm_head\.weight has NaN or Inf"):
        export(folder, tmp_path / "out", "npz")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "source")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for method in ("floats", "finish"):
        with monkeypatch.context() as patch:
            patch.setattr(NpzWriter, method, full)
            with pytest.raises(OutputError, match="No space left"):
                export(folder, tmp_path / "out", "npz")
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(NpzWriter, "finish", full)
        with pytest.raises(OutputError, match="No space left"):
            export(folder, tmp_path / "out", "npz")
    assert list((tmp_path / "out").iterdir()) == []


# ---- read


def test_a_folder_with_one_manifest_is_a_source(tmp_path: Path) -> None:
    report = export(checkpoint(tmp_path / "source"), tmp_path / "out", "npz")
    chalot.convert(tmp_path / "out", tmp_path / "a.myai")
    chalot.convert(report.path, tmp_path / "b.myai")
    with chalot.load(tmp_path / "a.myai") as a, chalot.load(tmp_path / "b.myai") as b:
        assert np.array_equal(a.logits([3, 1, 4]), b.logits([3, 1, 4]))


def test_what_torch_saves_is_no_npz(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", b"evil")
    with pytest.raises(UnsupportedError, match="weights are pickled .*pytorch_model.bin"):
        chalot.convert(tmp_path / "pytorch_model.bin", tmp_path / "x.myai")


def entry(name: str, shape: list[int], bits: int, **changes: object) -> dict[str, Any]:
    arrays = {"q": name, "q_scales": f"{name}_scales", "q_zero_point": f"{name}_zero"}
    quantization = {"type": "perrow_int", "bits": bits, "method": "x"}
    return {"shape": shape, "bit_width": bits, **arrays, "quantization": quantization, **changes}


def pair(folder: Path, manifest: dict[str, Any], deflate: bool = True, **arrays: Any) -> Path:
    (np.savez_compressed if deflate else np.savez)(folder / "m_quantized_q4.npz", **arrays)
    path = folder / "m_manifest_q4.json"
    path.write_text(json.dumps({"format_version": 2, **manifest}), "utf-8")
    return path


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", ["packed rows", "packed in a run", "int8", "uint8", "column"])
@pytest.mark.parametrize("deflate", [True, False])
def test_codes_are_read_as_their_arrays_shapes_say(
    tmp_path: Path, bits: int, form: str, deflate: bool
) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (7, 13)).astype(np.uint8)
    scale, zero = rng.random(7).astype(np.float32), rng.integers(0, 9, 7).astype(np.float32)
    if bits == 1:
        zero[:] = 0
    wanted = dequantize_rows(Rows(bits, codes, scale, zero))
    stored: Any = codes
    if form == "packed rows":
        stored = pack_bits(codes, bits)
    elif form == "packed in a run":
        stored = pack_bits(codes.reshape(1, -1), bits).reshape(-1)
    elif form == "int8":
        stored = (codes.astype(np.int16) - (128 if bits == 8 else 0)).astype(np.int8)
        zero = zero - (128 if bits == 8 else 0)
        if bits == 1:
            stored = stored * 2 - 1
    elif form == "column":
        scale, zero = scale.reshape(7, 1), zero.reshape(7, 1).astype(np.int32)
    manifest = {"weights": {"w": entry("w", [7, 13], bits)}, "model": {"num_layers": 1}}
    named = {"w": stored, "w_scales": scale, "w_zero": zero}
    path = pair(tmp_path, manifest, deflate, **named)
    with NpzModel(path) as found:
        assert found.tensors["w"].dtype == f"q{bits}"
        for first, last in ((0, 7), (2, 5), (6, 7), (0, 0), (1, 2)):
            assert np.array_equal(found.float32("w", first, last), wanted[first:last])


def older(weights: Any) -> dict[str, Any]:
    """The form that the older converter's code writes."""
    return {
        "format_version": 2,
        "model": "tiny",
        "architecture": {
            "context_length": 128,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 1,
            "vocab_size": 20,
            "attention": {"variant": "gqa", "num_heads": 4, "kv_groups": 2, "head_dim": 8},
            "activation": "swiglu",
            "norm": "rmsnorm",
            "rope": {"base_theta": 500000.0},
        },
        "weights": weights,
    }


def newer(weights: dict[str, Any]) -> dict[str, Any]:
    """The form that its guide shows; sizes that it has no place for follow from shapes."""
    return {
        "format_version": "2",
        "metadata": {"created": "once"},
        "model": {
            **{"name": "tiny", "family": "llama", "context_length": 128, "hidden_dim": 32},
            **{"num_layers": 1, "num_heads": 4},
        },
        "weights": [{"name": name, **e} for name, e in weights.items()],
    }


@pytest.mark.parametrize("form", [older, newer])
def test_both_forms_of_the_manifest_are_whole_models(tmp_path: Path, form: Any) -> None:
    layer, rng = "model.layers.0.", np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": [20, 32],
        f"{layer}self_attn.q_proj.weight": [32, 32],
        f"{layer}self_attn.k_proj.weight": [16, 32],
        f"{layer}self_attn.v_proj.weight": [16, 32],
        f"{layer}self_attn.o_proj.weight": [32, 32],
        f"{layer}mlp.gate_proj.weight": [48, 32],
        f"{layer}mlp.up_proj.weight": [48, 32],
        f"{layer}mlp.down_proj.weight": [32, 48],
        "lm_head.weight": [20, 32],
    }
    norms = [f"{layer}{n}_layernorm.weight" for n in ("input", "post_attention")]
    weights, arrays = {}, {}
    for name, shape in shapes.items():
        coded = quantize_rows(rng.standard_normal(shape, np.float32), 4)
        weights[name] = entry(name, shape, 4)
        arrays[name] = coded.codes.astype(np.int8)
        arrays[name + "_scales"], arrays[name + "_zero"] = coded.scale, coded.zero
    for name in [*norms, "model.norm.weight"]:
        weights[name] = {"shape": [32], "bit_width": 32, "q": name}
        arrays[name] = np.ones(32, np.float16)
    path = pair(tmp_path, form(weights), **arrays)
    report = chalot.convert(path, tmp_path / "out.myai")
    with chalot.load(report.path) as model:
        c = model.config
        assert (c.heads, c.kv_heads, c.head_dim, c.context, c.tied) == (4, 2, 8, 128, False)
        assert c.rope_theta == (500000 if form is older else 10000) and c.norm_epsilon == 1e-5
        assert np.isfinite(model.logits([1, 2, 3])).all()


def test_scales_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    named = {"w": np.zeros((2, 4), np.uint8), "w_zero": np.zeros(2, np.float32)}
    for bad in (np.nan, np.inf):
        path = pair(
            tmp_path,
            {"weights": {"w": entry("w", [2, 8], 4)}},
            w_scales=np.array([1, bad], np.float32),
            **named,
        )
        with NpzModel(path) as found:
            assert not found.float32("w", 0, 1).any()
            with pytest.raises(WeightError, match="'w' has scales"):
                found.float32("w")


def test_a_changed_file_is_noticed(made: dict[int, Path], tmp_path: Path) -> None:
    for name in ("model_manifest_q1.json", "model_quantized_q1.npz"):
        (tmp_path / name).write_bytes(made[1].with_name(name).read_bytes())
    with NpzModel(tmp_path / "model_manifest_q1.json") as found:
        found.check_unchanged()
        with (tmp_path / "model_quantized_q1.npz").open("ab") as file:
            file.write(b"\0")
        with pytest.raises(FormatError, match="changed since it was opened"):
            found.check_unchanged()


# ---- members of a zip file


@pytest.fixture
def big(tmp_path: Path) -> Iterator[tuple[ZipMembers, bytes]]:
    """A deflated member that is larger than the steps between kept states."""
    rng = np.random.default_rng(0)
    content = rng.integers(0, 7, 20_000_000, np.uint8).tobytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        out.writestr("a", content)
    members = ZipMembers(tmp_path / "a.zip")
    yield members, content
    members.close()


def test_a_deflated_member_is_read_from_anywhere(big: tuple[ZipMembers, bytes]) -> None:
    members, content = big
    a = members.members["a"]
    rng = np.random.default_rng(1)
    for begin in [0, 9_999_999, 3, 19_999_000, *rng.integers(0, 20_000_000, 20).tolist()]:
        size = int(rng.integers(1, 100_000))
        assert members.bytes_of(a, begin, size) == content[begin : begin + size]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 900)), max_size=8))
def test_reads_in_any_order(tmp_path_factory: pytest.TempPathFactory, reads: Any) -> None:
    path = tmp_path_factory.mktemp("zip") / "a.zip"
    content = bytes(i * i % 251 for i in range(3000))
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("stored", content)
        out.writestr("deflated", content, zipfile.ZIP_DEFLATED)
    members = ZipMembers(path)
    for begin, size in [*reads, (0, 3000)]:
        for member in members.members.values():
            assert members.bytes_of(member, begin, size) == content[begin : begin + size]
    members.close()
