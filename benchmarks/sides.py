"""Which engines and forms there are, and how each form's file is made from one checkpoint."""

import argparse
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from chalot.quant.scheme import SCHEMES
from machine import HERE
from make_models import make

PATH_OPTIONS = ("--work", "--envs", "--results")
# tasks of peers.py that every engine takes part in, and all of them
COMMON = ("decode", "depth", "prefill")
ALL = (*COMMON, "long", "verify", "neighbour")


@dataclass(frozen=True)
class Side:
    """One form of an engine, and which tasks it takes part in. `settings` are for its `serve`."""

    form: str
    settings: tuple[tuple[str, str], ...] = ()
    tasks: tuple[str, ...] = COMMON


@dataclass(frozen=True)
class Engine:
    """`env` is a folder in --envs, "" for this interpreter; `packages` must be there."""

    module: str
    env: str
    packages: str
    sides: dict[str, Side]
    suffix: str = ""
    makes: bool = True  # or it serves the checkpoint itself
    files: dict[str, Path] = field(default_factory=dict, compare=False)


F32 = (("INFERENCE_PRECISION_HINT", "f32"),)
ENGINES = {
    "chalot": Engine("chalot_side", "", "chalot", {
        "nl4": Side("nl4", tasks=ALL),
        "nl4, int8 embedding": Side("embedding=int8", tasks=(*COMMON, "verify")),
        "int8": Side("int8", tasks=(*COMMON, "verify")),
    }, ".myai"),
    "llama.cpp": Engine("peers.llamacpp", "peers", "gguf, llama_cpp", {
        "Q4_0": Side("Q4_0", tasks=(*COMMON, "neighbour")),
        "Q4_0-pure": Side("Q4_0-pure"),
        "Q4_K_M": Side("Q4_K_M"),
        "IQ4_NL": Side("IQ4_NL"),
        "Q8_0": Side("Q8_0"),
        "Q4_0, flash off": Side("Q4_0", (("flash", "off"),), ("depth",)),
        "Q4_0, flash on": Side("Q4_0", (("flash", "on"),), ("depth",)),
        "Q4_0, q8_0 cache": Side("Q4_0", (("flash", "on"), ("kv", "q8_0")), ("depth",)),
    }, ".gguf"),
    "openvino": Engine("peers.openvino", "openvino", "openvino_genai, optimum.intel, nncf", {
        "OpenVINO int4": Side("int4"),
        "OpenVINO int8": Side("int8"),
        "OpenVINO int4, f32": Side("int4", F32),
        "OpenVINO int8, f32": Side("int8", F32),
    }),
    "onnxruntime": Engine("peers.onnxruntime", "ort", "onnxruntime_genai, onnx, onnx_ir, torch", {
        "onnxruntime int4": Side("int4"),
    }),
    "transformers": Engine("peers.transformers", "train", "torch, transformers", {
        "transformers bf16": Side("bf16"),
    }, makes=False),
}  # fmt: skip

LOW = ("TQ2_0", "TQ2_0-pure", "Q2_K", "Q2_K-pure", "Q4_0", "Q4_0-pure")


def alone(name: str, forms: Iterable[str]) -> Engine:
    """An engine with these forms, which only decode."""
    return replace(ENGINES[name], sides={form: Side(form, tasks=("decode",)) for form in forms})


# what peers.py can be asked to compare: forms that people use, or every scheme of chalot
SETS = {
    "forms": ENGINES,
    "schemes": {
        "chalot": alone("chalot", [name for name, s in SCHEMES.items() if s.is_coded]),
        "llama.cpp": alone("llama.cpp", LOW),
    },
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(command: list[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(command, cwd=HERE, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise SystemExit(f"{' '.join(command)}\nfailed; the end of {log}:\n{tail}")


@dataclass(frozen=True)
class Prepared:
    """A side that can be started: its engine, its file, its interpreter."""

    name: str
    engine: str
    side: Side
    python: str
    file: Path


def interpreter(name: str, engine: Engine, envs: Path) -> tuple[str, str]:
    """(interpreter, why it does not do)."""
    python = str(envs / engine.env / "bin" / "python") if engine.env else sys.executable
    if not Path(python).exists():
        return python, f"there is no {engine.env}/bin/python in --envs"
    probe = subprocess.run([python, "-c", f"import {engine.packages}"], capture_output=True)
    lines = probe.stderr.decode(errors="replace").splitlines()
    return python, f"cannot import {engine.packages}: {lines[-1]}" if probe.returncode else ""


def prepare(options: argparse.Namespace) -> tuple[list[Prepared], dict[str, str]]:
    """Every wanted side with its file made, and the engines that are missing with the reason.

    chalot's files are made anew unless --reuse: their bytes change with this repository.
    """
    folder = make(options.model, options.work / "models")
    ready, missing = [], {}
    for name, engine in SETS[options.sides].items():
        wanted = {
            side: what
            for side, what in engine.sides.items()
            if name in options.peers or side in options.peers
        }
        if not wanted:
            continue
        python, problem = interpreter(name, engine, options.envs)
        if problem:
            missing[name] = problem
            say(f"{name} is left out: {problem}")
            continue
        made = set()
        for side, what in wanted.items():
            file = folder
            if engine.makes:
                file = options.work / options.model / name / (what.form + engine.suffix)
                again = name == "chalot" and not options.reuse and file not in made
                if again or not file.exists():
                    say(f"making {file}")
                    partial = file.with_name(f"partial-{file.name}")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    command = [python, "-m", engine.module, "make", str(folder), str(partial)]
                    run([*command, what.form], options.work / "logs" / f"make-{side}.log")
                    partial.replace(file)
                made.add(file)
            ready.append(Prepared(side, name, what, python, file))
    return ready, missing
