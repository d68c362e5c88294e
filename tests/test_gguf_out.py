"""GGUF files that chalot writes: read back by its own reader, they are the model that went in.

That llama.cpp computes the same with them is in benchmarks/gguf_out.py.
"""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import chalot
from chalot.checking import read_config
from chalot.demo import FOLDER
from chalot.errors import FormatError, SchemeError, TokenizerError, UnsupportedError, WeightError
from chalot.export import export
from chalot.export.gguf import parse_types, type_of
from chalot.formats import safetensors
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.gguf import GgufFile
from chalot.formats.gguf.blocks import decode
from chalot.formats.gguf.encode import WRITABLE, encode
from chalot.formats.gguf.writer import TensorPlan, header
from chalot.formats.safetensors import SafetensorsFolder
from chalot.model.layers import TensorSpec
from chalot.text.tokenizer import check_same, from_source
from golden.cases import CASES, golden, write_folder
from myai_files import checkpoint
from test_parity import HELD
from vocabularies import byte_level, sentencepiece, unigram

ERRORS = {  # relative squared error on N(0, 1): about as llama.cpp's own, tq at half of it
    "f32": 0, "f16": 4.3e-8, "bf16": 2.8e-6, "q8_0": 2.9e-5, "q6_k": 3.05e-4, "q5_k": 1.3e-3,
    "q5_1": 1.43e-3, "q5_0": 1.82e-3, "q4_k": 5.1e-3, "q4_1": 6.1e-3, "q4_0": 7.4e-3,
    "iq4_nl": 5.65e-3, "iq4_xs": 5.75e-3, "q3_k": 0.0218, "q2_k": 0.0733, "tq2_0": 0.188,
    "tq1_0": 0.188,
}  # fmt: skip
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}


def again(kind: str, rows: np.ndarray) -> np.ndarray:
    """What a type keeps of rows."""
    coded = encode(WRITABLE[kind], rows)
    return decode(WRITABLE[kind].block, coded.reshape(-1)).reshape(rows.shape)


def test_every_type_has_an_error() -> None:
    assert ERRORS.keys() == WRITABLE.keys()


@pytest.mark.parametrize("kind", WRITABLE)
def test_each_type_loses_what_it_should(kind: str) -> None:
    x = np.random.default_rng(0).standard_normal((64, 1024), np.float32)
    lost = float(((again(kind, x) - x) ** 2).sum() / (x**2).sum())
    assert lost <= ERRORS[kind] * 1.03
    # neither zeros nor sizes matter; float16's own range does
    assert not again(kind, np.zeros((2, 256), np.float32)).any()
    for scale in (2.0**-8, 2.0**6):
        y = again(kind, x[:4] * np.float32(scale)) / np.float32(scale)
        assert ((y - x[:4]) ** 2).sum() <= (x[:4] ** 2).sum() * (ERRORS[kind] * 1.1 + 1e-6)


@pytest.mark.parametrize("kind", WRITABLE)
@settings(max_examples=15, deadline=None)
@given(
    x=arrays(
        np.float32,
        (1, 256),
        elements=st.floats(-(2.0**15), 2.0**15, width=32, allow_subnormal=True),
        fill=st.sampled_from([np.float32(0), np.float32(1), np.float32(-3e-39)]),
    )
)
def test_any_block_is_encoded_and_stays_in_range(kind: str, x: np.ndarray) -> None:
    y = again(kind, x)
    assert np.isfinite(y).all()
    assert np.abs(y).max() <= np.abs(x).max() * 1.3 + 2.0**-24
    assert np.abs(y - x).max() <= np.abs(x).max() + 2.0**-24


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_ternary_weights_stay(kind: str) -> None:
    x = np.random.default_rng(1).integers(-1, 2, (8, 512)).astype(np.float32) * np.float32(0.0375)
    assert np.array_equal(again(kind, x), x.astype(np.float16))


@pytest.mark.parametrize("kind", [k for k in WRITABLE if k not in ("f32", "bf16")])
def test_weights_past_the_scale_are_refused(kind: str) -> None:
    with pytest.raises(OverflowError):
        encode(WRITABLE[kind], np.full((1, 256), 3e38, np.float32))


@pytest.mark.parametrize("kind", WRITABLE)
def test_a_file_of_each_type_comes_back(kind: str, tmp_path: Path) -> None:
    """All matrices as the encoder keeps them, through rows turned for rope and runs of pieces."""
    source = checkpoint(tmp_path / "in", "bf16", **WIDE, model_type="llama")
    report = export(source, tmp_path / "m.gguf", type=f"{kind},head={kind},embedding={kind}")
    assert [k.scheme for k in report.kinds if k.kind != "vector"] == [kind] * 4
    with SafetensorsFolder(source) as before, GgufFile(tmp_path / "m.gguf") as after:
        assert before.tensors.keys() == after.tensors.keys()
        for name, info in before.tensors.items():
            x, y = before.float32(name), after.float32(name)
            assert info.shape == after.tensors[name].shape
            assert np.array_equal(y, x if len(info.shape) == 1 else again(kind, x))
    matrices = [k for k in report.kinds if k.kind != "vector"]
    assert all(k.error <= ERRORS[kind] * 1.1 for k in matrices)
    assert report.bytes == (tmp_path / "m.gguf").stat().st_size
    assert report.bits_per_weight < 33


