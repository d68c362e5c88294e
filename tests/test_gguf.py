"""GGUF files as checkpoints: decoded blocks, names, what is undone, configurations, parts."""

import json
from pathlib import Path

import numpy as np
import pytest

from chalot.convert import convert
from chalot.demo import FOLDER
from chalot.describe import describe
from chalot.errors import FormatError, UnsupportedError
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.gguf import GgufFile
from chalot.formats.gguf.blocks import TYPES, decode
from chalot.formats.gguf.config import llama3_scaling
from chalot.formats.gguf.names import LAYER, MODEL, from_gguf, stored_rows, to_gguf
from chalot.load import load
from chalot.model.config import from_hugging_face, inverse_frequencies
from chalot.model.families import FAMILIES
from chalot.quant.scheme import SCHEMES
from gguf_cases import bundled_model, decoded_hash, random_blocks
from gguf_files import (
    FEED,
    HEAD,
    HIDDEN,
    LAYERS,
    WORDS,
    entries,
    interleaved,
    model_metadata,
    model_tensors,
    pack,
    write,
)
from gguf_models import CASES, IDS, model_file

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gguf.json").read_text("utf-8"))
DECODED = [t for t in TYPES.values() if t.decode is not None]


def model(tmp_path: Path, architecture: str = "llama", tied: bool = True, **changed) -> Path:
    tensors = entries(model_tensors(tied), architecture == "llama")
    return write(tmp_path / "m.gguf", pack(model_metadata(architecture, **changed), tensors))


# ---- blocks


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_blocks_decode_to_the_floats_of_the_gguf_package(kind):
    assert decoded_hash(decode(kind, random_blocks(kind))) == GOLDEN["blocks"][kind.name]


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_blocks_are_those_of_the_gguf_package_if_it_is_there(kind):
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType(kind.number)
    assert gguf.GGML_QUANT_SIZES[number] == (kind.weights, kind.nbytes)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(random_blocks(kind), number)
    assert decoded_hash(decode(kind, random_blocks(kind))) == decoded_hash(wanted)


def test_every_type_has_a_scheme_that_exists():
    assert all(t.scheme in SCHEMES for t in TYPES.values() if t.scheme)
    assert {t.name for t in DECODED if not t.scheme} == {"F32", "F16", "BF16"}


