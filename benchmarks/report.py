"""Rounds of turns -> medians with their spread, ratios, and one table.

Ratios are taken within a round and summarised afterwards: sides of one round met the same machine,
and a machine that drifts between rounds then widens no ratio. Speed is not shown without a column
for loss; "-" there means that nobody has measured it.
"""

from statistics import median
from typing import Any

Rounds = list[dict[str, dict[str, Any]]]  # per round: side -> what its turn gave
LOOPS = ("plain", "four_streams")


def spread(values: list[float], digits: int = 3) -> dict[str, Any]:
    """Median, least and greatest of one value a round, and the rounds themselves."""
    rounded = [round(value, digits) for value in values]
    return {
        "median": round(median(values), digits),
        "min": min(rounded),
        "max": max(rounded),
        "rounds": rounded,
    }


def rates(rounds: Rounds, side: str) -> list[float]:
    """Tokens a second of each round, by the clock around the native call alone."""
    turns = [turn[side]["seconds"] for turn in rounds]
    return [len(seconds) / sum(seconds) for seconds in turns]


def summarise_side(
    rounds: Rounds, bandwidth: list[dict[str, float]], side: str, ready: dict[str, Any]
) -> dict[str, Any]:
    speed = rates(rounds, side)
    whole = [len(turn[side]["seconds"]) / turn[side]["wall_seconds"] for turn in rounds]
    summary = {"tokens_per_second": spread(speed), "with_host": spread(whole), **ready}
    touched = ready.get("bytes_per_token")
    if touched:
        read = [touched * rate / 1e9 for rate in speed]
        summary["gb_per_second"] = spread(read)
        for loop in LOOPS:
            shares = [gb / measured[loop] for gb, measured in zip(read, bandwidth, strict=True)]
            summary[f"share_of_{loop}"] = spread(shares)
    host = [turn[side]["host_seconds"] for turn in rounds if "host_seconds" in turn[side]]
    if host:
        summary["host_microseconds"] = spread([1e6 * median(seconds) for seconds in host], 1)
    return summary


def summarise(
    rounds: Rounds, bandwidth: list[dict[str, float]], sides: dict[str, dict[str, Any]],
    schemes: list[str], peers: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The measured part of a result: read loops, every side, every scheme over every peer."""
    speed = {side: rates(rounds, side) for side in sides}
    return {
        "bandwidth": {loop: spread([read[loop] for read in bandwidth], 2) for loop in LOOPS},
        "huge_mb": min(read["huge_mb"] for read in bandwidth),
        "sides": {
            side: summarise_side(rounds, bandwidth, side, ready) for side, ready in sides.items()
        },
        "ratios": {
            f"{scheme} / {peer}": spread(
                [ours / theirs for ours, theirs in zip(speed[scheme], speed[peer], strict=True)]
            )
            for scheme in schemes
            for peer in peers
        },
    }


def middle(values: dict[str, Any] | None, form: str = "{:.1f}", percent: bool = False) -> str:
    if values is None:
        return "-"
    return f"{100 * values['median']:.0f} %" if percent else form.format(values["median"])


def between(values: dict[str, Any], form: str = "{:.1f}") -> str:
    return f"{form.format(values['min'])}-{form.format(values['max'])}"


def table(result: dict[str, Any]) -> str:
    """The result as text, one row a side."""
    rows = [["side", "tokens/s", "min-max", "MB/token", "GB/s", "of plain", "of 4 streams",
             "host us/token", "KL"]]  # fmt: skip
    for name, side in result["sides"].items():
        touched = side.get("bytes_per_token")
        loss = result["loss"].get(name)
        rows.append([
            name,
            middle(side["tokens_per_second"]),
            between(side["tokens_per_second"]),
            f"{touched / 1e6:.1f}" if touched else "-",
            middle(side.get("gb_per_second")),
            middle(side.get("share_of_plain"), percent=True),
            middle(side.get("share_of_four_streams"), percent=True),
            middle(side.get("host_microseconds"), "{:.0f}"),
            f"{loss['kl']:.4f} +- {loss['error']:.4f}" if loss else "-",
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0])]
                  + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)])
        for row in rows
    ]  # fmt: skip
    loops = ", ".join(
        f"{loop.replace('_', ' ')} {middle(read)} ({between(read)}) GB/s"
        for loop, read in result["bandwidth"].items()
    )
    lines += ["", f"read loops: {loops}"]
    for pair, ratio in result["ratios"].items():
        lines.append(f"{pair}: {middle(ratio, '{:.2f}')} ({between(ratio, '{:.2f}')})")
    return "\n".join(lines)
