"""chalot plan SOURCE -o plan.json"""

from argparse import ArgumentParser
from argparse import Namespace as Arguments
from pathlib import Path
from typing import Any

from chalot.commands.opening import names, size
from chalot.commands.output import as_json, progress, say, show
from chalot.commands.unused import refuse_unused
from chalot.table import pairs

AGREEMENT = (
    "with EWQ's own decisions {agreement:.0%} on held-out models, the commonest level's "
    "{majority:.0%} ({models} small models)"
)
CHANCE = (
    "the difference is within chance ({error:.0%} standard error): look at the weights, with ewq"
)


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("source", help="a Hugging Face folder, a file, or a hub id")
    parser.add_argument("-o", "--out", default="plan.json", help="the plan's file")
    parser.add_argument(
        "--method",
        default="fisher",
        help="ewq, fast-ewq, error, activation, fisher (default), linear, measured",
    )
    parser.add_argument("--ewq-variant", help="softmax (default), softmax-eps, histogram or codes")
    parser.add_argument("--ewq-x", type=float, help="sigmas below the mean (default: 1)")
    parser.add_argument(
        "--ewq-rest", help="scheme of embedding and head (default: int8; nl4 with --simple)"
    )
    parser.add_argument(
        "--simple", action="store_true", help='write {"0": "raw", "1": "8-bit", ...}: of EWQ only'
    )
    parser.add_argument(
        "--size", type=size_or_fit, help="largest file, as 300MB; fit: what runs on this machine"
    )
    parser.add_argument("--context", type=int, help="tokens that must fit too (default: 4096)")
    parser.add_argument("--bpw", type=float, help="bits a weight of all matrices")
    parser.add_argument("--max-kl", type=float, help="largest expected KL, nats a token")
    parser.add_argument(
        "--schemes",
        type=names,
        help="what to choose from (default: bf16,int8,int6,nl4,nl3,nl2; of ewq: bf16,int8,nl4)",
    )
    parser.add_argument("--text", help="calibration text (default: the bundled one)")
    parser.add_argument(
        "--exchanges", type=int, help="pairs tried by their true KL (default: 40); 0: none"
    )
    parser.add_argument(
        "--apart",
        action="store_true",
        help="query, key and value, gate and up each by itself: nearly twice the passes",
    )
    parser.add_argument("--plot", metavar="FILE", help="a picture of the plan, .svg")


def check(arguments: Arguments) -> None:
    """Usage error for options that the method has no use for."""
    from chalot.plan import BY_BLOCK, FIT, METHODS

    method = arguments.method
    if method in METHODS:  # else it is refused as such
        refuse_unused(
            arguments,
            (method == "ewq", "--method ewq", "--ewq-variant --ewq-x"),
            (method in BY_BLOCK, f"--method {' or '.join(BY_BLOCK)}", "--ewq-rest --simple"),
            (method not in BY_BLOCK, "methods that look at losses", "--text --exchanges --apart"),
        )
    refuse_unused(arguments, (arguments.size == FIT, "--size fit", "--context"))


def size_or_fit(text: str) -> int | str:
    """A size in bytes, or "fit"."""
    return text if text == "fit" else size(text)


def summary(plan: Any) -> str:
    """How many tensors of each scheme, size, and what is expected."""
    from chalot.plan.losses import KNOWS_KL

    counts: dict[str, int] = {}
    for scheme in plan.tensors.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    facts = [
        ("method", plan.method),
        ("tensors", ", ".join(f"{n} {scheme}" for scheme, n in sorted(counts.items()))),
        ("size", f"{plan.bytes:,} bytes of matrices, {plan.bits_per_weight:.3f} bits a weight"),
    ]
    if plan.expected_loss is not None and plan.method in KNOWS_KL:
        facts.append(("expected KL", f"{plan.expected_loss:.5f} nats a token"))
    if plan.measured_loss is not None:
        facts.append(("measured KL", f"{plan.measured_loss:.5f} on the calibration text"))
    if plan.method == "fast-ewq":
        d = plan.details
        facts.append(("agreement", AGREEMENT.format(**d)))
        if d["agreement"] - d["majority"] <= 2 * d["error"]:
            facts.append(("", CHANCE.format(**d)))
    return pairs(facts)


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.charts import new_picture
    from chalot.plan import plan
    from chalot.plan.picture import picture

    check(arguments)
    options = {
        "variant": arguments.ewq_variant,
        "x": arguments.ewq_x,
        "rest": arguments.ewq_rest,
        "exchanges": arguments.exchanges,
    }
    with new_picture(arguments.plot) as draw, progress(arguments, "planning") as advance:
        made = plan(
            arguments.source,
            Path(arguments.out).expanduser(),
            method=arguments.method,
            simple=arguments.simple,
            size=arguments.size,
            context=arguments.context,
            bits=arguments.bpw,
            max_kl=arguments.max_kl,
            schemes=arguments.schemes,
            text=arguments.text,
            apart=arguments.apart,
            threads=arguments.threads,
            progress=advance,
            **{name: value for name, value in options.items() if value is not None},
        )
        draw(picture(made))
    if made.details.get("indistinct"):
        say("the blocks' entropies differ by less than a millionth: chance decides this plan")
    show(as_json(made) if arguments.json else f"{summary(made)}\n{arguments.out}")
    return 0