@pytest.mark.parametrize("kind", [t for t in DECODED if t.weights > 1], ids=lambda t: t.name)
def test_any_rows_are_those_of_the_whole(tmp_path, kind):
    columns, rows = 2 * kind.weights, 6 * HEAD
    draw = np.random.default_rng(5)
    stored = draw.integers(0, 128, (rows * 2, kind.nbytes), np.uint8)
    whole = decode(kind, stored).reshape(rows, columns)
    tensors = [
        ("token_embd.weight", np.zeros((4, HIDDEN), np.float32), 0, (HIDDEN, 4)),
        ("blk.0.ffn_up.weight", stored, kind.number, (columns, rows)),
        ("blk.0.attn_q.weight", stored, kind.number, (columns, rows)),
    ]
    path = write(tmp_path / "m.gguf", pack(model_metadata(), tensors))
    with GgufFile(path) as read:
        up, query = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
        assert read.tensors[up].dtype == kind.name and read.tensors[up].scheme == kind.scheme
        turned = whole.reshape(-1, HEAD // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        for first, last in ((0, rows), (0, 1), (3, 21), (rows - 1, rows), (7, 7)):
            for name, wanted in ((up, whole), (query, turned)):
                found = read.float32(name, first, last)
                assert found.shape == (last - first, columns)
                assert np.array_equal(found, wanted[first:last], equal_nan=True)
        for first, last in ((-1, 2), (3, 2), (0, rows + 1)):
            with pytest.raises(IndexError):
                read.float32(up, first, last)


# ---- names


def test_names_go_both_ways():
    stems = [*MODEL, *(f"blk.12.{name}" for name in LAYER)]
    for architecture in ("llama", "qwen3", "gemma2"):
        for stem in stems:
            for suffix in ("weight", "bias"):
                theirs = from_gguf(f"{stem}.{suffix}", architecture)
                assert theirs is not None
                assert to_gguf(theirs, architecture) == f"{stem}.{suffix}"
    assert from_gguf("blk.0.ffn_norm.weight", "gemma2").endswith("pre_feedforward_layernorm.weight")
    for name in (
        "blk.00.attn_q.weight",
        "blk.0.attn_x.weight",
        "output",
        "blk.1234567.attn_q.bias",
    ):
        assert from_gguf(name, "llama") is None


@pytest.mark.parametrize("head", [2, 8, 64])
def test_stored_rows_undo_the_interleaving(head):
    rows = np.arange(3 * head)
    assert np.array_equal(interleaved(rows, head)[stored_rows(rows, head)], rows)


# ---- a whole model


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_comes_back_as_it_was(tmp_path, tied):
    made = model_tensors(tied)
    with open_checkpoint(model(tmp_path, tied=tied)) as read:
        config = json.loads(read.document("config.json"))
        assert config["tie_word_embeddings"] == tied and config["rms_norm_eps"] == 1e-5
        assert config["vocab_size"] == WORDS and config["intermediate_size"] == FEED
        found = from_hugging_face(config)
        assert (found.layers, found.head_dim, found.context) == (LAYERS, HEAD, 64)
        assert read.document("tokenizer.json") is None
        for name, weight in made.items():
            theirs = from_gguf(name, "llama")
            assert np.array_equal(read.float32(theirs), weight), name
            assert np.array_equal(read.float32(theirs, 3, 9), weight[3:9])
        assert len(read.tensors) == len(made)


def test_gemma_keeps_one_plus_w(tmp_path):
    made = model_tensors()
    with GgufFile(model(tmp_path, "gemma")) as read:
        for name in ("blk.1.ffn_norm.weight", "output_norm.weight"):
            found = read.float32(from_gguf(name, "gemma"), 2, 7)
            assert np.array_equal(found, (made[name] - np.float32(1))[2:7])
        query = read.float32("model.layers.0.self_attn.q_proj.weight")
        assert np.array_equal(query, made["blk.0.attn_q.weight"])  # not interleaved


def test_gemma2_says_what_its_config_does(tmp_path):
    with GgufFile(model(tmp_path, "gemma2")) as read:
        config = json.loads(read.document("config.json"))
    assert config["attn_logit_softcapping"] == 50 and config["final_logit_softcapping"] == 30
    assert config["query_pre_attn_scalar"] == HEAD and config["sliding_window"] == 4096
    assert config["model_type"] == "gemma2" and config["hidden_act"] == "gelu_pytorch_tanh"


def test_bitnet_scales_belong_to_their_matrices(tmp_path):
    tensors = entries(model_tensors(), permuted=False)
    tensors.append(("blk.0.attn_v.scale", np.array([0.5], np.float32), 0, (1,)))
    path = write(tmp_path / "m.gguf", pack(model_metadata("bitnet"), tensors))
    with GgufFile(path) as read:
        value = "model.layers.0.self_attn.v_proj.weight"
        wanted = model_tensors()["blk.0.attn_v.weight"] * np.float32(0.5)
        assert np.array_equal(read.float32(value), wanted)
        assert not [name for name in read.tensors if "scale" in name]


def test_raw_gives_plain_numbers_only(tmp_path):
    with GgufFile(model(tmp_path)) as read:
        norm = read.raw("model.norm.weight")
        assert np.array_equal(norm, model_tensors()["output_norm.weight"])
        assert not norm.flags.writeable
        with pytest.raises(UnsupportedError, match="use float32"):
            read.raw("model.layers.0.self_attn.q_proj.weight")
        with pytest.raises(FormatError, match="has no tensor 'x'"):
            read.raw("x")


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_llama_cpp(name, tmp_path):
    path = write(tmp_path / "m.gguf", model_file(name))
    with GgufFile(path) as read:
        family = json.loads(read.document("config.json"))["model_type"]
    if family not in FAMILIES:
        pytest.skip(f"chalot does not run {family} yet")
    convert(path, tmp_path / "m.myai", "f32")
    with load(tmp_path / "m.myai", kv="f32") as model:
        found = model.logits(IDS)
    recorded = GOLDEN["models"][name]
    assert found.argmax(axis=1).tolist() == recorded["top"]
    difference = np.abs(found[-1] - np.array(recorded["last"], np.float32)).max()
    assert difference < 0.005 * recorded["spread"], difference


# ---- rope


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize(
    "low, high, original, theta, head",
    [
        (1.0, 4.0, 8192, 500000.0, 128),
        (1.0, 4.0, 8192, 500000.0, 64),
        (1.0, 4.0, 4096, 10000.0, 64),
        (2.0, 8.0, 8192, 500000.0, 128),
        (1.0, 32.0, 2048, 10000.0, 128),
        (1.0, 4.0, 8192, 500000.0, 16),
    ],
)
def test_llama3_rope_is_found_again(factor, low, high, original, theta, head):
    plain = {
        "model_type": "llama", "hidden_size": head, "num_attention_heads": 1, "rope_theta": theta,
        "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 32, "head_dim": head,
    }  # fmt: skip
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }  # fmt: skip
    (wanted,) = inverse_frequencies(from_hugging_face(plain | {"rope_scaling": scaling}))
    divisors = inverse_frequencies(from_hugging_face(plain))[0].astype(float) / wanted
    stored = divisors.astype(np.float32).tolist()
    found = llama3_scaling(stored, theta, head, "x")
    if low == 1 and head >= 64:
        assert found == scaling
    (again,) = inverse_frequencies(from_hugging_face(plain | {"rope_scaling": found}))
    np.testing.assert_allclose(again, wanted, rtol=2e-6)


