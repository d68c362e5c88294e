#!/usr/bin/env python3
"""chalot's server beside llama.cpp's own, which batches continuously too: one checkpoint, in turn.

    python benchmarks/serve.py --llama-server PATH --envs FOLDER [--model qwen2.5-0.5b]
    python benchmarks/serve.py ... --clients 16 --seconds 10 --rounds 1 --no-save     # a short look
    python benchmarks/serve.py --table results/serve.jsonl

Clients send their next request when the last answer has ended. Every prompt is other random ids, so
no cache helps; answers are sampled at temperature 1 of the 40 likeliest tokens, so that what is
guessed ahead of a text that repeats itself does not either. Tokens are counted within a window, by
the server's own count of each answer. Then `--beside` clients are being answered while one prompt
of `--long` tokens arrives: the gaps between the pieces of their texts until its first token.

Rounds: every side is started, measured and ended before the next one, which starts first in the
next round. How llama-server is built is said in README.md. Appends a line to results/serve.jsonl.
"""

import argparse
import asyncio
import contextlib
import json
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chalot.demo import FOLDER
from machine import HERE, OthersWork, describe_machine, provenance
from make_models import SHAPES, UNUSED_TAIL, make
from report import spread
from sides import ENGINES, interpreter, run, say

RESULTS = HERE / "results" / "serve.jsonl"
HIDDEN = ("--llama-server", "--envs", "--work", "--results")
READY_SECONDS = 120
SAMPLING = {"temperature": 1.0, "top_k": 40, "top_p": 1.0, "min_p": 0.0}


@dataclass
class Answer:
    """One request's times: sent, and each piece of text."""

    sent: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""

    def tokens_within(self, start: float, end: float) -> float:
        """Its tokens whose piece came in a window; a piece may be several tokens."""
        inside = sum(start <= at < end for at in self.pieces)
        return inside * self.tokens / len(self.pieces) if self.pieces else 0.0


@dataclass(frozen=True)
class Load:
    """What is asked: ids below `vocabulary`, and the port of who answers."""

    port: int
    vocabulary: int
    seed: int

    async def ask(self, number: int, prompt: int, tokens: int) -> Answer:
        """One streamed completion of a random prompt of so many tokens."""
        rng = random.Random(f"{self.seed} {number}")
        ids = [rng.randrange(self.vocabulary) for _ in range(prompt)]
        body = {
            "prompt": ids, "max_tokens": tokens, "seed": number, "stream": True,
            "stream_options": {"include_usage": True}, **SAMPLING,
        }  # fmt: skip
        answer = Answer(time.perf_counter())
        try:
            async for event in events(self.port, "/v1/completions", json.dumps(body).encode()):
                if event.get("error"):
                    answer.error = str(event["error"])[:300]
                elif any(choice.get("text") for choice in event.get("choices", [])):
                    answer.pieces.append(time.perf_counter())
                answer.tokens = (event.get("usage") or {}).get("completion_tokens", answer.tokens)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        if not answer.error and not answer.tokens:
            answer.error = "no tokens were counted"
        return answer


async def events(port: int, path: str, body: bytes) -> AsyncIterator[dict[str, Any]]:
    """The events of a POST that is answered by a stream; its framing is skipped."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            rest = (await reader.read(4096)).decode("utf-8", "replace")
            raise ValueError(f"{status.decode().strip()}: {rest[-300:]}")
        while line := await reader.readline():
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                yield json.loads(line[6:])
    finally:
        writer.close()


# ---- what is measured


async def throughput(load: Load, clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """So many clients for `--seconds`, after a fourth of that to warm up."""
    start = time.perf_counter() + options.seconds / 4
    end = start + options.seconds
    answers: list[Answer] = []

    async def client(number: int) -> None:
        for turn in range(1 << 20):
            if time.perf_counter() >= end:
                return
            number_of_all = (number << 20) + turn
            answers.append(await load.ask(number_of_all, options.prompt, options.tokens))
            if answers[-1].error:
                return

    await asyncio.gather(*(client(n) for n in range(clients)))
    stop_for(answers)
    first = [a.pieces[0] - a.sent for a in answers if a.pieces and start <= a.pieces[0] < end]
    first = first or [a.pieces[0] - a.sent for a in answers if a.pieces]
    gaps = [b - a for x in answers for a, b in zip(x.pieces, x.pieces[1:], strict=False)]
    return {
        "tokens_per_second": sum(a.tokens_within(start, end) for a in answers) / (end - start),
        "first_token_seconds": quantile(first, 0.5),
        "first_token_seconds_95": quantile(first, 0.95),
        "gap_seconds_95": quantile(gaps, 0.95),
        "answers": len(answers),
    }


async def interrupted(load: Load, options: argparse.Namespace) -> dict[str, Any]:
    """Gaps between pieces of `--beside` answers while a long prompt is read."""
    short = [asyncio.create_task(load.ask(n, 32, options.answer)) for n in range(options.beside)]
    await asyncio.sleep(options.settle)
    long = await load.ask(1 << 30, options.long, 2)
    stop_for([long])
    answers = list(await asyncio.gather(*short))
    stop_for(answers)
    until = long.pieces[0] if long.pieces else time.perf_counter()
    gaps = [
        b - a
        for x in answers
        for a, b in zip(x.pieces, x.pieces[1:], strict=False)
        if b > long.sent and a < until
    ]
    if min(x.pieces[-1] for x in answers) < until:
        say("some answers ended before the long prompt was read: a longer --answer is needed")
    return {
        "gap_seconds_95": quantile(gaps, 0.95),
        "gap_seconds_most": max(gaps, default=0.0),
        "gaps": len(gaps),
        "long_first_token_seconds": until - long.sent,
    }


def stop_for(answers: list[Answer]) -> None:
    """End the run at the first error of a server: figures without some requests are worthless."""
    for answer in answers:
        if answer.error:
            raise SystemExit(f"a request failed: {answer.error}")


def quantile(values: list[float], share: float) -> float:
    """The value that so large a share does not exceed; 0 without values."""
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


# ---- servers


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """A server from ready to ended."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            wait_for(process, port, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until /health says 200."""
    import http.client

    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise SystemExit(f"{process.args!r} does not get ready; the end of {log}:\n{tail}")


