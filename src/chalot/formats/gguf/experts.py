"""Mixtures of experts in GGUF: the experts of a layer in one tensor, and what metadata says.

    blk.N.ffn_gate_inp          (experts, hidden): the router
    blk.N.ffn_gate_exps, ...    (experts, rows, columns): gate, up, down; older files hold them one
                                by one, blk.N.ffn_gate.E
    blk.N.ffn_gate_shexp, ...   the shared expert; ffn_gate_inp_shexp (hidden): its router

Mixtral's architecture is "llama". Which weights are normalised, no key says: it goes by the
architecture, as in llama.cpp (src/llama-model.cpp, build_moe_ffn).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from chalot.errors import FormatError, UnsupportedError
from chalot.formats.files import quoted
from chalot.formats.gguf.header import Metadata, Stored, quoted_value

STACK = re.compile(r"blk\.(\d{1,6})\.ffn_(gate|up|down)_exps\.weight")
ONE = re.compile(r"blk\.(\d{1,6})\.ffn_(gate|up|down)\.(\d{1,6})\.weight")
SHARED_ROUTER = re.compile(r"blk\.\d{1,6}\.ffn_gate_inp_shexp\.weight")
MOST = 1024  # experts of a layer
NORMALISED = {"llama": True, "qwen2moe": False, "qwen3moe": True, "olmoe": False}
PLAIN = {  # what changes weights -> the values that do not
    "expert_gating_func": (0, 1), "expert_weights_scale": (0, 1), "expert_group_count": (0, 1),
}  # fmt: skip


def one_by_one(name: str, stored: Stored, where: object) -> Iterator[tuple[str, Stored]]:
    """A layer's experts, or the router of a shared one, under Hugging Face's names.

    Nothing for other tensors. Raises FormatError for a stack that is none.
    """
    stack, one = STACK.fullmatch(name), ONE.fullmatch(name)
    if one is not None:
        layer, part, expert = one.groups()
        yield expert_name(layer, int(expert), part), stored
    elif SHARED_ROUTER.fullmatch(name) and len(stored.shape) == 1:
        layer = name.split(".")[1]
        theirs = f"model.layers.{layer}.mlp.shared_expert_gate.weight"
        yield theirs, stored._replace(shape=(1, *stored.shape))
    elif stack is not None:
        if len(stored.shape) != 3 or not 1 <= stored.shape[0] <= MOST:
            raise FormatError(
                f"{where}: tensor {quoted(name)} has shape {stored.shape[:4]}, expected 1 to "
                f"{MOST} experts, rows, columns"
            )
        each = stored.nbytes // stored.shape[0]  # a row is whole blocks, so an expert is too
        for e in range(stored.shape[0]):
            part_of = stored._replace(
                shape=stored.shape[1:], begin=stored.begin + e * each, nbytes=each
            )
            yield expert_name(stack[1], e, stack[2]), part_of


def expert_name(layer: str, expert: int, part: str) -> str:
    """Hugging Face's name of an expert's matrix."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


def settings(
    metadata: Metadata, architecture: str, tensors: Mapping[str, Stored], layers: int
) -> dict[str, Any]:
    """What config.json says of experts; {} for a dense model. Raises UnsupportedError."""
    count = metadata.integer(f"{architecture}.expert_count", 0)
    if not count:
        return {}
    if architecture not in NORMALISED:
        raise UnsupportedError(
            f"{metadata.where}: {architecture} with {count} experts is not known; chalot runs "
            f"mixtures of: {', '.join(NORMALISED)}"
        )
    for key, plain in PLAIN.items():
        found = metadata.values.get(f"{architecture}.{key}", plain[-1])
        if isinstance(found, np.ndarray | list) or found not in plain:
            raise UnsupportedError(
                f"{metadata.where}: metadata {architecture}.{key} is {quoted_value(found)}; "
                "chalot runs mixtures without it"
            )
    widths = {_width(name, stored) for name, stored in tensors.items()} - {0}
    if not widths:
        raise FormatError(
            f"{metadata.where}: metadata {architecture}.expert_count is {count}, and no tensor "
            "holds experts; expected both or none"
        )
    if len(widths) != 1:
        raise FormatError(
            f"{metadata.where}: found experts of widths {sorted(widths)[:4]}, expected one width"
        )
    shared = {s.shape[0] for n, s in tensors.items() if n.endswith(".ffn_gate_shexp.weight")}
    routed = {n.split(".")[1] for n in tensors if n.endswith(".ffn_gate_inp.weight")}
    out: dict[str, Any] = {
        "num_experts_per_tok": metadata.integer(f"{architecture}.expert_used_count"),
    }
    if architecture == "llama":
        return out | {"num_local_experts": count, "intermediate_size": widths.pop()}
    out |= {"num_experts": count, "norm_topk_prob": NORMALISED[architecture]}
    if architecture == "olmoe":
        return out | {"intermediate_size": widths.pop()}
    out["moe_intermediate_size"] = widths.pop()
    if shared:
        out["shared_expert_intermediate_size"] = max(shared)
    out["mlp_only_layers"] = [i for i in range(min(layers, 4096)) if str(i) not in routed]
    return out


def _width(name: str, stored: Stored) -> int:
    """Rows of an expert's gate; 0 for other tensors."""
    stack, one = STACK.fullmatch(name), ONE.fullmatch(name)
    if stack is not None and stack[2] == "gate" and len(stored.shape) == 3:
        return stored.shape[1]
    return stored.shape[0] if one is not None and one[2] == "gate" else 0
