"""Mixtures of experts: routing, what is read and refused, sharing, and that nothing else moves.

Logits against transformers' are in test_parity.py, equal bits in test_family_exactness.py.
"""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chalot
import tiny
from chalot.cli import main
from chalot.convert.pruning import most_used
from chalot.errors import FormatError, KernelError, SchemeError, UnsupportedError
from chalot.formats.checkpoint import Checkpoint, open_checkpoint
from chalot.formats.myai import MyaiFile
from chalot.kernels.backend import open_backend
from chalot.kernels.program import Op, Part, Program, Slot
from chalot.kernels.reference import exp, route
from chalot.model.config import ModelConfig, from_hugging_face, inverse_frequencies
from chalot.model.layers import model_tensors
from chalot.model.transformer import Weights, build
from chalot.upcycle import Settings, upcycle
from golden import cases
from golden.cases import CASES, Shard, mixtral, olmoe, qwen2_moe, qwen3_moe
from test_exactness import NATIVE, digest, feed, ids

SMALL = {"hidden_size": 96, "vocab_size": 85, "num_attention_heads": 4, "head_dim": 24}


def small(**changes: Any) -> ModelConfig:
    return from_hugging_face(mixtral(**SMALL, num_key_value_heads=2) | changes)


# ---- routing


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.1, 1, 40])
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_route_takes_the_best(seed: int, experts: int, top: int, size: float) -> None:
    """The `top` best, weights that sum to 1 where they are to, or the softmax's own."""
    top = min(top, experts)
    rng = np.random.default_rng(seed)
    scores = (rng.integers(-3, 4, (5, experts)) * size).astype(np.float32)  # many are equal
    softmax = np.exp(scores - scores.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    for routing in ("softmax", "chosen"):
        found = route(routing, top, scores)
        taken = found != -1
        assert (taken.sum(axis=1) == top).all()
        for row, chosen, given_ in zip(scores, taken, found, strict=True):
            order = sorted(range(experts), key=lambda e: (-row[e], e))
            assert set(np.flatnonzero(chosen)) == set(order[:top])
            assert (given_[chosen] >= 0).all()
        expected = np.where(taken, softmax, 0)
        if routing == "chosen":
            expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(np.where(taken, found, 0), expected, rtol=1e-5, atol=1e-7)


def test_a_sigmoid_is_of_each_score() -> None:
    scores = np.array([[-100, -1, 0, 2.5, 100]], np.float32)
    expected = 1 / (1 + np.exp(-scores.astype(np.float64)))
    np.testing.assert_allclose(route("sigmoid", 5, scores), expected, rtol=1e-6, atol=1e-37)
    assert exp(np.float32([0]))[0] == 1


# ---- exactness beyond test_family_exactness.py


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("scheme", ["nl4", "bf16", "row4", "nl2"])
def test_batches_and_threads_change_no_bit(scheme: str, planes: int) -> None:
    """A text alone, among others, in pieces, token by token: the oracle's bits."""
    config = from_hugging_face(
        qwen2_moe(**SMALL, num_key_value_heads=2, num_experts=9, moe_intermediate_size=136)
    )
    w = tiny.weights(config, {"*": scheme, "router": "f32"}, planes)
    program = build(config, w, inverse_frequencies(config), "int8")
    texts = [ids(i, 11 + 6 * i) % 85 for i in range(3)]
    oracle = [digest(x) for x in feed(open_backend("reference"), program, texts, 64)]
    for isa in NATIVE:
        for threads, chunk in ((1, 64), (3, 4), (2, 1)):
            found = feed(open_backend(isa, threads), program, texts, chunk)
            assert [digest(x) for x in found] == oracle, (isa, threads, chunk)
        alone = feed(open_backend(isa, 2), program, [texts[1]], 7)[0]
        assert digest(alone) == oracle[1]


def test_experts_are_counted() -> None:
    """Each token counts for as many experts as it takes, in native code as in the oracle."""
    config = small(num_local_experts=5, num_experts_per_tok=2)
    w = tiny.weights(config, {"*": "nl4", "router": "f32"})
    program = build(config, w, inverse_frequencies(config), "int8")
    found = []
    for backend in (open_backend("reference"), open_backend(threads=2)):
        compiled = backend.compile(program)
        feed(SameProgram(compiled), program, [ids(0, 20) % 85], 20)
        found.append([x.tolist() for x in compiled.taken])
    assert found[0] == found[1] and [sum(x) for x in found[0]] == [40] * config.layers


class SameProgram:
    """A backend that gives a program which is compiled already."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled

    def compile(self, _: Program) -> Any:
        return self.compiled


@pytest.mark.parametrize("scheme", ["nl4", "bf16"])
def test_paged_experts_give_the_same_bits(scheme: str) -> None:
    """Asking ahead for experts computes nothing that is used."""
    config = small(num_local_experts=7)
    w = tiny.weights(config, {"*": scheme, "router": "f32"})
    plain, paged = (
        build(config, x, inverse_frequencies(config), "int8") for x in (w, replace(w, paged=True))
    )
    assert sum(op.kind == "prefetch" for op in paged.ops) == config.layers - 1
    for backend in (open_backend("reference"), open_backend(threads=2)):
        a, b = (digest(feed(backend, p, [ids(1, 20) % 85], 6)[0]) for p in (plain, paged))
        assert a == b


def test_norms_of_all_heads_go_with_sinks() -> None:
    """Queries turned for the first positions are normed as the others are."""
    base = from_hugging_face(olmoe(**SMALL, num_key_value_heads=2))
    config = msgspec.structs.replace(base, windows=(9, 9), sinks=(4, 4))
    w = tiny.weights(config, {"*": "nl4", "router": "f32"})
    program = build(config, w, inverse_frequencies(config), "int8")
    oracle = digest(feed(open_backend("reference"), program, [ids(3, 30) % 85], 30)[0])
    for isa in NATIVE:
        for threads, chunk in ((1, 30), (3, 4), (2, 1)):
            found = feed(open_backend(isa, threads), program, [ids(3, 30) % 85], chunk)[0]
            assert digest(found) == oracle, (isa, threads, chunk)


def test_experts_that_are_one_are_a_dense_model() -> None:
    """Of one blob and weights that sum to 1: the bits of the feed-forward alone."""
    config = small(num_local_experts=4)
    dense = msgspec.structs.replace(config, family="mistral", experts=None)
    w = tiny.weights(dense, {"*": "nl4"})
    matrices, routers = dict(w.matrices), tiny.weights(config, {"*": "nl4", "router": "f32"})
    planes = dict(w.planes)
    for spec in model_tensors(config):
        if ".experts." in spec.name:
            layer, own = spec.name.split(".")[1], spec.name.rsplit(".", 1)[-1]
            matrices[spec.name] = w.matrices[f"layers.{layer}.{own}"]
            planes[spec.name] = w.planes[f"layers.{layer}.{own}"]
        elif spec.kind == "router":
            matrices[spec.name] = routers.matrices[spec.name]
    copies = Weights(matrices, w.vectors, planes)
    frequencies, backend = inverse_frequencies(config), open_backend(threads=1)
    found = [
        digest(feed(backend, build(c, x, frequencies, "int8"), [ids(0, 30) % 85], 30)[0])
        for c, x in ((dense, w), (config, copies))
    ]
    assert found[0] == found[1]
    other = build(config, tiny.weights(config, {"*": "nl4", "router": "f32"}), frequencies, "int8")
    assert any(op.kind == "experts" for op in other.ops)


# ---- programs and files that do not fit together


def bad_programs() -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "other count": ({"parts": slice(0, 3)}, "gate, up and down for each"),
        "other shape": ({"parts": [0, 1, 1, 3, 4, 5]}, "another shape"),
        "no route": ({"routes": 0}, "experts"),
        "more than routed": ({"top": 2}, "a route that chose as many"),
        "numbers for codes": ({"planes": 0}, "differ in kind"),
        "weights are codes": ({"target": "source"}, "of their own"),
    }


@pytest.mark.parametrize("name", bad_programs())
def test_experts_that_do_not_fit_are_refused(name: str) -> None:
    change, message = bad_programs()[name]
    config = small(num_local_experts=2, num_experts_per_tok=1, num_hidden_layers=1)
    w = tiny.weights(config, {"*": "nl4", "router": "f32"})
    program = build(config, w, inverse_frequencies(config), "int8")
    at = next(i for i, op in enumerate(program.ops) if op.kind == "experts")
    op = program.ops[at]
    if "target" in change:
        change = {"target": op.source}
    if "parts" in change:
        chosen = change["parts"]
        parts = op.parts[chosen] if isinstance(chosen, slice) else [op.parts[i] for i in chosen]
        change = {"parts": tuple(parts)}
    ops = (*program.ops[:at], replace(op, **change), *program.ops[at + 1 :])
    with pytest.raises(KernelError, match=message):
        open_backend(threads=1).compile(replace(program, ops=ops))


def test_more_experts_than_there_are_cannot_be_routed() -> None:
    x = tiny.matrix(np.ones((2, 4), np.float32), "f32")
    base = small(num_hidden_layers=1)
    shape = build(base, tiny.weights(base, {"*": "f32"}), inverse_frequencies(base), "f32")
    ops = (
        Op("embed", target=0, parts=(Part(x),), number=1.0),
        Op("route", 0, 1, top=5),
    )
    bad = replace(shape, slots=(Slot(4), Slot(4)), ops=ops)
    with pytest.raises(KernelError, match="1 to all"):
        open_backend(threads=1).compile(bad)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (mixtral(num_experts_per_tok=7), "a token takes 7 of 6 experts"),
        (mixtral(num_local_experts=0), "num_local_experts is 0"),
        (mixtral(num_local_experts=1 << 20), "1048576 experts; expected 1 to 1024"),
        (mixtral(num_local_experts=1000, num_hidden_layers=4000), "at most 65,536 experts"),
        (mixtral(num_experts=4), "num_experts is 4; expected what num_local_experts says: 6"),
        (qwen2_moe(mlp_only_layers=[9]), "mlp_only_layers is [9]"),
        (qwen2_moe(mlp_only_layers="all"), "mlp_only_layers is 'all'"),
        (qwen2_moe(mlp_only_layers=[True]), "mlp_only_layers"),
        (qwen2_moe(decoder_sparse_step=0), "decoder_sparse_step is 0"),
        (qwen3_moe(norm_topk_prob="yes"), "norm_topk_prob is 'yes'"),
        (olmoe(clip_qkv=8.0), "clip_qkv is 8.0"),
        (cases.llama(num_experts=8), "num_experts is 8"),
        (cases.llama(num_local_experts=8), "num_local_experts is 8"),
    ],
)
def test_configurations_that_contradict_themselves(config: dict[str, Any], message: str) -> None:
    with pytest.raises(chalot.ChalotError) as caught:
        from_hugging_face(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"top": 9},
        {"count": 0},
        {"width": 0},
        {"dense_layers": [1, 0]},
        {"dense_layers": [2]},
        {"shared_width": -1},
        {"count": 1024, "top": 1, "extra": 1},
    ],
)
def test_a_manifest_of_nonsense_is_refused(change: dict[str, Any]) -> None:
    fields = msgspec.to_builtins(small())
    fields["experts"] |= change
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields, ModelConfig)


def test_which_layers_are_dense() -> None:
    config = from_hugging_face(
        qwen2_moe(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    )
    assert config.experts is not None and config.experts.dense_layers == (0, 2, 3, 4)
    assert [config.experts_of(i) is None for i in range(6)] == [
        True,
        False,
        True,
        True,
        True,
        False,
    ]
    names = {t.name for t in model_tensors(config)}
    assert {"layers.0.gate", "layers.1.router", "layers.1.shared.up"} <= names
    assert "layers.1.gate" not in names and "layers.0.router" not in names


# ---- folders


def stacked(case: cases.Case, folder: Path, change: dict[str, Any] | None = None) -> Path:
    """The case's folder as transformers 5 keeps it: experts in one tensor."""
    shapes, shard = cases.shapes(case.config), Shard()
    values = {n: cases.weights(case, n, s, 0) for n, s in shapes.items()}
    groups: dict[tuple[str, str], list[np.ndarray]] = {}
    order = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up"}
    for name, x in values.items():
        own = name.replace("block_sparse_moe", "mlp")
        if ".experts." not in own:
            shard.add(own, x, case.stored)
            continue
        layer, _, rest = own.partition(".experts.")
        groups.setdefault((layer, order.get(rest.split(".")[1], "down")), []).append(x)
    for (layer, kind), held in groups.items():
        if kind == "down":
            shard.add(f"{layer}.experts.down_proj", np.stack(held), case.stored)
        elif kind == "gate":
            both = [np.concatenate(pair) for pair in zip(held, groups[layer, "up"], strict=True)]
            shard.add(f"{layer}.experts.gate_up_proj", np.stack(both), case.stored)
    folder.mkdir(parents=True)
    for name, x in (change or {}).items():
        shard.add(name, x, "f32")
    shard.write(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case.config))
    return folder


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe-sparse"])
def test_experts_in_one_tensor_are_read_one_by_one(name: str, tmp_path: Path) -> None:
    """Both ways that transformers saves: the same model, the same digest of weights."""
    plain = open_checkpoint(cases.write_folder(CASES[name], 0, tmp_path / "plain"))
    other = open_checkpoint(stacked(CASES[name], tmp_path / "stacked"))
    assert plain.tensors.keys() == other.tensors.keys()
    for tensor, info in plain.tensors.items():
        found = other.tensors[tensor]
        assert (info.shape, info.dtype, info.nbytes) == (found.shape, found.dtype, found.nbytes)
        np.testing.assert_array_equal(plain.float32(tensor), other.float32(tensor))
        some = (1, 3) if info.shape[0] > 2 else (0, 1)
        np.testing.assert_array_equal(plain.float32(tensor, *some), other.float32(tensor, *some))
        np.testing.assert_array_equal(plain.raw(tensor), other.raw(tensor))
    down = next(n for n in other.tensors if n.endswith("experts.1.down_proj.weight"))
    with pytest.raises(IndexError):
        other.float32(down, 0, 10_000)
    with pytest.raises(FormatError, match="has no tensor"):
        other.float32("model.layers.0.mlp.experts.gate_up_proj")
    for checkpoint in (plain, other):
        checkpoint.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.mlp.experts.3.up_proj.weight": np.zeros((80, 96))}, "twice"),
        ({"model.layers.7.mlp.experts.gate_up_proj": np.zeros((6, 7, 96))}, "twice their width"),
        ({"model.layers.7.mlp.experts.down_proj": np.zeros((6, 96))}, "(experts, hidden"),
        ({"model.layers.7.mlp.experts.down_proj": np.zeros((1, 96, 4))}, "not in the model"),
        ({"model.layers.0.mlp.experts.9.up_proj.weight": np.zeros((80, 96))}, "not in the model"),
    ],
)
def test_stacks_that_are_none(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = stacked(CASES["mixtral"], tmp_path / "m", change)
    with pytest.raises(FormatError) as caught:
        chalot.convert(folder, tmp_path / "no.myai", threads=1)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_local_experts", 5, "has shape (6, 96), config.json asks for (5, 96)"),
        ("num_local_experts", 8, "has shape (6, 96), config.json asks for (8, 96)"),
        ("intermediate_size", 64, "config.json asks for (64, 96)"),
    ],
)
def test_missing_experts_are_named(key: str, value: int, message: str, tmp_path: Path) -> None:
    folder = cases.write_folder(CASES["mixtral"], 0, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError) as caught:
        chalot.convert(folder, tmp_path / "no.myai", threads=1)
    assert message in str(caught.value) and not (tmp_path / "no.myai").exists()


