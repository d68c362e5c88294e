"""Mixtures of experts in GGUF: stacks, experts one by one, what metadata must not contradict.

Models are the golden cases', so that what is read is held against the same weights in a folder;
their logits are transformers' (test_parity.py).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chalot
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.gguf.names import LAYER, MODEL
from gguf_files import interleaved, pack
from golden import cases
from golden.cases import CASES, Case

ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
}
GATES = {"w1": "gate", "w2": "down", "w3": "up"}
PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def stored(case: Case, one_by_one: bool = False) -> dict[str, np.ndarray]:
    """The case's tensors under GGUF's names."""
    stems = {v: k for k, v in MODEL.items()}
    layer_stems = {v: k for k, v in LAYER.items()}
    out: dict[str, Any] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, shape in cases.shapes(case.config).items():
        values = cases.weights(case, name, shape, 0)
        stem, _, suffix = name.replace("block_sparse_moe", "mlp").rpartition(".")
        if stem in stems:
            out[f"{stems[stem]}.{suffix}"] = values
            continue
        _, _, layer, own = stem.split(".", 3)
        if own.startswith("mlp.experts."):
            _, _, expert, part = own.split(".")
            kind = GATES.get(part) or PARTS[part]
            if one_by_one:
                out[f"blk.{layer}.ffn_{kind}.{expert}.weight"] = values
            else:
                stacks.setdefault(f"blk.{layer}.ffn_{kind}_exps.weight", []).append(values)
        elif own == "mlp.shared_expert_gate":
            out[f"blk.{layer}.ffn_gate_inp_shexp.weight"] = values[0]
        else:
            turned = case.config["model_type"] == "mixtral" and own[-6:] in ("q_proj", "k_proj")
            size = (
                shape[0] // case.config[f"num_{'attention' if 'q_p' in own else 'key_value'}_heads"]
            )
            written = interleaved(values, size) if turned else values
            out[f"blk.{layer}.{layer_stems[own]}.{suffix}"] = written
    return out | {name: np.stack(held) for name, held in stacks.items()}


def metadata(case: Case) -> dict[str, Any]:
    c, name = case.config, ARCHITECTURES[case.config["model_type"]]
    head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    found = {
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "block_count": c["num_hidden_layers"],
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "rope.dimension_count": head,
        "rope.freq_base": c["rope_theta"],
        "expert_count": c.get("num_local_experts", c.get("num_experts")),
        "expert_used_count": c["num_experts_per_tok"],
        "vocab_size": c["vocab_size"],
    }
    for key, theirs in (
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ):
        if theirs in c:
            found[key] = c[theirs]
    named = {"general.architecture": name, "tokenizer.ggml.model": "no_vocab"}
    return named | {f"{name}.{key}": value for key, value in found.items()}


def write(
    case: Case, path: Path, change: dict[str, Any] | None = None, one_by_one: bool = False
) -> Path:
    """The case as a GGUF file; `change` replaces metadata, or with arrays tensors."""
    tensors, said = stored(case, one_by_one), metadata(case)
    for key, value in (change or {}).items():
        (tensors if isinstance(value, np.ndarray) else said)[key] = value
    path.write_bytes(
        pack(said, [(n, v.astype("<f4"), 0, tuple(reversed(v.shape))) for n, v in tensors.items()])
    )
    return path


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe"])
def test_a_file_is_its_folder(name: str, one_by_one: bool, tmp_path: Path) -> None:
    """Every tensor, and the model's logits, to the bit."""
    case = Case(name, CASES[name].config, "f32")
    folder = cases.write_folder(case, 0, tmp_path / name)
    file = write(case, tmp_path / "m.gguf", one_by_one=one_by_one)
    a, b = open_checkpoint(folder), open_checkpoint(file)
    assert a.tensors.keys() == b.tensors.keys()
    for tensor, info in a.tensors.items():
        assert info.shape == b.tensors[tensor].shape
        np.testing.assert_array_equal(a.float32(tensor), b.float32(tensor))
    a.close(), b.close()
    found = []
    for source, out in ((folder, "a"), (file, "b")):
        chalot.convert(source, tmp_path / f"{out}.myai", "int8", threads=1)
        with chalot.load(tmp_path / f"{out}.myai", threads=1) as model:
            found.append(model.logits(range(20)))
    np.testing.assert_array_equal(*found)


def test_dense_layers_are_those_without_a_router(tmp_path: Path) -> None:
    config = CASES["qwen2-moe-sparse"].config | {"norm_topk_prob": False}
    config |= {"use_sliding_window": False}
    case = Case("sparse", config, "f32")
    file = open_checkpoint(write(case, tmp_path / "m.gguf"))
    folder = open_checkpoint(cases.write_folder(case, 0, tmp_path / "sparse"))
    assert file.tensors.keys() == folder.tensors.keys()
    assert b'"mlp_only_layers": [\n  0,\n  2,\n  3\n ]' in (file.document("config.json") or b"")
    file.close(), folder.close()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixtral", {"llama.expert_used_count": 9}, "a token takes 9 of 6 experts"),
        ("mixtral", {"llama.expert_count": 9}, "shape (6, 96)"),
        ("qwen2-moe", {"qwen2moe.expert_gating_func": 2}, "expert_gating_func is 2"),
        ("qwen2-moe", {"qwen2moe.expert_weights_scale": 2.5}, "expert_weights_scale is 2.5"),
        ("olmoe", {"blk.0.ffn_gate_exps.weight": np.zeros((8, 4))}, "experts, rows, columns"),
        ("olmoe", {"blk.0.ffn_gate_exps.weight": np.zeros((8, 60, 96))}, "of widths [56, 60]"),
        ("olmoe", {"blk.0.ffn_down_exps.weight": np.zeros((7, 96, 56))}, "is missing"),
        ("olmoe", {"blk.0.ffn_down.3.weight": np.zeros((96, 56))}, "expected it once"),
    ],
)
def test_files_that_contradict_themselves(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write(CASES[name], tmp_path / "m.gguf", change)
    with pytest.raises(chalot.ChalotError) as caught:
        chalot.convert(file, tmp_path / "no.myai", threads=1)
    assert message in str(caught.value)


def test_other_architectures_have_no_experts(tmp_path: Path) -> None:
    change = {"general.architecture": "qwen2", "qwen2.expert_count": 4}
    values = {k.replace("olmoe.", "qwen2."): v for k, v in metadata(CASES["olmoe"]).items()}
    file = write(CASES["olmoe"], tmp_path / "m.gguf", values | change)
    with pytest.raises(chalot.ChalotError, match="qwen2 with 4 experts is not known"):
        open_checkpoint(file)


def test_routers_stay_numbers_when_codes_are_kept(tmp_path: Path) -> None:
    folder = cases.write_folder(CASES["mixtral"], 0, tmp_path / "in")
    chalot.convert(folder, tmp_path / "a.myai", "int8", threads=1)
    for name, more in (("b.myai", {}), ("c.myai", {"experts": 3})):
        chalot.convert(tmp_path / "a.myai", tmp_path / name, threads=1, **more)
        with chalot.load(tmp_path / name, threads=1) as model:
            tensors = model.file.manifest.tensors
            assert tensors["layers.0.router"].scheme == "f32"
            assert tensors["layers.0.experts.0.gate"].scheme == "int8"