def commands(options: argparse.Namespace, slots: int, context: int) -> dict[str, Any]:
    """side -> (command, port): as many slots, each with room for `context` tokens."""
    found: dict[str, Any] = {}
    port, threads = free_port(), str(options.threads)
    found["chalot"] = [
        [sys.executable, "-m", "chalot.cli", "serve", str(options.files["chalot"]), "--quiet",
         "--port", str(port), "--slots", str(slots), "--context", str(context),
         "--threads", threads, *shlex.split(options.chalot_arguments)], port,
    ]  # fmt: skip
    port = free_port()
    found["llama-server"] = [
        [str(options.llama_server), "-m", str(options.files["llama-server"]), "--port", str(port),
         "-np", str(slots), "-c", str(slots * context), "-t", threads, "-tb", threads,
         "--no-webui", "--cache-ram", "0", *shlex.split(options.llama_arguments)], port,
    ]  # fmt: skip
    return {side: found[side] for side in options.sides}


def measure_side(side: str, options: argparse.Namespace, number: int) -> dict[str, Any]:
    """One side in one round."""
    found: dict[str, Any] = {"clients": {}}
    logs = options.work / "logs"
    room = options.prompt + options.tokens + 16
    command, port = commands(options, max(options.clients), room)[side]
    load = Load(port, options.vocabulary, number)
    with running(command, port, logs / f"serve-{side}.log"):
        asyncio.run(load.ask(1 << 40, options.prompt, 4))  # pages of the file, first-time work
        for clients in options.clients:
            say(f"  {side}, {clients} clients")
            found["clients"][str(clients)] = asyncio.run(throughput(load, clients, options))
    if options.beside:
        say(f"  {side}, {options.beside} clients and a prompt of {options.long} tokens")
        room = max(options.long + 16, options.answer + 48)
        command, port = commands(options, options.beside + 1, room)[side]
        load = Load(port, options.vocabulary, number)
        with running(command, port, logs / f"serve-{side}-long.log"):
            asyncio.run(load.ask(1 << 40, options.prompt, 4))
            found["interrupted"] = asyncio.run(interrupted(load, options))
    return found


# ---- files, rounds, results


def prepare(options: argparse.Namespace) -> None:
    """One file for each side, of one checkpoint."""
    named = options.model
    if named == "bundled":
        folder = FOLDER
    elif named in SHAPES:
        folder = make(named, options.work / "models")
    else:
        folder = Path(named)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    options.vocabulary = config["vocab_size"] - (0 if named == "bundled" else UNUSED_TAIL)
    context = config["max_position_embeddings"]
    options.long = min(options.long, context - 32)
    options.answer = min(options.answer, context - 64)
    options.files = {}
    for side, engine, form in (("chalot", "chalot", options.scheme),
                               ("llama-server", "llama.cpp", options.type)):  # fmt: skip
        if side not in options.sides:
            continue
        what = ENGINES[engine]
        file = options.work / folder.name / engine / (form + what.suffix)
        options.files[side] = file
        if file.exists() and (side != "chalot" or options.reuse):
            continue
        python, problem = interpreter(engine, what, options.envs)
        if problem:
            raise SystemExit(f"{side}: {problem}")
        say(f"making {file}")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"partial-{file.name}")
        command = [python, "-m", what.module, "make", str(folder), str(partial), form]
        run(command, options.work / "logs" / f"make-{side}.log")
        partial.replace(file)


