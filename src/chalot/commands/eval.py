"""chalot eval MODEL --text FILE"""

from argparse import ArgumentParser
from argparse import Namespace as Arguments
from pathlib import Path
from typing import Any

from chalot.commands.opening import MODEL, converted, margin
from chalot.commands.output import as_json, progress, say, show
from chalot.commands.unused import refuse_unused
from chalot.errors import FormatError
from chalot.table import rows

PROTOCOL = "chalot"
MOST = 64  # tokens of an answer


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--against", metavar="SOURCE", help="what it was made from: adds the KL")
    parser.add_argument("--text", metavar="FILE", help="text to measure perplexity on")
    parser.add_argument("--protocol", help="chalot (default), llama.cpp or huggingface")
    parser.add_argument(
        "--early-exit",
        metavar="MARGIN,...",
        type=margins,
        help="KL and agreement with full depth along the text, where tokens may skip layers",
    )
    parser.add_argument("--tokens", type=int, help="only so many tokens of the text")
    parser.add_argument(
        "--generate", metavar="PROMPTS", help="compare answers; a prompt a line, or .jsonl"
    )
    parser.add_argument("--max-tokens", type=int, help="of each answer (default: 64)")
    parser.add_argument("--tasks", nargs="+", help="tasks of lm-eval, or .yaml files of your own")
    parser.add_argument("--limit", type=int, help="only so many questions of each task")


def check(arguments: Arguments) -> None:
    """Raise for what would only come out after an hour's measuring."""
    from chalot.evaluate.protocols import check_count, check_protocol

    text, generate, tasks = arguments.text, arguments.generate, arguments.tasks
    if not (text or generate or tasks):
        raise FormatError("nothing to measure; give --text FILE, --generate PROMPTS or --tasks")
    refuse_unused(
        arguments,
        (bool(text), "--text", "--protocol --tokens --early-exit"),
        (bool(generate), "--generate", "--max-tokens"),
        (bool(tasks), "--tasks", "--limit"),
        (bool(text or generate), "--text or --generate", "--against"),
    )
    check_protocol(arguments.protocol or PROTOCOL)
    for option in ("tokens", "max_tokens", "limit"):
        check_count(f"--{option.replace('_', '-')}", getattr(arguments, option))
    if generate:
        from chalot.evaluate.answers import read_prompts, scorers

        if arguments.against is None:
            raise FormatError("--generate compares with the source; name it: --against SOURCE")
        read_prompts(Path(generate).expanduser())
        scorers()
    if tasks:
        from chalot.evaluate.tasks import evaluator

        evaluator()


def margins(text: str) -> list[float | str]:
    """Margins of early exit, with commas between."""
    return [margin(part.strip()) for part in text.split(",")]


def early_exits(arguments: Arguments, path: Path) -> Any:
    """Each margin against full depth."""
    from chalot.evaluate.exits import exits

    with progress(arguments, "leaving early") as advance:
        return exits(
            path,
            arguments.text,
            arguments.early_exit,
            tokens=arguments.tokens,
            threads=arguments.threads,
            progress=lambda n, of: advance("", n, of),
        )


def answers(arguments: Arguments, path: Path) -> Any:
    """The model's answers beside its source's."""
    from chalot.evaluate.answers import compare_answers, read_prompts
    from chalot.evaluate.report import uncut
    from chalot.load import Model

    prompts = read_prompts(Path(arguments.generate).expanduser())
    with (
        uncut(arguments.against, arguments.threads) as made,
        Model(made, threads=arguments.threads, kv="f32") as base,
        Model(path, threads=arguments.threads) as model,
        progress(arguments, "answering") as advance,
    ):
        most = arguments.max_tokens or MOST
        return compare_answers(base, model, prompts, most, lambda n, of: advance("", n, of))


def tasks(arguments: Arguments, path: Path) -> Any:
    """Metrics of lm-eval's tasks."""
    from chalot.evaluate.tasks import run_tasks
    from chalot.load import Model

    with (
        Model(path, threads=arguments.threads) as model,
        progress(arguments, "tasks") as advance,
    ):
        return run_tasks(model, arguments.tasks, arguments.limit, lambda n, of: advance("", n, of))


def show_answers(found: Any) -> str:
    """One line for all, and the first answers that differ."""
    lines = [
        f"{len(found.answers)} answers: {found.exact:.1%} the same, ROUGE-L {found.rouge_l:.3f}, "
        f"BLEU {found.bleu:.1f}"
    ]
    for a in [a for a in found.answers if a.first_difference is not None][:3]:
        lines += [f"  {a.prompt[:60]!r}: from token {a.first_difference}"]
        lines += [f"    source  {a.base[:70]!r}", f"    model   {a.model[:70]!r}"]
    return "\n".join(lines)


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.evaluate.report import evaluate, render

    check(arguments)
    path = converted(arguments.model, arguments)
    reports: dict[str, Any] = {}
    shown: list[str] = []
    if arguments.text:
        try:
            with progress(arguments, "measuring") as advance:
                report = evaluate(
                    path,
                    arguments.text,
                    against=arguments.against,
                    protocol=arguments.protocol or PROTOCOL,
                    tokens=arguments.tokens,
                    threads=arguments.threads,
                    progress=lambda n, of: advance(f"window {n} of {of}", n, of),
                )
        except KeyboardInterrupt:
            say("windows that were measured are kept: the same command goes on from there")
            raise
        reports["text"] = report
        shown.append(render(report))
    if arguments.early_exit:
        reports["early_exit"] = early_exits(arguments, path)
        from chalot.evaluate.exits import render as render_exits

        shown.append(render_exits(reports["early_exit"]))
    if arguments.generate:
        reports["answers"] = answers(arguments, path)
        shown.append(show_answers(reports["answers"]))
    if arguments.tasks:
        reports["tasks"] = tasks(arguments, path)
        table = [["task", "metric", "value"]]
        for task, metrics in reports["tasks"].items():
            table += [[task, name, f"{value:.4f}"] for name, value in metrics.items()]
        shown.append(rows(table))
    if arguments.json:
        show(as_json(reports))
    else:
        show("\n\n".join(shown))
    if not arguments.quiet and arguments.text and arguments.against is None:
        say("perplexity alone says little of a form; --against SOURCE shows what it cost")
    return 0
