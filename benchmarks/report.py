"""Rounds of turns -> medians with their spread, ratios, and one table.

Ratios are taken within a round and summarised afterwards: sides of one round met the same machine,
and a machine that drifts between rounds then widens no ratio. Speed is not shown without columns
for bytes and loss; "-" there means that nobody has measured it.
"""

from pathlib import Path
from statistics import median
from typing import Any

Rounds = list[dict[str, dict[str, Any]]]  # per round: side -> part -> what its turn gave
LOOPS = ("plain", "four_streams")
AGAINST = {  # name -> (part, part): seconds a step, or tokens a second, of one over the other's
    "four_to_one": ("four a step", "one a step"),
    "kept": ("long prefill", "short prefill"),
}


def spread(values: list[float], digits: int = 3) -> dict[str, Any]:
    """Median, least and greatest of one value a round, and the rounds themselves."""
    rounded = [round(value, digits) for value in values]
    return {
        "median": round(median(values), digits),
        "min": min(rounded),
        "max": max(rounded),
        "rounds": rounded,
    }


def rate(turn: dict[str, Any], part: dict[str, Any]) -> float:
    """Tokens a second, by the clock around the forward pass."""
    if part["tokens"]:
        return float(part["tokens"] / sum(turn["seconds"]))
    return float(part["prompt"] / turn["prefill_seconds"])


def touched(part: dict[str, Any], ready: dict[str, Any]) -> int | None:
    """Bytes that a decoded token reads: weights, and keys and values of the prompt's depth."""
    cache = ready.get("cache_bytes_per_token")
    if not part["tokens"] or part["step"] > 1 or "bytes_per_token" not in ready:
        return None
    if cache is None:  # a side that does not say; what it leaves out is small at a small depth
        return ready["bytes_per_token"] if part["prompt"] < 64 else None
    return int(ready["bytes_per_token"] + cache * part["prompt"])


