"""GGUF: what is hostile is refused in one line that names the file, fast and in little memory."""

import os
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chalot.convert import convert
from chalot.errors import ChalotError, FormatError, UnsupportedError
from chalot.formats.gguf import GgufFile
from chalot.formats.gguf_header import MAX_ALIGNMENT, MAX_VALUES, parse_header
from gguf_files import ARRAY, STRING, Raw, entries, info, model_metadata, model_tensors, pack, text

SMALL = [("token_embd.weight", np.zeros((4, 32), np.float32), 0, (32, 4))]
BIG = 1 << 60


def array(kind: int, count: int, content: bytes = b"") -> Raw:
    return Raw(struct.pack("<IIQ", ARRAY, kind, count) + content)


def nested(depth: int) -> Raw:
    return Raw(struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * depth)


def with_info(dimensions, kind=0, offset=0, name="token_embd.weight") -> bytes:
    """A file whose one tensor is described like that, with 512 bytes of payload."""
    return pack(model_metadata(), infos=[info(name, dimensions, kind, offset)]) + bytes(512)


FILES = {  # name -> (content, part of the message)
    "empty": (b"", "begins with b'', expected a GGUF file"),
    "magic": (b"GGML" + bytes(60), "begins with b'GGML', expected a GGUF file"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    "only magic": (b"GGUF", "found 4 bytes"),
    "version 0": (pack(version=0), "is GGUF version 0"),
    "version 1": (pack(version=1), "make the file again with a newer llama.cpp"),
    "version 4": (pack(version=4), "version 4, expected 2 or 3; update chalot"),
    "big-endian": (pack(version=3 << 24), "is big-endian; convert it with"),
    "pairs": (pack(counts=(0, BIG)), "says it has 1,152,921,504,606,846,976 metadata pairs"),
    "pairs, some": (pack(model_metadata(), counts=(0, 90_000)), "90,000 metadata pairs"),
    "tensors": (pack(counts=(BIG, 0)), "says it has 1,152,921,504,606,846,976 tensors"),
    "one pair more": (pack(model_metadata(), SMALL, counts=(1, 10)), "name of tensor 0 has"),
    "long key": (pack()[:16] + struct.pack("<QQ", 1, BIG) + bytes(50), "key 0 has"),
    "key past the end": (pack()[:16] + struct.pack("<QQ", 1, 999) + bytes(50), "truncated"),
    "long text": (pack({"a": Raw(struct.pack("<IQ", STRING, BIG))}), "expected at most"),
    "text past the end": (pack({"a": Raw(struct.pack("<IQ", STRING, 5000))}), "truncated"),
    "not UTF-8": (pack({"a": b"\xff"}), "metadata 'a': byte 0 is not UTF-8"),
    "key not UTF-8": (pack([(b"\xff", 1)]), "key 0: byte 0 is not UTF-8"),
    "value type": (pack({"a": Raw(struct.pack("<I", 13))}), "value type 13 does not exist"),
    "element type": (pack({"a": array(13, 1, bytes(64))}), "value type 13 does not exist"),
    "truth": (pack({"a": Raw(struct.pack("<IB", 7, 2))}), "found 2 as a truth value"),
    "truths": (pack({"a": array(7, 3, b"\0\1\5")}), "found 5 as a truth value"),
    "numbers": (pack({"a": array(0, BIG)}), "truncated download?"),
    "wide numbers": (pack({"a": array(12, 1 << 61)}), "truncated download?"),
    "texts": (pack({"a": array(STRING, BIG)}), "truncated download?"),
    "arrays": (pack({"a": array(ARRAY, BIG)}), "truncated download?"),
    "deep": (pack({"a": nested(1000)}), "nested deeper than 4"),
    "duplicate key": (pack([("a", 1), ("a", 2)]), "key 'a' is there twice"),
    "alignment 0": (pack({"general.alignment": 0}), "alignment is 0, expected a power of two"),
    "alignment 24": (pack({"general.alignment": 24}), "is 24, expected a power of two"),
    "alignment huge": (pack({"general.alignment": 1 << 31}), "expected a power of two"),
    "alignment text": (pack({"general.alignment": "x"}), "is 'x', expected a power of two"),
    "alignment true": (pack({"general.alignment": True}), "is True, expected a power of two"),
    "alignment float": (pack({"general.alignment": 32.0}), "expected a power of two"),
    "duplicate tensor": (pack(model_metadata(), SMALL * 2), "'token_embd.weight' is there twice"),
    "no dimensions": (with_info(()), "has 0 dimensions, expected 1 to 4"),
    "five dimensions": (with_info((1,) * 5), "has 5 dimensions"),
    "many dimensions": (pack(infos=[text("a") + struct.pack("<I", 1 << 31)]), "dimensions"),
    "dimension 0": (with_info((32, 0)), "impossible dimensions"),
    "dimension 2^63": (with_info((1 << 63,)), "impossible dimensions"),
    "product 2^64": (with_info((1 << 32, 1 << 32)), "impossible dimensions"),
    "product 2^64 + 32": (with_info(((1 << 60) + 2, 16)), "impossible dimensions"),
    "type": (with_info((32, 4), kind=99), "has type 99, which is not known"),
    "removed type": (with_info((32, 4), kind=4), "has type 4, which is not known"),
    "woven rows": (with_info((32, 4), kind=31), "has type 31, Q4_0_4_4, rows woven for one kind"),
    "bitnet.cpp's": (with_info((32, 4), kind=36), "has type 36, I2_S of bitnet.cpp, which lays it"),
    "blocks": (with_info((48, 4), kind=8), "no whole blocks of Q8_0, which have 32"),
    "misaligned": (with_info((32, 4), offset=8), "begins at 8, expected a multiple of 32"),
    "past the end": (with_info((32, 5)), "file has"),
    "offset 2^60": (with_info((32, 4), offset=BIG), "truncated download?"),
    "offset 2^64": (with_info((32, 4), offset=(1 << 64) - 32), "truncated download?"),
    "overlap": (
        pack(model_metadata(), infos=[info("a", (32, 4), 0, 0), info("b", (32,), 0, 480)])
        + bytes(600),
        "tensor 'b' overlaps 'a'; do not use this file",
    ),
    "same extent": (
        pack(model_metadata(), infos=[info("a", (32,), 0, 0), info("b", (32,), 0, 0)])
        + bytes(600),
        "overlaps",
    ),
    "nothing": (pack(), "metadata 'general.architecture' is missing"),
    "architecture": (pack({"general.architecture": "mamba"}), "'mamba' is not known; chalot runs"),
    "architecture 7": (pack({"general.architecture": 7}), "is 7, expected a text"),
    "adapter": (pack({"general.type": "adapter"}), "holds a 'adapter', expected a whole model"),
    "experts": (pack(model_metadata(**{"llama.expert_count": 8}), SMALL), "holds experts"),
    "a scale of its own": (
        pack(model_metadata(**{"llama.embedding_scale": 12.0}), SMALL),
        "metadata llama.embedding_scale is 12.0; chalot runs llama models without it",
    ),
    "many scales": (
        pack(model_metadata(**{"llama.logit_scale": np.ones(4, "<f4")}), SMALL),
        "chalot runs llama models without it",
    ),
    "no heads": (pack(model_metadata(**{"llama.attention.head_count": 0}), SMALL), "found 0 heads"),
    "head of 0": (
        pack(model_metadata(**{"llama.attention.head_count": 33}), SMALL),
        "heads have 0 numbers",
    ),
    "no embedding": (pack(model_metadata()), "token_embd.weight is missing or no matrix"),
    "vector": (
        pack(model_metadata(), [("token_embd.weight", np.zeros(32, np.float32), 0, (32,))]),
        "token_embd.weight is missing or no matrix",
    ),
    "tokens without rows": (
        pack(model_metadata(**{"tokenizer.ggml.tokens": list("abcde")}), SMALL),
        "has 5 tokens, its embedding 4 rows",
    ),
    "a window of OLMo 3": (
        pack(model_metadata("olmo2", **{"olmo2.attention.sliding_window": 4096}), SMALL),
        "olmo2.attention.sliding_window is 4096; chalot runs olmo2 models without it",
    ),
    "value heads": (
        pack(model_metadata(**{"llama.attention.value_length": 16}), SMALL),
        "value_length is 16, expected the 8 numbers",
    ),
    "partial rope": (
        pack(
            model_metadata(
                **{"llama.attention.key_length": 8, "llama.rope.dimension_count": 4}
            ),
            SMALL,
        ),
        "rope.dimension_count is 4, expected the 8 numbers",
    ),
    "heads by layer": (
        pack(model_metadata(**{"llama.attention.head_count": np.array([4, 8], "<i4")}), SMALL),
        "expected a whole number, the same for all layers",
    ),
    "theta 0": (pack(model_metadata(**{"llama.rope.freq_base": 0.0}), SMALL), "rope's base"),
    "theta NaN": (
        pack(model_metadata(**{"llama.rope.freq_base": float("nan")}), SMALL),
        "expected a finite number",
    ),
    "divisors": (
        pack(model_metadata(), [*SMALL, ("rope_freqs.weight", np.ones(9, np.float32), 0, (9,))]),
        "has shape (9,), expected (4,)",
    ),
    "divisors NaN": (
        pack(
            model_metadata(),
            [*SMALL, ("rope_freqs.weight", np.full(4, np.nan, np.float32), 0, (4,))],
        ),
        "values that are no divisors",
    ),
    "half a head": (
        pack(
            model_metadata(),
            [*SMALL, ("blk.0.attn_q.weight", np.zeros((12, 32), np.float32), 0, (32, 12))],
        ),
        "has 12 rows, no whole heads of 8",
    ),
    "unread type": (
        pack(
            model_metadata(),
            [*SMALL, ("blk.0.attn_q.weight", np.zeros(50 * 8, np.uint8), 19, (256, 8))],
        ),
        "is IQ1_S; chalot reads F32, F16",
    ),
}  # fmt: skip


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


@pytest.mark.parametrize("case", FILES)
def test_hostile_files(tmp_path, case):
    content, message = FILES[case]
    (tmp_path / "m.gguf").write_bytes(content)
    refuse(tmp_path / "m.gguf", message)


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


GOOD = pack(
    model_metadata(
        **{
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": ["a", "b", "ab", "<x>"],
            "tokenizer.ggml.token_type": np.array([1, 1, 1, 3], "<i4"),
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.eos_token_id": 3,
        }
    ),
    entries(model_tensors()),
)
HEADER = GOOD.index(b"blk.1.ffn_down.weight") + 60


def opened(path: Path) -> None:
    """Read all of a file that may be damaged: an error of ours that names it, or none."""
    try:
        with GgufFile(path) as read:
            for name, tensor in read.tensors.items():
                assert read.float32(name, 0, min(2, tensor.shape[0])).dtype == np.float32
            for name in ("config.json", "tokenizer.json", "generation_config.json"):
                read.document(name)
    except ChalotError as error:
        assert path.name in str(error) and "\n" not in str(error)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_raise_or_read_but_never_crash(tmp_path_factory, data):
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, HEADER))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    opened(path)


