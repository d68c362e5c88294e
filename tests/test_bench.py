"""The verb `bench`: its counts are those of `describe`, its sums are right. No time is judged."""

import json
from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot import bench, cli, machine
from chalot.bench import AtDepth, BenchReport, Energy
from chalot.demo import FOLDER
from chalot.errors import ContextError
from chalot.kernels.backend import instruction_sets, open_backend


@pytest.fixture(scope="module")
def report(demo_file: Path) -> BenchReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "ROUNDS", 3)
        patch.setattr(bench, "READ_BYTES", 1 << 20)
        return bench.bench(demo_file, depths=[300, 20], threads=2)


def test_bytes_a_token_are_those_of_describe(report: BenchReport, demo_file: Path) -> None:
    said = chalot.describe(demo_file)
    assert said.architecture["tied"] and report.weight_bytes_per_token == said.bytes
    assert report.file_bytes == said.file_bytes == demo_file.stat().st_size
    per_token = 6 * 2 * 2 * (64 + 4)  # layers, keys and values, heads, codes and their scale
    for d in report.depths:
        assert d.cache_bytes_per_token == d.depth * per_token
        assert d.bytes_per_token == report.weight_bytes_per_token + d.cache_bytes_per_token


def test_an_untied_embedding_is_read_by_the_row(tmp_path: Path) -> None:
    folder = tmp_path / "untied"
    folder.mkdir()
    from chalot.formats.floats import float32_to_bf16
    from chalot.formats.safetensors import SafetensorsFolder, write

    config = json.loads((FOLDER / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with SafetensorsFolder(FOLDER) as source:
        tensors = {name: source.float32(name) for name in source.tensors}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write(
        folder / "model.safetensors",
        [(name, "bf16", t.shape, float32_to_bf16(t)) for name, t in tensors.items()],
    )
    chalot.convert(folder, tmp_path / "untied.myai", "int8")
    said = chalot.describe(tmp_path / "untied.myai")
    embedding = next(t for t in said.tensors if t.name == "embedding")
    with chalot.load(tmp_path / "untied.myai") as model:
        row = embedding.bytes // embedding.shape[0]
        assert bench.weight_bytes(model) == said.bytes - embedding.bytes + row


def test_depths_come_in_order_and_every_figure_has_its_rounds(report: BenchReport) -> None:
    assert [d.depth for d in report.depths] == [20, 300]
    figures = [report.load_seconds, report.verify_ratio]
    for d in report.depths:
        figures += [v for v in vars(d).values() if isinstance(v, bench.Figure)]
    assert len(figures) >= 2 + 2 * 6
    for f in figures:
        assert 2 <= len(f.rounds) <= 3
        assert 0 < f.least == min(f.rounds) <= f.median <= f.greatest == max(f.rounds)


def test_derived_figures_follow_from_measured_ones(report: BenchReport) -> None:
    for d in report.depths:
        rounds = zip(d.tokens_per_second.rounds, d.read_gb_per_second.rounds, strict=True)
        shares = [d.bytes_per_token * speed / 1e9 / read for speed, read in rounds]
        assert d.share_of_read.rounds == pytest.approx(shares)
        host = zip(d.host_microseconds.rounds, d.tokens_per_second.rounds, strict=True)
        assert d.host_share.rounds == pytest.approx([us * 1e-6 * speed for us, speed in host])
        assert d.host_share.greatest < 1
    assert 0 < report.resident_bytes < 1 << 30
    assert (report.kernels, report.threads) == (open_backend().name, 2)


def test_default_depths_are_those_that_fit() -> None:
    assert bench.chosen_depths(1024, None) == (32, 512)
    assert bench.chosen_depths(32768, None) == bench.DEPTHS
    assert bench.chosen_depths(20, None) == (20 - bench.TOKENS,)
    for bad in (0, -1, 1024 - bench.TOKENS + 1):
        with pytest.raises(ContextError, match="depths"):
            bench.chosen_depths(1024, [bad])


@pytest.mark.parametrize("isa", [name for name, runs in instruction_sets() if runs])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 47, 1000])
def test_the_read_loop_reads_everything_once(isa: str, threads: int, count: int) -> None:
    numbers = np.random.Generator(np.random.Philox(count)).integers(0, 2**64, count, np.uint64)
    assert open_backend(isa, threads).read(numbers) == sum(map(int, numbers)) % 2**64


