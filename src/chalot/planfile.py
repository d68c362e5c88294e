"""A plan as a file: the scheme of every tensor, and what it was decided from.

Also read and written: the simple form of the EWQ proof of concept, {"0": "raw", "1": "8-bit", ...},
which speaks of blocks only; what is no block takes the default scheme.
"""

import hashlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import msgspec

from chalot.errors import FormatError, SchemeError, one_line
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.documents import parse_json
from chalot.formats.files import quoted
from chalot.model.config import ModelConfig
from chalot.model.layers import layer_tensors, model_tensors
from chalot.quant.scheme import SCHEMES, Scheme

VERSION = 1
LARGEST = 16 << 20  # bytes of a plan
SIMPLE = {"raw": "bf16", "8-bit": "int8", "4-bit": "nl4", "2-bit": "nl2", "1.58-bit": "ternary"}


class PlanDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See module. `tensors` goes from chalot's names to schemes; losses are nats a token.

    A name may also be a region of the model, "deep", or "deep.ffn": all its matrices of that kind.
    """

    format: int
    source: str
    fingerprint: str  # of the checkpoint: see `fingerprint`
    method: str
    tensors: dict[str, str]
    bytes: Annotated[int, msgspec.Meta(ge=0, lt=1 << 60)]  # of all tensors, as planned
    bits_per_weight: float
    expected_loss: float | None = None
    measured_loss: float | None = None
    text: str | None = None  # calibration text, by name and digest
    details: dict[str, Any] = {}  # of the method: entropies, thresholds, tables


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells checkpoints apart without reading them whole: config, headers, each tensor's begin."""
    digest = hashlib.sha256(checkpoint.document("config.json") or b"")
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        if len(info.shape) == 2 and info.shape[0]:
            digest.update(checkpoint.float32(name, 0, 1).tobytes())
    return digest.hexdigest()


def read_plan(path: Path, config: ModelConfig) -> PlanDocument:
    """A plan of either form. Raises FormatError, or SchemeError for a scheme that is not known."""
    try:
        if not path.is_file():  # a device would never end
            raise FormatError(f"{path}: is no file; expected what `chalot plan` writes")
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise FormatError(f"{path}: cannot be read ({error})") from None
    if len(raw) > LARGEST:
        raise FormatError(f"{path}: larger than {LARGEST:,} bytes; no plan is")
    parsed = parse_json(raw, str(path))
    if isinstance(parsed, dict) and parsed and all(k.isdecimal() for k in parsed):
        return from_simple(parsed, config, str(path))
    try:
        plan = msgspec.convert(parsed, PlanDocument)
    except msgspec.ValidationError as error:
        raise FormatError(
            f"{path}: {one_line(error)}; expected what `chalot plan` writes"
        ) from None
    if plan.format != VERSION:
        raise FormatError(f"{path}: plan of format {plan.format}; this chalot reads {VERSION}")
    for name, scheme in plan.tensors.items():
        if scheme not in SCHEMES:
            raise SchemeError(
                f"{path}: tensor {quoted(name)}: scheme {quoted(scheme, 40)} is not known; "
                f"choose of: {', '.join(SCHEMES)}"
            )
    return plan


def from_simple(levels: Mapping[str, Any], config: ModelConfig, where: str) -> PlanDocument:
    """The simple form: a level for each block."""
    expected = {str(i) for i in range(config.layers)}
    if set(levels) != expected or any(v not in tuple(SIMPLE) for v in levels.values()):
        raise FormatError(
            f"{where}: expected a level for each of {config.layers} blocks, of: {', '.join(SIMPLE)}"
        )
    tensors = {
        spec.name: SIMPLE[levels[spec.name.split(".")[1]]]
        for spec in model_tensors(config)
        if spec.kind != "vector" and spec.name.startswith("layers.")
    }
    return PlanDocument(VERSION, "", "", "simple", tensors, 0, 0.0)


def to_simple(plan: PlanDocument) -> dict[str, str]:
    """Block -> level. Raises SchemeError for a plan that cannot be said so: one not by blocks."""
    levels = {scheme: level for level, scheme in SIMPLE.items()}
    blocks: dict[str, set[str]] = {}
    for name, scheme in plan.tensors.items():
        if name.startswith("layers."):
            blocks.setdefault(name.split(".")[1], set()).add(scheme)
    for block, found in blocks.items():
        if len(found) > 1 or not found <= levels.keys():
            raise SchemeError(
                f"block {block} has {', '.join(sorted(found))}; the simple form knows one of "
                f"{', '.join(levels)} for each block: leave out --simple"
            )
    return {block: levels[found.pop()] for block, found in blocks.items()}


def planned_schemes(
    plan: PlanDocument, checkpoint: Checkpoint, config: ModelConfig
) -> dict[str, Scheme]:
    """The schemes of the matrices that it names. Raises FormatError for another model's plan."""
    if plan.fingerprint and plan.fingerprint != fingerprint(checkpoint):
        made_for = quoted(plan.source) if plan.source else "another model"
        raise FormatError(
            f"the plan was made for {made_for}, and {checkpoint.path} is not that; make one for it "
            "with `chalot plan`"
        )
    known = {s.name for s in model_tensors(config) if s.kind != "vector"}
    unknown = sorted(n for n in plan.tensors.keys() - known if not in_region(n, config))
    if unknown:
        like = get_close_matches(unknown[0][:80], known, n=1)
        raise FormatError(
            f"the plan names {quoted(unknown[0])}, which is no matrix of {checkpoint.path}"
            + (f" (did you mean {like[0]}?)" if like else "")
            + "; mend the plan, or make one for it with `chalot plan`"
        )
    found: dict[str, Scheme] = {}
    for name, scheme in plan.tensors.items():  # of all of a region first: names go over them
        found |= dict.fromkeys(in_region(name, config), SCHEMES[scheme])
    found |= {name: SCHEMES[s] for name, s in plan.tensors.items() if name in known}
    if "embedding" in found:
        found.setdefault("head", found["embedding"])  # a tied head has no other
    return found


def in_region(name: str, config: ModelConfig) -> list[str]:
    """The matrices that "REGION" or "REGION.KIND" stands for, as "deep" or "deep.ffn"."""
    region, _, kind = name.partition(".")
    layers = next((r.layers for r in config.regions if r.name == region), range(0))
    return [
        spec.name
        for layer in layers
        for spec in layer_tensors(config, layer)
        if spec.kind != "vector" and kind in ("", spec.kind)
    ]


def as_bytes(plan: PlanDocument, simple: bool = False) -> bytes:
    """The plan's file; in the simple form, which may raise SchemeError, where asked for."""
    said = to_simple(plan) if simple else plan
    return msgspec.json.format(msgspec.json.encode(said), indent=1) + b"\n"
