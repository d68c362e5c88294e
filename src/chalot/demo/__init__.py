"""The verb `demo`: the bundled model through the whole of chalot, with one honest table.

Converts the bundled checkpoint and its outlier twin (demo/twin.py), measures what each form costs
on text that no training has seen, times decoding, and lets the 4-bit form write.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chalot.convert import convert
from chalot.demo.twin import outlier_twin
from chalot.evaluate import PROTOCOL, Quality, compare
from chalot.formats.documents import parse_json
from chalot.formats.floats import float32_to_bf16
from chalot.formats.safetensors import SafetensorsFolder, write
from chalot.load import Model

FOLDER = Path(__file__).parent / "model"
SCHEMES = ("bf16", "int8", "nl4")
WINDOWS = 12  # of the held-out text, 512 tokens each
TIMED = 96  # tokens decoded for a speed
PROMPT = "def read_lines(path):\n"
SAMPLE = {"max_tokens": 90, "temperature": 0.6, "top_p": 0.9, "seed": 7}


@dataclass(frozen=True)
class Row:
    """One form of one model. `activations`: forced bits, or what the file asks for."""

    model: str
    form: str
    bytes: int
    bits_per_weight: float
    quality: Quality
    tokens_per_second: float


@dataclass(frozen=True)
class DemoReport:
    """All that the demo measured."""

    protocol: str
    tokens: int
    kernels: str
    threads: int
    rows: tuple[Row, ...]
    seconds: float


def write_twin(source: Path, out: Path) -> None:
    """The outlier twin of a checkpoint, as a folder of its own."""
    out.mkdir(parents=True, exist_ok=True)
    with SafetensorsFolder(source) as folder:
        config = parse_json(folder.document("config.json") or b"{}", "config.json")
        tensors = {name: folder.float32(name) for name in folder.tensors}
        twin = outlier_twin(tensors, config)
        write(
            out / "model.safetensors",
            [(name, "bf16", t.shape, float32_to_bf16(t)) for name, t in twin.items()],
        )
        for path in source.glob("*.json"):
            (out / path.name).write_bytes(path.read_bytes())


def decode_speed(model: Model) -> float:
    """Tokens a second, decoding one text after a short prompt."""
    with model.session(temperature=0, draft=False) as session:
        session.prefill([int(i) for i in np.arange(16) * 97 % model.config.vocabulary])
        for _ in range(4):
            session.step()
        start = time.perf_counter()
        for _ in range(TIMED):
            session.step()
        return TIMED / (time.perf_counter() - start)


def forms(folder: Path, source: Path, name: str, threads: int | None) -> Mapping[str, Path]:
    """The checkpoint in every scheme: scheme -> file."""
    made = {}
    for scheme in SCHEMES:
        made[scheme] = folder / f"{name}-{scheme}.myai"
        convert(source, made[scheme], scheme, threads=threads)
    return made


def measure(
    name: str,
    files: Mapping[str, Path],
    ids: list[int],
    base: Model,
    threads: int | None,
    say: Callable[[str], None],
) -> list[Row]:
    """A row for each form, all against `base`."""
    plans: list[tuple[str, Path, int | None]] = [(f, path, None) for f, path in files.items()]
    plans.insert(1, ("bf16, 8-bit activations", files["bf16"], 8))
    models = [Model(path, threads=threads, context=1024, activations=a) for _, path, a in plans]
    say(f"measuring {name} on {len(ids):,} held-out tokens")
    qualities = compare(base, models, ids)[1:]
    rows = []
    for (form, path, forced), model, quality in zip(plans, models, qualities, strict=True):
        stored = sum(e.extent.bytes for e in model.file.manifest.tensors.values())
        weights = sum(int(np.prod(e.shape)) for e in model.file.manifest.tensors.values())
        speed = 0.0 if forced else decode_speed(model)
        size = path.stat().st_size
        rows.append(Row(name, form, size, stored * 8 / weights, quality, speed))
        model.close()
    return rows


def demo(
    *,
    threads: int | None = None,
    keep: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    show: Callable[[str], None] = lambda _: None,
    table: Callable[["DemoReport"], None] = lambda _: None,
) -> DemoReport:
    """Run it all. `say` hears what happens, `table` gets the report, `show` the sample as it is
    generated.

    With `keep` the files stay in that folder. About twenty seconds on two cores.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="chalot-demo-") as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        say("converting the bundled model and its outlier twin")
        plain = forms(folder, FOLDER, "demo", threads)
        write_twin(FOLDER, folder / "twin")
        twin = forms(folder, folder / "twin", "twin", threads)
        base = Model(plain["bf16"], threads=threads, context=1024, kv="f32")
        text = (FOLDER / "heldout.txt").read_text("utf-8")
        ids = base.tokenizer.encode(text)[: WINDOWS * 512]
        rows = measure("demo", plain, ids, base, threads, say)
        rows += measure("twin", twin, ids, base, threads, say)
        report = DemoReport(
            str(PROTOCOL),
            rows[0].quality.tokens,
            base.backend.name,
            base.backend.threads,
            tuple(rows),
            time.perf_counter() - start,
        )
        base.close()
        table(report)
        with Model(plain["nl4"], threads=threads, context=1024) as model:
            show(PROMPT)
            for piece in model.stream(PROMPT, **SAMPLE):  # type: ignore[arg-type]
                show(piece)
        return report
