"""BitNet as GGUF: ternary blocks run as ternary, the same model as its Hugging Face folder."""

from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot.describe import describe
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.folders import open_folder
from chalot.formats.gguf import GgufFile
from chalot.formats.gguf.blocks import BY_NAME
from chalot.formats.gguf.names import to_gguf
from chalot.load import load
from gguf_files import pack, write
from golden.cases import CASES, Case, bitnet, golden, prompt, write_folder

WIDE = Case(
    "bitnet-blocks",
    bitnet("autobitlinear", hidden_size=256, intermediate_size=512),
    vectors="f32",
)
HELD = 2e-5  # of the logits' spread, as in test_parity.py


def digits(signs: np.ndarray) -> np.ndarray:
    """(blocks, 4 or 5, bytes) of -1, 0, 1 as base 3, the first most significant, in 256 steps."""
    powers = 3 ** np.arange(4, -1, -1)[: signs.shape[1], None]
    if signs.shape[1] == 4:
        powers = 3 ** np.arange(4, 0, -1)[:, None]
    return (((signs + 1) * powers).sum(axis=1) * 256 + 242) // 243


def ternary_blocks(kind: str, values: np.ndarray) -> np.ndarray:
    """Blocks of 256 weights, written out as the format's pages have it."""
    q = np.sign(values).reshape(-1, 256).astype(np.int64)
    if kind == "TQ2_0":
        quarters = (q + 1).reshape(-1, 2, 4, 32)
        codes = (quarters << np.array([0, 2, 4, 6])[:, None]).sum(axis=2).reshape(len(q), 64)
    else:
        long, short, rest = q[:, :160], q[:, 160:240], q[:, 240:]
        parts = (long.reshape(-1, 5, 32), short.reshape(-1, 5, 16), rest.reshape(-1, 4, 4))
        codes = np.concatenate([digits(part) for part in parts], axis=1)
    scale = np.full((len(q), 1), np.abs(values).max(), "<f2").view(np.uint8)
    return np.concatenate([codes.astype(np.uint8), scale], axis=1)


def as_gguf(folder: Checkpoint, case: Case, kind: str, architecture: str) -> bytes:
    """A folder's model as a file whose matrices are of that type."""
    config = case.config
    keys = {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "rope.freq_base": "rope_theta",
    }
    metadata = {f"{architecture}.{ours}": config[theirs] for ours, theirs in keys.items()}
    tensors = []
    for name, info in folder.tensors.items():
        values, number = folder.float32(name), 0
        if info.scheme and kind != "F32":
            values, number = ternary_blocks(kind, values), BY_NAME[kind].number
        stored = to_gguf(name, architecture)
        tensors.append((stored, values, number, tuple(reversed(info.shape))))
    return pack({"general.architecture": architecture} | metadata, tensors)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_a_ternary_file_is_its_folder(kind: str, tmp_path: Path) -> None:
    """Every weight, the schemes that are kept, and every bit of the logits."""
    folder = open_folder(write_folder(WIDE, 0, tmp_path / "folder"))
    path = write(tmp_path / "m.gguf", as_gguf(folder, WIDE, kind, "bitnet-b1.58"))
    with GgufFile(path) as read:
        assert read.tensors.keys() == folder.tensors.keys()
        for name, info in folder.tensors.items():
            assert (
                read.tensors[name].shape == info.shape and read.tensors[name].scheme == info.scheme
            )
            np.testing.assert_array_equal(read.float32(name), folder.float32(name))
    kept = {"embedding": "f32", "attention": "ternary", "ffn": "ternary", "vector": "f32"}
    scheme = "embedding=f32,attention=ternary,ffn=ternary"
    files = []
    for source in (folder.path, path):
        report = chalot.convert(source, tmp_path / f"{source.name}.myai", scheme, threads=1)
        assert {k.kind: k.scheme for k in report.kinds} == kept
        assert all(k.error < 1e-13 for k in report.kinds)  # the scale's last bit
        files.append(tmp_path / f"{source.name}.myai")
    ids = prompt(WIDE, 0)
    with load(files[0], threads=1) as ours, load(files[1], threads=1) as theirs:
        assert ours.file.manifest.source.digest == theirs.file.manifest.source.digest
        np.testing.assert_array_equal(ours.logits(ids), theirs.logits(ids))
    folder.close()


def test_a_ternary_file_is_kept_ternary(tmp_path: Path) -> None:
    folder = open_folder(write_folder(WIDE, 0, tmp_path / "folder"))
    path = write(tmp_path / "m.gguf", as_gguf(folder, WIDE, "TQ1_0", "bitnet-b1.58"))
    folder.close()
    wanted = {"embedding": "int8", "attention": "ternary", "ffn": "ternary", "vector": "f32"}
    assert {k.kind: k.scheme for k in describe(path).kinds} == wanted
    report = chalot.convert(path, tmp_path / "m.myai", threads=1)
    assert {k.kind: k.scheme for k in report.kinds} == wanted
    assert "are TQ1_0 already" in report.notes[0]


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    """Through a file of numbers, since the recorded model is narrower than a ternary block."""
    case = CASES["bitnet"]
    folder = open_folder(write_folder(case, 0, tmp_path / "folder"))
    path = write(tmp_path / "m.gguf", as_gguf(folder, case, "F32", "bitnet-b1.58"))
    folder.close()
    chalot.convert(path, tmp_path / "m.myai", "f32", threads=1)
    with np.load(golden(case)) as truth, load(tmp_path / "m.myai", kv="f32", threads=1) as model:
        found = model.logits(truth["ids"].tolist())
        difference = np.abs(found[truth["positions"]] - truth["logits"]).max()
        assert difference < HELD * truth["spread"]
        assert (found.argmax(axis=1) == truth["top"]).all()