def test_an_expert_that_is_not_there(tmp_path: Path) -> None:
    folder, case, shard = tmp_path / "m", CASES["mixtral"], Shard()
    folder.mkdir()
    for name, shape in cases.shapes(case.config).items():
        if ".1.block_sparse_moe.experts.4.w2" not in name:
            shard.add(name, cases.weights(case, name, shape, 0), case.stored)
    shard.write(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case.config))
    with pytest.raises(FormatError, match=r"experts\.4\.down_proj\.weight is missing"):
        chalot.convert(folder, tmp_path / "no.myai", threads=1)


def test_some_experts_dense_and_some_coded_are_refused() -> None:
    config = small()
    w = tiny.weights(config, {"*": "nl4", "router": "f32", "layers.0.experts.1.up": "bf16"})
    with pytest.raises(UnsupportedError, match="some experts are coded and some are dense"):
        build(config, w, inverse_frequencies(config), "int8")


def test_routers_stay_as_they_were(tmp_path: Path) -> None:
    """Whatever the scheme, unless they are named."""
    folder = cases.write_folder(CASES["qwen2-moe"], 0, tmp_path / "m")
    report = chalot.convert(folder, tmp_path / "m.myai", "nl4", threads=1)
    kinds = {k.kind: k for k in report.kinds}
    assert kinds["router"].scheme == "f32" and kinds["router"].error == 0
    assert kinds["ffn"].scheme == "nl4"
    report = chalot.convert(folder, tmp_path / "r.myai", "router=int8", threads=1)
    assert {k.kind: k.scheme for k in report.kinds}["router"] == "int8"
    with chalot.load(tmp_path / "r.myai") as model:
        assert np.isfinite(model.logits([1, 2, 3])).all()