def summarise_part(
    turns: list[dict[str, Any]], bandwidth: list[dict[str, float]], part: dict[str, Any],
    ready: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    speed = [rate(turn, part) for turn in turns]
    summary: dict[str, Any] = {"tokens_per_second": spread(speed)}
    size = touched(part, ready)
    if size:
        read = [size * each / 1e9 for each in speed]
        summary |= {"bytes_per_token": size, "gb_per_second": spread(read)}
        for loop in LOOPS:
            shares = [gb / measured[loop] for gb, measured in zip(read, bandwidth, strict=True)]
            summary[f"share_of_{loop}"] = spread(shares)
    host = [(sum(t["host_seconds"]), t["wall_seconds"]) for t in turns if "host_seconds" in t]
    if host and part["step"] == 1:
        summary["host_microseconds"] = spread([1e6 * h / part["tokens"] for h, _ in host], 1)
        summary["host_share"] = spread([h / wall for h, wall in host], 4)
    if part["tokens"]:
        summary["step_seconds"] = spread([median(turn["seconds"]) for turn in turns], 6)
    return summary


def summarise(
    rounds: Rounds, bandwidth: list[dict[str, float]], parts: dict[str, dict[str, Any]],
    sides: dict[str, dict[str, Any]], ours: list[str],
) -> dict[str, Any]:  # fmt: skip
    """A task's measured part of a result: read loops, every side, ours over every other."""
    found: dict[str, dict[str, Any]] = {
        side: {
            name: summarise_part([turn[side][name] for turn in rounds], bandwidth, part, ready)
            for name, part in parts.items()
        }
        for side, ready in sides.items()
    }
    for summary in found.values():
        for name, (first, second) in AGAINST.items():
            if first in parts and second in parts:
                of = "step_seconds" if parts[first]["tokens"] else "tokens_per_second"
                pairs = zip(
                    summary[first][of]["rounds"], summary[second][of]["rounds"], strict=True
                )
                summary[name] = spread([a / b for a, b in pairs])
    return {
        "parts": parts,
        "bandwidth": {loop: spread([read[loop] for read in bandwidth], 2) for loop in LOOPS},
        "huge_mb": min(read["huge_mb"] for read in bandwidth),
        "sides": found,
        "ratios": {
            name: {
                f"{mine} / {other}": spread(
                    [rate(t[mine][name], part) / rate(t[other][name], part) for t in rounds]
                )
                for mine in ours
                for other in sides
                if other != mine
            }
            for name, part in parts.items()
        },
    }


# ---- as text


def shown(values: dict[str, Any] | None, form: str = "{:.1f}", factor: float = 1) -> str:
    """Median and range."""
    if not values:
        return "-"
    middle, least, greatest = (
        form.format(values[key] * factor) for key in ("median", "min", "max")
    )
    return f"{middle} ({least}-{greatest})"


class Columns:
    """What the table says of a side, column by column; "-" for what it took no part in."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result, self.tasks = result, result["tasks"]
        named = next((s for s, v in result["sides"].items() if v["engine"] == "chalot"), None)
        self.base = named  # whose ratios are shown

    def summary(self, side: str, task: str, part: str = "") -> dict[str, Any]:
        found = self.tasks.get(task, {}).get("sides", {}).get(side, {})
        return found.get(part, {}) if part else found

    def depth(self, task: str, part: str) -> str:
        parts = self.tasks.get(task, {}).get("parts", {})
        return f"{parts[part]['prompt']:,}" if part in parts else "?"

    def ratio(self, side: str, task: str, part: str) -> str:
        ratios = self.tasks.get(task, {}).get("ratios", {}).get(part, {})
        return shown(ratios.get(f"{self.base} / {side}"), "{:.2f}")

    def loss(self, side: str, model: str) -> str:
        found = self.result["loss"].get(side, {}).get(model)
        return f"{found['kl']:.4f} +- {found['kl_error']:.4f}" if found else "-"

    def speed(self, side: str, task: str, part: str) -> str:
        form = "{:.1f}" if "decode" in part else "{:,.0f}"
        return shown(self.summary(side, task, part).get("tokens_per_second"), form)

    def megabytes(self, side: str, task: str, part: str) -> str:
        size = self.summary(side, task, part).get("bytes_per_token")
        return f"{size / 1e6:.1f}" if size else "-"

    def percent(self, values: dict[str, Any] | None, form: str = "{:.0f}") -> str:
        return f"{form.format(100 * values['median'])} %" if values else "-"

    def groups(self) -> dict[str, dict[str, Any]]:
        """Task -> heading -> what stands there for a side."""
        deep = "decode at depth"
        ratio = f"{self.base} to it"
        return {
            "decode": {
                f"decode at {self.depth('decode', 'decode')}": lambda s: self.speed(
                    s, "decode", "decode"
                ),
                f"{ratio} ": lambda s: self.ratio(s, "decode", "decode"),
                "MB/token": lambda s: self.megabytes(s, "decode", "decode"),
                "of read": lambda s: self.percent(
                    self.summary(s, "decode", "decode").get("share_of_plain")
                ),
                "host": lambda s: self.percent(
                    self.summary(s, "decode", "decode").get("host_share"), "{:.1f}"
                ),
            },
            "depth": {
                f"decode at {self.depth('depth', deep)}": lambda s: self.speed(s, "depth", deep),
                f"{ratio}  ": lambda s: self.ratio(s, "depth", deep),
                "MB/token ": lambda s: self.megabytes(s, "depth", deep),
                "resident MB": lambda s: self.resident(s, "depth"),
            },
            "prefill": {
                f"prefill {self.depth('prefill', 'prefill')}": lambda s: self.speed(
                    s, "prefill", "prefill"
                ),
                f"{ratio}": lambda s: self.ratio(s, "prefill", "prefill"),
            },
            "long": {
                f"prefill {self.depth('long', 'long prefill')}": lambda s: self.speed(
                    s, "long", "long prefill"
                ),
                "kept": lambda s: self.percent(self.summary(s, "long").get("kept")),
            },
            "verify": {
                "4 tokens to 1": lambda s: shown(
                    self.summary(s, "verify").get("four_to_one"), "{:.2f}"
                )
            },
        }

    def resident(self, side: str, task: str) -> str:
        size = self.summary(side, task).get("resident_bytes")
        return f"{size / 1e6:.0f}" if size else "-"


def table(result: dict[str, Any]) -> str:
    """The result as a table in Markdown, one row a side, with what it was measured on above it."""
    columns = Columns(result)
    wanted = {"side": lambda s: s}
    for task, group in columns.groups().items():
        wanted |= group if task in result["tasks"] else {}
    wanted |= {
        "KL": lambda s: columns.loss(s, "demo"),
        "KL, twin": lambda s: columns.loss(s, "twin"),
    }
    rows = [[head.strip() for head in wanted]]
    took_part = {side for task in result["tasks"].values() for side in task["sides"]}
    rows += [[cell(s) for cell in wanted.values()] for s in result["sides"] if s in took_part]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = ["-" * width if n == 0 else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = [
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    reads = [task["bandwidth"]["plain"] for task in result["tasks"].values()]
    machine = result["machine"]
    title = (
        f"{result['model']}, {result['threads']} threads, {machine['cpu']} "
        f"({', '.join(machine['features'])}), {result['date'][:10]}, commit "
        f"{result['commit'][:10]}. A plain read loop gave "
        f"{min(r['min'] for r in reads):.1f}-{max(r['max'] for r in reads):.1f} GB/s."
    )
    absent = [f"{engine}: {why}" for engine, why in result["missing"].items()]
    absent += [f"{side} ({task}): {why}" for task, found in result["tasks"].items()
               for side, why in found["failed"].items()]  # fmt: skip
    notes = ["", "Not measured: " + "; ".join(absent)] if absent else []
    return "\n".join([title, "", *lines, *notes])


def into(page: Path, mark: str, text: str) -> None:
    """Put `text` between `<!-- begin MARK -->` and `<!-- end MARK -->` of a page."""
    begin, end = f"<!-- begin {mark} -->", f"<!-- end {mark} -->"
    whole = page.read_text("utf-8")
    before, found, rest = whole.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page}: has no {begin} ... {end}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", "utf-8")