def summary(rounds: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians with their spread: of each side, and of chalot over llama-server round by round."""

    def of(side: str, path: tuple[str, ...]) -> list[float]:
        values = []
        for turn in rounds:
            value: Any = turn[side]
            for key in path:
                value = value[key]
            values.append(float(value))
        return values

    paths = [
        ("clients", str(n), key)
        for n in options.clients
        for key in ("tokens_per_second", "first_token_seconds", "first_token_seconds_95",
                    "gap_seconds_95")
    ]  # fmt: skip
    if options.beside:
        keys = ("gap_seconds_95", "gap_seconds_most", "long_first_token_seconds")
        paths += [("interrupted", key) for key in keys]
    found: dict[str, Any] = {}
    for path in paths:
        row = {side: spread(of(side, path), 4) for side in options.sides}
        if len(options.sides) == 2:
            both = zip(of("chalot", path), of("llama-server", path), strict=True)
            row["ratio"] = spread([a / b if b else 0.0 for a, b in both])
        found[" ".join(path)] = row
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    began = provenance(sys.argv[1:], HIDDEN)
    prepare(options)
    rounds = []
    with OthersWork() as others:
        for number in range(options.rounds):
            say(f"round {number + 1}/{options.rounds}")
            first = number % len(options.sides)
            order = options.sides[first:] + options.sides[:first]
            rounds.append({side: measure_side(side, options, number) for side in order})
    return {
        "benchmark": "serve",
        **began,
        "machine": {**describe_machine(), **others.result},
        "model": Path(options.model).name,
        "threads": options.threads,
        "forms": {"chalot": options.scheme, "llama-server": options.type},
        "llama_server": llama_version(options.llama_server) if options.llama_server else "",
        "load": {
            key: getattr(options, key)
            for key in ("clients", "seconds", "prompt", "tokens", "beside", "long", "answer")
        },
        "summary": summary(rounds, options),
        "rounds": rounds,
    }


def llama_version(program: Path) -> str:
    done = subprocess.run([str(program), "--version"], capture_output=True, text=True)
    return " ".join((done.stdout + done.stderr).split())[:200]


def table(result: dict[str, Any]) -> str:
    """A line for each figure."""
    load, sides = result["load"], list(result["rounds"][0])
    lines = [
        f"{result['model']}, {result['threads']} threads of {result['machine']['cpu']}, commit "
        f"{result['commit'][:7]}, {result['date'][:10]}; prompts of {load['prompt']} tokens, "
        f"answers of {load['tokens']}; {load['beside']} answers beside a prompt of {load['long']}",
        "",
        f"| | {' | '.join(sorted(sides))} | chalot / llama-server |",
        "|---" * (len(sides) + 2) + "|",
    ]
    for name, row in result["summary"].items():
        cells = [f"{row[side]['median']:.4g}" for side in sorted(sides)]
        ratio = row.get("ratio")
        cells.append(f"{ratio['median']} ({ratio['min']}-{ratio['max']})" if ratio else "-")
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--llama-server", type=Path, help="the program; without it chalot is measured alone")
    add("--llama-arguments", default="", help="more arguments for it, as one text")
    add("--chalot-arguments", default="", help="more arguments for `chalot serve`, as one text")
    add("--envs", type=Path, default=Path("envs"), help="folder with the environment `peers`")
    add("--model", default="qwen2.5-0.5b",
        help=f"bundled, a folder, or one of {', '.join(SHAPES)} with random weights")  # fmt: skip
    add("--scheme", default="nl4", help="chalot's form (default: nl4)")
    add("--type", default="Q4_0", help="llama.cpp's form (default: Q4_0)")
    add("--clients", default="1,4,16,64", help="how many at a time (default: 1,4,16,64)")
    add("--seconds", type=float, default=20, help="of each number of clients (default: 20)")
    add("--prompt", type=int, default=128, help="tokens of a prompt (default: 128)")
    add("--tokens", type=int, default=64, help="tokens of an answer (default: 64)")
    add("--beside", type=int, default=16, help="answers beside a long prompt (default: 16; 0: no)")
    add("--long", type=int, default=4000, help="tokens of it, as far as they fit (default: 4000)")
    add("--answer", type=int, default=400, help="tokens of answers beside it (default: 400)")
    add("--settle", type=float, default=3, help="seconds before it arrives (default: 3)")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "chalot-benchmarks",
        help="folder for models, kept for the next run (default: %(default)s)")  # fmt: skip
    add("--reuse", action="store_true", help="keep chalot's converted file of the last run")
    add("--results", type=Path, default=RESULTS)
    add("--no-save", action="store_true", help="print only")
    add("--json", action="store_true", help="print the result as JSON, not as a table")
    add("--table", type=Path, metavar="FILE", help="only print the tables of results")
    options = parser.parse_args()
    try:
        options.clients = [int(n) for n in str(options.clients).split(",")]
    except ValueError:
        parser.error(f"--clients: found {options.clients!r}, expected numbers with commas")
    if min(options.clients) < 1 or options.seconds <= 0 or options.rounds < 1:
        parser.error("--clients, --seconds and --rounds: expected numbers above 0")
    options.sides = ["chalot"] + (["llama-server"] if options.llama_server else [])
    options.work, options.envs = options.work.resolve(), options.envs.absolute()
    return options


def main() -> None:
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM")
    )  # and the servers with it
    options = arguments()
    if options.table:
        lines = options.table.read_text("utf-8").splitlines()
        print("\n\n".join(table(json.loads(line)) for line in lines))
        return
    result = measure(options)
    line = json.dumps(result)
    print(line if options.json else table(result))
    if not options.no_save:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        with options.results.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