# ---- pruning


def test_pruned_models_are_the_source_with_fewer_experts(tmp_path: Path) -> None:
    """The file says so itself; all experts but those of most tokens are gone, in router too."""
    folder = cases.write_folder(CASES["qwen2-moe-sparse"], 0, tmp_path / "m")
    whole, few = tmp_path / "whole.myai", tmp_path / "few.myai"
    chalot.convert(folder, whole, "f32", threads=1)
    chalot.convert(folder, few, "f32", threads=1, experts=4)
    with open_both(whole, few) as (a, b):
        document = json.loads(b.document("config.json") or b"")
        assert document["num_experts"] == 4
        layer = "model.layers.1.mlp."
        routers = [x.float32(layer + "gate.weight") for x in (a, b)]
        assert routers[1].shape == (4, 128)
        chosen = [int(np.flatnonzero((routers[0] == row).all(axis=1))[0]) for row in routers[1]]
        assert chosen == sorted(set(chosen))
        for new, old in enumerate(chosen):
            for part in ("gate", "up", "down"):
                name = layer + "experts.{}." + part + "_proj.weight"
                np.testing.assert_array_equal(
                    a.float32(name.format(old)), b.float32(name.format(new))
                )
        same = layer + "shared_expert.up_proj.weight"
        np.testing.assert_array_equal(a.float32(same), b.float32(same))
        assert not any(".experts.4." in n for n in b.tensors)
    with chalot.load(few) as model:
        assert model.config.experts is not None and model.config.experts.count == 4
        assert np.isfinite(model.logits([1, 2, 3])).all()