def test_divisors_of_one_scale_nothing():
    assert llama3_scaling([1.0] * 8, 10000.0, 16, "x") is None


def test_other_divisors_are_refused():
    with pytest.raises(UnsupportedError, match="does not follow llama3's rule"):
        llama3_scaling([1, 3, 2, 8, 1, 8, 8, 8], 10000.0, 16, "x")


@pytest.mark.parametrize(
    "changed, wanted",
    [
        ({"llama.rope.scaling.type": "none"}, None),
        ({"llama.rope.scaling.type": "linear"}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling_of_metadata(tmp_path, changed, wanted):
    with GgufFile(model(tmp_path, **changed)) as read:
        assert json.loads(read.document("config.json")).get("rope_scaling") == wanted


# ---- parts


def split(tmp_path: Path, **changed) -> list[Path]:
    """A model in three files, the first one without tensors."""
    tensors = entries(model_tensors())
    parts = [[], tensors[:9], tensors[9:]]
    paths = []
    for n, part in enumerate(parts):
        metadata = model_metadata() if n == 0 else {}
        metadata |= {"split.no": n, "split.count": 3, "split.tensors.count": len(tensors)}
        path = tmp_path / f"m-{n + 1:05}-of-00003.gguf"
        paths.append(write(path, pack(metadata | changed.get(f"part{n}", {}), part)))
    return paths


@pytest.mark.parametrize("named", [0, 2])
def test_parts_are_one_model(tmp_path, named):
    paths = split(tmp_path)
    with GgufFile(paths[named]) as read:
        for name, weight in model_tensors().items():
            assert np.array_equal(read.float32(from_gguf(name, "llama")), weight)
        read.check_unchanged()
        paths[1].write_bytes(b"")
        with pytest.raises(FormatError, match="00002-of-00003.gguf: changed since"):
            read.check_unchanged()


def test_a_missing_part_is_named(tmp_path):
    paths = split(tmp_path)
    paths[1].unlink()
    with pytest.raises(FormatError, match=r"m-00002-of-00003\.gguf: is missing, one of the 3"):
        GgufFile(paths[0])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"part1": {"split.no": 2}}, "is part 3 of 3, expected part 2"),
        ({"part1": {"split.count": 4}}, "is part 2 of 4, expected part 2 of 3"),
        ({"part0": {"split.tensors.count": 7}}, "tensors in all parts, expected 7"),
        ({"part0": {"split.count": 100_000}}, "expected at most 500 parts"),
        ({"part0": {"split.count": 0}}, "expected at most 500 parts"),
        ({"part0": {"split.no": 1}}, "expected the name 'm-00002-of-00003.gguf'"),
    ],
)
def test_parts_must_fit_together(tmp_path, changed, message):
    paths = split(tmp_path, **changed)
    with pytest.raises(FormatError, match=message):
        GgufFile(paths[0])