def counters(root: Path, **zones: tuple[str, int]) -> Path:
    """A folder like /sys/class/powercap: zone -> (name, microjoules)."""
    for zone, (name, spent) in zones.items():
        folder = root / zone.replace("_", ":").replace("rapl", "intel-rapl")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text(name + "\n")
        (folder / "energy_uj").write_text(f"{spent}\n")
        (folder / "max_energy_range_uj").write_text("999999\n")
    return root


def test_energy_adds_packages_and_survives_a_restart_of_the_counter(tmp_path: Path) -> None:
    zones = {"rapl_0": ("package-0", 999_000), "rapl_1": ("package-1", 10)}
    others = {"rapl_0_0": ("core", 5), "rapl_2": ("psys", 5)}
    energy = Energy(counters(tmp_path, **zones, **others))
    before = energy.now()
    counters(tmp_path, rapl_0=("package-0", 1_000), rapl_1=("package-1", 510), **{
        name: (kind, 900_000) for name, (kind, _) in others.items()
    })  # fmt: skip
    assert energy.reason == "" and energy.since(before) == pytest.approx((2_000 + 500) / 1e6)


def test_energy_says_why_there_is_none(tmp_path: Path) -> None:
    nothing = Energy(tmp_path / "nowhere")
    assert nothing.since(nothing.now()) is None and "no energy counters" in nothing.reason
    only_system = Energy(counters(tmp_path / "a", rapl_0=("psys", 1)))
    assert "no processor package" in only_system.reason
    counters(tmp_path / "b", rapl_0=("package-0", 1))
    (tmp_path / "b" / "intel-rapl:0" / "energy_uj").unlink()
    unreadable = Energy(tmp_path / "b")
    assert unreadable.since(unreadable.now()) is None and "cannot be read" in unreadable.reason


def test_joules_have_a_column_where_they_are_counted(report: BenchReport) -> None:
    from dataclasses import replace

    assert report.energy
    without = [replace(d, joules_per_token=None) for d in report.depths]
    counted = [replace(d, joules_per_token=bench.Figure.of([0.5, 0.25])) for d in report.depths]
    assert "J/token" not in bench.render(replace(report, depths=tuple(without)))
    shown = bench.render(replace(report, depths=tuple(counted)))
    assert "J/token" in shown and "(0.25-0.50)" in shown


def test_the_command_prints_a_table_or_json(
    demo_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 2)
    monkeypatch.setattr(bench, "READ_BYTES", 1 << 20)
    assert cli.main(["bench", str(demo_file), "--depths", "9", "--kv", "f32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kv"] == "f32" and [d["depth"] for d in found["depths"]] == [9]
    assert set(found["depths"][0]) == set(AtDepth.__dataclass_fields__)
    assert cli.main(["bench", str(demo_file), "--depths", "9", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("depth") and "MB/token" in line for line in lines)
    assert any(line.startswith("kernels") and "1 threads" in line for line in lines)
    assert cli.main(["bench", str(demo_file), "--depths", "9999"]) == 1
    assert "--depths 9999" in capsys.readouterr().err


def test_a_loaded_machine_is_said() -> None:
    before = machine.CpuTime(100.0, 50.0, 1.0, 10.0)
    idle = machine.CpuTime(120.0, 60.0, 1.0, 20.0)
    assert machine.others_share(before, idle) == (0.0, 0.0)
    busy = machine.CpuTime(120.0, 66.0, 3.0, 20.0)
    assert machine.others_share(before, busy) == pytest.approx((0.3, 0.1))
    assert machine.others_share(None, busy) is machine.others_share(before, before) is None