@contextmanager
def open_both(*paths: Path) -> Iterator[list[Checkpoint]]:
    """Files as checkpoints."""
    opened = [open_checkpoint(p) for p in paths]
    try:
        yield opened
    finally:
        for checkpoint in opened:
            checkpoint.close()


def test_the_most_used_experts_are_counted_by_the_router(tmp_path: Path) -> None:
    """By the model's own counts on the same text, layer after layer."""
    folder = cases.write_folder(CASES["mixtral"], 0, tmp_path / "m")
    chalot.convert(folder, tmp_path / "m.myai", "f32", threads=1)
    text = list(range(60))
    with chalot.load(tmp_path / "m.myai", kv="f32", threads=1) as model:
        model.logits(text)
        counts = [np.array(x) for x in model.engine.runnable.taken]
        with open_both(folder) as (source,):
            kept = most_used(source, model.config, model.backend, text, 3)
    assert kept == {
        i: tuple(sorted(np.argsort(-n, kind="stable")[:3].tolist())) for i, n in enumerate(counts)
    }


def test_experts_that_were_one_tensor_stay_one(tmp_path: Path) -> None:
    """A pruned mixture of copies is as small as it can be: one more expert costs nothing."""
    folder = cases.write_folder(CASES["mistral"], 0, tmp_path / "m")
    copies = tmp_path / "copies.myai"
    upcycle(folder, copies, Settings(experts=6), scheme="f32")
    sizes, bits = [], []
    for experts in (3, 4):
        few = tmp_path / f"{experts}.myai"
        chalot.convert(copies, few, "f32", threads=1, experts=experts)
        with closing(MyaiFile(few)) as file:
            assert len([n for n in file.aliases if n.startswith("layers.0.")]) == 3 * (experts - 1)
            sizes.append(sum(e.bytes for e in {t.extent for t in file.manifest.tensors.values()}))
            bits.append(file.bits_per_weight)
    config = from_hugging_face(CASES["mistral"].config)
    assert sizes[1] - sizes[0] == config.hidden * config.layers * 4  # a row of each router
    assert bits == [32, 32]