def test_a_part_under_another_name_is_refused(tmp_path):
    path = split(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="expected the name 'NAME-00001-of-00003.gguf'"):
        GgufFile(path)


def test_a_part_may_not_be_a_link_elsewhere(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    paths = split(folder)
    outside = paths[1].rename(tmp_path / "elsewhere.gguf")
    paths[1].symlink_to(outside)
    with pytest.raises(FormatError, match="outside the checkpoint's folder"):
        GgufFile(paths[0])


# ---- converted


@pytest.fixture(scope="module")
def bundled_f16(tmp_path_factory) -> Path:
    """The bundled model as an f16 GGUF."""
    metadata, tensors = bundled_model()
    return write(tmp_path_factory.mktemp("gguf") / "demo.gguf", pack(metadata, tensors))


def test_the_bundled_model_says_the_same_from_a_gguf(bundled_f16, tmp_path):
    convert(FOLDER, tmp_path / "a.myai", "f16")
    report = convert(bundled_f16, tmp_path / "b.myai", "f16")
    assert report.notes == ()
    with load(tmp_path / "a.myai") as ours, load(tmp_path / "b.myai") as theirs:
        assert ours.tokenizer.encode("Once upon") == theirs.tokenizer.encode("Once upon")
        said = [m.generate("Once upon", max_tokens=8, temperature=0) for m in (ours, theirs)]
        assert said[0] == said[1]
        ids = list(range(20))
        assert np.array_equal(ours.logits(ids), theirs.logits(ids))


def test_describe_tells_a_file_from_a_folder(bundled_f16):
    found = describe(bundled_f16)
    assert found.origin.form == "file" and found.origin.unused == ()
    assert found.architecture["family"] == "qwen2" and found.bits_per_weight < 5
    assert {k.source_type for k in found.kinds} == {"f16", "f32"}
    assert "tokenizer.json" in found.origin.documents


def q8_0(weight: np.ndarray) -> np.ndarray:
    """Blocks of Q8_0."""
    groups = weight.reshape(-1, 32)
    scale = (np.abs(groups).max(axis=1, keepdims=True) / 127).astype("<f2")
    codes = np.rint(groups / scale.astype(np.float32)).clip(-127, 127).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=1)


def test_codes_keep_their_width_unless_told_otherwise(tmp_path):
    tensors = []
    for name, stored, kind, dimensions in entries(model_tensors()):
        wide = len(dimensions) == 2 and "attn" in name
        tensors.append((name, q8_0(stored) if wide else stored, 8 if wide else kind, dimensions))
    path = write(tmp_path / "m.gguf", pack(model_metadata(), tensors))
    report = convert(path, tmp_path / "a.myai")
    schemes = {kind.kind: kind.scheme for kind in report.kinds}
    beside = {"embedding": "int8", "ffn": "int8"}  # numbers beside codes
    assert schemes == {"attention": "int8", **beside, "vector": "f32"}
    assert (
        len(report.notes) == 1
        and "are Q8_0 already; quantising them again (Q8_0 to int8) adds" in report.notes[0]
    )
    found = {k.kind: k.scheme for k in describe(path).kinds}
    assert found == schemes
    forced = convert(path, tmp_path / "b.myai", "f16")
    assert {k.scheme for k in forced.kinds} == {"f16", "f32"}
    assert {k.scheme for k in describe(path, "int8").kinds} == {"int8", "f32"}
