"""What a mixture of experts has, what one token reads of it, and what a text touches."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

from chalot.errors import SchemeError, UnsupportedError
from chalot.model.config import ModelConfig
from chalot.model.experts import Experts
from chalot.quant.scheme import Scheme


class Sized(Protocol):
    """A tensor of a description."""

    @property
    def name(self) -> str:
        """chalot's name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns, or a vector's length."""

    @property
    def bytes(self) -> int:
        """As it is computed with."""


@dataclass(frozen=True)
class MixtureReport:
    """A mixture. Of each layer's experts a token takes `top`; `active` counts all else in full.

    `expert_bytes` are of all routed experts, `token_bytes` what one token reads: of an embedding
    that is no head too, a row is read, and left out.
    """

    layers: int  # that have experts
    experts: int  # of each of them
    top: int
    width: int
    shared_width: int
    active_parameters: int
    expert_bytes: int
    token_bytes: int


def is_routed(name: str) -> bool:
    """Whether a tensor is one of an expert that tokens are routed to."""
    return ".experts." in name


def mixture_report(config: ModelConfig, tensors: Iterable[Sized]) -> MixtureReport | None:
    """What a description says of a mixture; None for a dense model."""
    e = config.experts
    if e is None:
        return None
    numbers = routed_numbers = total = routed = 0
    for t in tensors:
        count, embedding = prod(t.shape), t.name == "embedding" and not config.tied
        numbers += count
        total += 0 if embedding else t.bytes
        if is_routed(t.name):
            routed_numbers += count
            routed += t.bytes
    return MixtureReport(
        config.layers - len(e.dense_layers),
        e.count,
        e.top,
        e.width,
        e.shared_width,
        numbers - routed_numbers + routed_numbers * e.top // e.count,
        routed,
        total - routed + routed * e.top // e.count,
    )


def untouched(experts: Experts | None, expert_bytes: int, tokens: int) -> int:
    """Bytes of experts that a text of so many tokens is expected not to read.

    As if each token took its experts by chance: routers prefer some, and touch fewer.
    """
    if experts is None:
        return 0
    return int(expert_bytes * (1 - experts.top / experts.count) ** max(tokens, 1))


def refuse_mixture(config: ModelConfig, what: str, instead: str) -> None:
    """Raise UnsupportedError where a verb does not know mixtures of experts."""
    if config.experts is not None:
        raise UnsupportedError(
            f"{what}: found a mixture of {config.experts.count} experts a layer, expected a dense "
            f"model; {instead}"
        )


def check_alike(schemes: Mapping[str, Scheme]) -> None:
    """Raise SchemeError where some of a layer's experts are coded and some dense: a plan's choice.

    They run as one operation, on one kind of input.
    """
    found: dict[tuple[str, bool], str] = {}
    for name, scheme in schemes.items():
        if not is_routed(name):
            continue
        layer, own = name.split(".experts.")[0], name.rsplit(".", 1)[-1]
        first = found.setdefault((layer, own == "down"), name)
        if schemes[first].is_coded != scheme.is_coded:
            raise SchemeError(
                f"{first} would be {schemes[first]} and {name} {scheme}; expected experts of "
                "a layer all in codes or all dense; give them alike schemes"
            )