VALUES = st.one_of(
    st.integers(0, (1 << 32) - 1),
    st.floats(width=32),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.text(max_size=4), max_size=4),
    st.sampled_from([np.zeros(4, "<i4"), np.full(4, np.nan, "<f4"), np.arange(4, dtype="u1")]),
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_metadata_raises_or_reads_but_never_crashes(tmp_path_factory, data):
    metadata = model_metadata(data.draw(st.sampled_from(["llama", "gemma2", "qwen2", "bitnet"])))
    keys = [
        *metadata,
        *(
            "general.alignment",
            "general.type",
            "split.count",
            "split.no",
            "llama.rope.scaling.type",
        ),
        *("llama.rope.scaling.factor", "gemma2.attn_logit_softcapping", "general.sampling.top_k"),
        *(
            f"tokenizer.ggml.{key}"
            for key in ("model", "pre", "tokens", "scores", "token_type", "merges", "eos_token_id")
        ),
        *("tokenizer.chat_template", "tokenizer.chat_templates", "tokenizer.ggml.add_bos_token"),
    ]
    for key in data.draw(st.lists(st.sampled_from(keys), max_size=4)):
        metadata[key] = data.draw(VALUES)
    if data.draw(st.booleans()):
        metadata["tokenizer.ggml.model"] = data.draw(st.sampled_from(["gpt2", "llama"]))
    made = model_tensors()
    if data.draw(st.booleans()):
        draw = data.draw(st.lists(st.floats(width=32), min_size=4, max_size=4))
        made["rope_freqs.weight"] = np.array(draw, np.float32)
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(pack(metadata, entries(made)))
    opened(path)
