"""chalot demo"""

import sys
from argparse import ArgumentParser
from argparse import Namespace as Arguments
from pathlib import Path
from typing import Any

from chalot.commands.output import as_json, speaker
from chalot.errors import ChalotError
from chalot.table import rows


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("--keep", help="a folder to leave the converted files in")


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.demo import demo as run_it

    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        if not arguments.json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def table(report: Any) -> None:
        if not arguments.json:
            print(demo_table(report) + "\n")
            print("The 4-bit form writes (temperature 0.6, seed 7):\n")

    keep = Path(arguments.keep) if arguments.keep else None
    try:
        report = run_it(
            threads=arguments.threads, keep=keep, say=speaker(arguments), show=show, table=table
        )
    except OSError as error:
        raise ChalotError(
            f"the demo's files cannot be written ({error}); use --keep FOLDER"
        ) from error
    if arguments.json:
        print(as_json({"report": report, "sample": "".join(shown)}))
    else:
        print()
        speaker(arguments)(
            f"{report.seconds:.1f} s on {report.threads} threads of {report.kernels}"
        )
    return 0


def demo_table(report: Any) -> str:
    """The one table: size, quality and speed of every form."""
    head = ["model", "bytes", "bits/weight", "perplexity", "KL to original", "same top", "tokens/s"]
    table = [head]
    for r in report.rows:
        q = r.quality
        speed = f"{r.tokens_per_second:,.0f}" if r.tokens_per_second else "-"
        table.append(
            [
                f"{r.model} {r.form}",
                f"{r.bytes:,}",
                f"{r.bits_per_weight:.2f}",
                f"{q.perplexity:.3f}",
                f"{q.kl:.5f} +- {q.kl_error:.5f}",
                f"{q.same_top:.1%}",
                speed,
            ]
        )
    note = f"{report.tokens:,} held-out tokens; protocol {report.protocol}"
    return f"{rows(table)}\n{note}"