# ---- the header


FAMILIES = (
    *("qwen2", "qwen2-odd", "llama", "llama3", "llama3-older", "llama-biases", "llama-linear"),
    *("llama-tied", "tinyllama", "mistral-full", "qwen3", "gemma-f32"),
    *("olmo2", "smollm3", "stablelm"),
)


@pytest.mark.parametrize("name", [*FAMILIES, "qwen2-yarn", "gemma2", "gemma3"])
def test_a_family_goes_out_and_comes_back(name: str, tmp_path: Path) -> None:
    """As transformers computes it, where llama.cpp's architecture is all of the family."""
    case = CASES[name]
    if name == "qwen2-yarn":
        scaling = case.config["rope_scaling"] | {"beta_fast": 32.0}
        case = replace(case, config=case.config | {"rope_scaling": scaling})
    if name in ("gemma2", "gemma3"):
        scale = {"query_pre_attn_scalar": case.config["head_dim"], "torch_dtype": "float32"}
        case = replace(case, config=case.config | scale)
    folder = write_folder(case, 0, tmp_path / "in")
    report = export(folder, tmp_path / "m.gguf", "gguf", "f32")
    assert report.notes == ("the file has no tokenizer: programs can give it token ids only",)
    before, after = (open_checkpoint(p) for p in (folder, tmp_path / "m.gguf"))
    wanted, found = (read_config(c) for c in (before, after))
    for made in (before, after):
        made.close()
    llama = {"mistral": "llama"}.get(wanted.family, wanted.family)
    for field in wanted.__struct_fields__:
        expected = llama if field == "family" else getattr(wanted, field)
        if field == "rope_scaling" and expected is not None:
            assert found.rope_scaling is not None
            assert found.rope_scaling.kind == expected.kind
            assert found.rope_scaling.factor == pytest.approx(expected.factor)
        elif isinstance(expected, float):
            assert getattr(found, field) == pytest.approx(expected)
        else:
            assert getattr(found, field) == expected, field
    for there, made in ((folder, "before"), (tmp_path / "m.gguf", "after")):
        chalot.convert(there, tmp_path / f"{made}.myai", "f32", threads=1)
    with (
        chalot.load(tmp_path / "before.myai", kv="f32", threads=1) as a,
        chalot.load(tmp_path / "after.myai", kv="f32", threads=1) as b,
    ):
        wanted_logits, found_logits = (m.logits(list(range(3, 40))) for m in (a, b))
        spread = wanted_logits.max() - wanted_logits.min()
        assert np.abs(wanted_logits - found_logits).max() < 1e-5 * spread
    if name in FAMILIES:
        chalot.convert(tmp_path / "m.gguf", tmp_path / "m.myai", "f32", threads=1)
        with (
            chalot.load(tmp_path / "m.myai", kv="f32", threads=1) as m,
            np.load(golden(case)) as truth,
        ):
            logits = m.logits(truth["ids"].tolist())[truth["positions"]]
            assert np.abs(logits - truth["logits"]).max() < HELD * truth["spread"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bitnet", "family bitnet: no GGUF is written of it"),
        ("qwen2-yarn", "rope_scaling is .*safetensors instead"),
        ("gemma2", "score_scale is"),
        ("gemma2-long", "logit_cap is"),
        ("llama-gelu", "activation is 'gelu_tanh'"),
        ("qwen3-new", "query_key_value_bias is True"),
        ("qwen2-odd-48", "head_dim is 48"),
        ("gemma3", "score_scale is"),
        ("phi3", "family phi3: no GGUF is written of it"),
        ("granite", "family granite: no GGUF is written of it"),
        ("olmo2-groups", "query_key_value_bias is True"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, message: str, tmp_path: Path
) -> None:
    write_folder(CASES[name], 0, tmp_path / "in")
    with pytest.raises(UnsupportedError, match=message):
        export(tmp_path / "in", tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_lost_window_is_said(tmp_path: Path) -> None:
    write_folder(CASES["mistral"], 0, tmp_path / "in")
    report = export(tmp_path / "in", tmp_path / "m.gguf")
    assert "no sliding window: past 24 tokens" in report.notes[0]


def test_headers() -> None:
    plans = [TensorPlan("a", WRITABLE["q4_0"].block, (3, 64))]
    raw = header({"k": "v", "n": 3, "x": 0.5, "b": True, "s": ["p", "q"]}, plans)
    assert raw[:4] == b"GGUF" and struct.unpack_from("<IQQ", raw, 4) == (3, 1, 5)
    assert len(raw) % 32 == 0 and plans[0].nbytes == 3 * 36 and plans[0].padded == 128
    with pytest.raises(FormatError, match="half a surrogate pair"):
        header({"k": "\ud800"}, plans)


# ---- types by kind


def test_types_by_kind(tmp_path: Path) -> None:
    assert parse_types("Q4_K, head=Q8_0") == {"": "q4_k", "head": "q8_0"}
    assert parse_types("embedding=f16") == {"": "f16", "embedding": "f16"}
    for wrong, message in (
        ("q4_k_m", "choose one of: f32, f16, bf16, q8_0"),
        ("", "choose one of"),
        ("q4_0,q8_0", "each kind once"),
        ("legs=q4_0", "kinds: embedding, head, attention, ffn"),
        ("ffn=q4_0,ffn=q8_0", "each kind once"),
    ):
        with pytest.raises(SchemeError, match=message):
            parse_types(wrong)
    narrow = TensorSpec("layers.0.up", (8, 96), "ffn")
    found = {kind: type_of(narrow, {"": kind}, False) for kind in WRITABLE}
    assert found["q4_k"] == "q5_0" and found["q6_k"] == "q8_0" and found["q4_0"] == "q4_0"
    assert found["q3_k"] == found["iq4_xs"] == "iq4_nl" and found["tq1_0"] == "q4_0"
    odd = TensorSpec("layers.0.up", (8, 100), "ffn")
    assert {type_of(odd, {"": k}, False) for k in WRITABLE} == {"f32", "f16", "bf16"}
    report = export(checkpoint(tmp_path / "in"), tmp_path / "m.gguf", type="q4_k")
    schemes = {k.kind: k.scheme for k in report.kinds}
    assert schemes == {
        **{"embedding": "q5_0", "head": "q8_0"},
        **{"attention": "q5_0", "ffn": "q5_0", "vector": "f32"},
    }
    assert any("rows of 64, 96 are no multiple of 256" in note for note in report.notes)


def test_a_tied_embedding_is_kept_as_the_head_is() -> None:
    embedding = TensorSpec("embedding", (4096, 256), "embedding")
    assert type_of(embedding, {"": "q4_0"}, True) == "q6_k"
    assert type_of(embedding, {"": "q4_0"}, False) == "q4_0"
    assert type_of(embedding, {"": "q4_0", "embedding": "q4_0"}, True) == "q4_0"
    assert type_of(embedding, {"": "tq2_0"}, False) == "q4_k"
    assert type_of(embedding, {"": "bf16"}, True) == "bf16"


# ---- tokenizers


def test_the_bundled_tokenizer_goes_round(tmp_path: Path) -> None:
    report = export(FOLDER, tmp_path / "m.gguf")
    assert any("NFC" in note for note in report.notes)
    with SafetensorsFolder(FOLDER) as before, GgufFile(tmp_path / "m.gguf") as after:
        check_same(from_source(before), from_source(after))
        for name in ("config.json", "generation_config.json"):
            assert after.document(name) is not None


@pytest.mark.parametrize(
    "raw",
    [byte_level(), sentencepiece(), sentencepiece("first"), sentencepiece("never", False)],
    ids=["bytes", "legacy", "first", "never"],
)
def test_tokenizers_go_round(raw: bytes, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", vocab_size=2048)
    (source / "tokenizer.json").write_bytes(raw)
    try:
        export(source, tmp_path / "m.gguf")
    except TokenizerError as error:
        assert "--no-tokenizer" in str(error)
        report = export(source, tmp_path / "m.gguf", tokenizer=False)
        assert "has no tokenizer" in report.notes[0]
        return
    with SafetensorsFolder(source) as before, GgufFile(tmp_path / "m.gguf") as after:
        ours, theirs = from_source(before), from_source(after)
        for text in ("def f(x):\n    return x", " a  b", "naïve 12345", "\u00e9\U0001f600", ""):
            assert ours.encode(text) == theirs.encode(text), text


def test_a_tokenizer_that_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", vocab_size=2048)
    (source / "tokenizer.json").write_bytes(unigram())
    with pytest.raises(TokenizerError, match="a model of type 'Unigram'"):
        export(source, tmp_path / "m.gguf")
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        export(source, tmp_path / "m.gguf")
    (source / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(TokenizerError, match="vocab"):
        export(source, tmp_path / "m.gguf")
    (source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 99999}}}')
    with pytest.raises(TokenizerError, match="has id 99999, the embedding has 2048 rows"):
        export(source, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# ---- weights


def test_weights_that_cannot_be_held_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in")
    with SafetensorsFolder(source) as opened:
        tensors = {n: opened.float32(n) for n in opened.tensors}
    for value, message in ((1e9, "too large for q8_0; choose --type f32 or bf16"), (np.inf, "Inf")):
        tensors["lm_head.weight"][129, 3] = value
        stored = [(n, "f32", v.shape, v) for n, v in tensors.items()]
        safetensors.write(source / "model.safetensors", stored)
        with pytest.raises(WeightError, match=message):
            export(source, tmp_path / "m.gguf", type="q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
