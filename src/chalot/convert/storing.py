"""Which scheme each tensor is stored in, and what else was asked of storing it."""

import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from chalot import __version__
from chalot.checking import read_config
from chalot.convert.keeping import KEEP, kept, usual_of
from chalot.convert.refining import Refine
from chalot.errors import FormatError, RegionError, SchemeError, one_line
from chalot.formats.checkpoint import Checkpoint
from chalot.formats.myai import MyaiFile
from chalot.formats.myai.manifest import HEADER
from chalot.formats.myai.source import MyaiSource
from chalot.model.config import ModelConfig
from chalot.model.layers import KINDS, TensorSpec, model_tensors
from chalot.model.regions import Regions, check_regions, parse_regions
from chalot.planfile import planned_schemes, read_plan
from chalot.quant import packing
from chalot.quant.scheme import SCHEMES, Scheme

DEFAULT_SCHEME = "nl4"
ROUTER_SCHEME = "f32"  # small, and a wrong choice of experts is a large error
DOCUMENTS = (  # of a source, that its file holds too
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
TERNARY = ("least-error", "absmean")  # where the scale of ternary weights comes from


@dataclass(frozen=True)
class Storing:
    """How a checkpoint becomes a file.

    `schemes` are by kind of tensor, and by name where a plan or the source says so. `balance` folds
    channels as other schemes would have it: of dense files. `ternary` is where the scale of ternary
    weights comes from; "absmean" is BitNet's, one for each matrix, which is left as it is
    otherwise, as a model that was trained with that scale has it for these very weights.
    """

    schemes: Mapping[str, Scheme]
    balance: Mapping[str, Scheme] | None = None
    ternary: str = TERNARY[0]
    refine: Refine | None = None
    notes: Sequence[str] = ()  # what a user should know of the schemes, a line each
    share: Path | None = None  # a file beside it, whose bytes are not written again
    regions: str | None = None  # "shallow=0-5,deep=6-17,...": see chalot.model.regions


def parse_schemes(text: str) -> dict[str, Scheme]:
    """The scheme of each kind of tensor: "nl4" for all, or "attention=int8,ffn=nl4".

    A kind that is not named takes the default, but for a head, which goes with the embedding, and
    routers, which stay f32. "keep" gives the default too: see `schemes_for`. Raises SchemeError for
    unknown kinds or schemes.
    """
    if text.strip().lower() == KEEP:
        text = DEFAULT_SCHEME
    if "=" not in text:
        return dict.fromkeys(KINDS, Scheme.parse(text)) | {"router": SCHEMES[ROUTER_SCHEME]}
    chosen: dict[str, Scheme] = {}
    for item in text.split(","):
        kind, _, name = (part.strip() for part in item.partition("="))
        if kind not in KINDS or kind in chosen:
            raise SchemeError(
                f"{item!r}: expected KIND=SCHEME, each kind once; kinds: {', '.join(KINDS)}"
            )
        chosen[kind] = Scheme.parse(name)
    default = Scheme.parse(DEFAULT_SCHEME)
    chosen.setdefault("head", chosen.get("embedding", default))
    chosen.setdefault("router", SCHEMES[ROUTER_SCHEME])
    return {kind: chosen.get(kind, default) for kind in KINDS}


def with_regions(config: ModelConfig, asked: str | None, checkpoint: Checkpoint) -> ModelConfig:
    """The model with the regions that were asked for, else with those that its source has.

    Raises RegionError where they do not fit the model.
    """
    try:
        if asked is not None:
            found = parse_regions(asked)
            check_regions(found, config.layers)
        else:
            held: object = ()
            if isinstance(checkpoint, MyaiSource):
                held = checkpoint.file.manifest.config.get("named_regions", ())
            found = msgspec.convert(held, Regions)
            if found:
                check_regions(found, config.layers)
    except msgspec.ValidationError as error:
        raise FormatError(f"{checkpoint.path}: regions: {one_line(error)}") from None
    except ValueError as error:
        raise RegionError(f"--regions: {error}") from None
    return msgspec.structs.replace(config, named_regions=found)


def schemes_for(
    text: str | None,
    checkpoint: Checkpoint,
    plan: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    regions: str | None = None,
) -> dict[str, Scheme]:
    """Schemes by kind, and by tensor where a plan or a source in codes names its own.

    Without a text, as is usual for such a source. `say` gets a line on matrices that a plan does
    not name. Raises SchemeError or FormatError.
    """
    ours = checkpoint if isinstance(checkpoint, MyaiSource) else None
    # what is asked of a file beside a scheme: to be whole, or to have other regions
    same = ours is not None and (regions is not None or ours.file.other is not None)
    text = text or (KEEP if same else usual_of(checkpoint.tensors, DEFAULT_SCHEME))
    schemes = parse_schemes(text)
    config = read_config(checkpoint)
    if text.strip().lower() == KEEP:
        schemes |= kept(checkpoint.tensors, config, ours is not None)
    if plan is not None:
        config = with_regions(config, regions, checkpoint)
        planned = planned_schemes(read_plan(plan, config), checkpoint, config)
        schemes |= planned
        matrices = [s for s in model_tensors(config) if s.kind != "vector"]
        beside = [s for s in matrices if s.name not in planned]
        if beside:
            names = ", ".join(s.name for s in beside[:3]) + (", ..." if len(beside) > 3 else "")
            given = ", ".join(sorted({str(scheme_of(schemes, s)) for s in beside}))
            count = f"{len(beside)} of {len(matrices)} matrices"
            say(f"the plan leaves out {count}, which get {given}: {names}")
    return schemes


def scheme_of(schemes: Mapping[str, Scheme], spec: TensorSpec) -> Scheme:
    """A matrix's own scheme, else that of its kind."""
    return schemes.get(spec.name) or schemes[spec.kind]


def planned_bytes(
    config: ModelConfig, schemes: Mapping[str, Scheme], same: Container[str] = ()
) -> int:
    """Bytes that the file will need, without its documents. `same` are tensors that share bytes."""
    total = HEADER
    for spec in model_tensors(config):
        if spec.name in same:
            pass
        elif spec.kind == "vector":
            total += spec.shape[0] * 4
        else:
            total += packing.stored_bytes(scheme_of(schemes, spec), spec.shape[0], spec.shape[1])
        total += packing.ALIGNMENT + 300  # alignment, and its place in the manifest
    return total


def making(
    how: Storing, checkpoint: Checkpoint, config: ModelConfig, share: MyaiFile | None = None
) -> str:
    """A digest of all that decides a file's bytes but for the weights themselves."""
    schemes = [{n: str(s) for n, s in (of or {}).items()} for of in (how.schemes, how.balance)]
    refine = how.refine and (how.refine.method, how.refine.text.digest)
    documents = [checkpoint.document(name) for name in DOCUMENTS]
    other = share and (share.path.name, share.digest)
    said = (__version__, config, schemes, how.ternary, refine, documents, other)
    raw = msgspec.json.encode((*said, dict(checkpoint.tensors)), order="sorted")
    return hashlib.sha256(raw).hexdigest()


def check_ternary(ternary: str, schemes: Mapping[str, Scheme], refined: bool) -> None:
    """Raise SchemeError for a scale that is not known, that no matrix would have, or is refined."""
    if ternary not in TERNARY:
        raise SchemeError(f"--ternary {ternary}: not known; choose one of: {', '.join(TERNARY)}")
    if ternary != TERNARY[0] and refined:
        raise SchemeError(
            f"--ternary {ternary}: takes the codes of that scale, --refine looks for others; "
            "leave one of them out"
        )
    if ternary != TERNARY[0] and not any(s.fit == "ternary" for s in schemes.values()):
        found = ", ".join(sorted({str(s) for s in schemes.values()}))
        raise SchemeError(
            f"--ternary {ternary}: nothing would be ternary, found {found}; "
            "add --scheme ternary, or leave --ternary out"
        )