def test_all_experts_are_no_pruning(tmp_path: Path) -> None:
    folder = cases.write_folder(CASES["mixtral"], 0, tmp_path / "m")
    for name, experts in (("a", None), ("b", 6)):
        chalot.convert(folder, tmp_path / f"{name}.myai", experts=experts, command="x", threads=1)
    a, b = ((tmp_path / f"{name}.myai").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("name", "experts", "message"),
    [
        ("mixtral", 1, "a token takes 2 of 6 experts; expected 2 to 6"),
        ("mixtral", 7, "expected 2 to 6"),
        ("mixtral", 0, "expected 2 to 6"),
        ("mistral", 2, "has no experts"),
    ],
)
def test_what_cannot_be_pruned(name: str, experts: int, message: str, tmp_path: Path) -> None:
    folder = cases.write_folder(CASES[name], 0, tmp_path / "m")
    with pytest.raises(SchemeError, match=message):
        chalot.convert(folder, tmp_path / "no.myai", threads=1, experts=experts)
    assert not (tmp_path / "no.myai").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "{m}", "-o", "{o}"], "mixture"),
        (["convert", "{m}", "-o", "{o}.gguf"], "mixture"),
        (["convert", "{m}", "-o", "{o}", "--to", "npz"], "mixture"),
        (["convert", "{m}", "-o", "{o}", "--refine", "gptq"], "mixture"),
        (["convert", "{m}", "-o", "{o}.gguf", "--experts", "3"], "--experts"),
        (["convert", "{m}", "-o", "{o}", "--experts", "3", "--dry-run"], "--experts"),
        (["convert", "{m}", "-o", "{o}", "--experts", "many"], "--experts"),
    ],
)
def test_verbs_say_what_they_do_not_know(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cases.write_folder(CASES["mixtral"], 0, tmp_path / "m")
    words = [w.format(m=folder, o=tmp_path / "out") for w in arguments]
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr().err
    assert code and message in said and "Traceback" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
