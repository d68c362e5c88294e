"""Experts that come and go: the same answers, the most used stay, and options that cannot be."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot.cli import main
from chalot.formats.expert_pages import ExpertPages, expert_runs
from chalot.formats.myai import MyaiFile
from golden.cases import Case, mixtral, qwen2, qwen2_moe, write_folder

TEXT = [3, 1, 4, 1, 5, 9, 2, 6] * 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 131 kB and more a matrix, so that each has pages of its own."""
    place = tmp_path_factory.mktemp("experts")
    config = mixtral(hidden_size=256, intermediate_size=512, num_attention_heads=4)
    config |= {"num_key_value_heads": 2, "num_local_experts": 8, "vocab_size": 128}
    folder = write_folder(Case("paged", config), 0, place / "paged")
    chalot.convert(folder, place / "paged.myai", "int8", threads=1)
    return place / "paged.myai"


@pytest.fixture(scope="module")
def plain(made: Path) -> np.ndarray:
    with chalot.load(made, threads=1) as model:
        return model.logits(TEXT)


def mapped_bytes(path: Path) -> int | None:
    """Resident bytes of a file's mapping, where the system says so."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return None
    found = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", smaps.read_text())
    return sum(map(int, found)) * 1024


@pytest.mark.parametrize("resident", [0, 1, 8])
@pytest.mark.parametrize("chunk", [1, 256])
def test_no_bit_depends_on_what_stays(
    made: Path, plain: np.ndarray, resident: int, chunk: int
) -> None:
    with chalot.load(made, threads=2, experts_resident=resident) as model:
        parts = list(model.logits_in_parts(TEXT, chunk))
        read = model.experts.report()
    np.testing.assert_array_equal(np.concatenate(parts), plain)
    assert read is not None and 0 < read.counted <= read.experts == 16
    assert read.kept_bytes <= read.touched_bytes <= read.expert_bytes
    if resident == 1:
        assert read.kept_bytes == read.expert_bytes // 8  # one of eight, in each layer
    if resident == 0:
        assert read.kept_bytes == 0


def test_what_does_not_stay_leaves_memory(made: Path) -> None:
    with chalot.load(made, threads=1, experts_resident=0) as model:
        before = mapped_bytes(made)
        if before is None:
            pytest.skip("the system does not say what is resident")
        model.logits(TEXT)
        model.engine.before_step()  # as the next pass does first
        read, left = model.experts.report(), mapped_bytes(made)
    with chalot.load(made, threads=1) as model:
        model.logits(TEXT)
        everything = mapped_bytes(made)
    assert read is not None and left is not None and everything is not None
    assert left < everything - read.touched_bytes // 2
    assert before < everything - read.touched_bytes // 2


def test_the_most_used_stay(made: Path) -> None:
    """Of equals the lower; one that nobody took is not kept."""
    file = MyaiFile(made)
    names = [[f"layers.0.experts.{e}.{m}" for m in ("gate", "up", "down")] for e in range(8)]
    pages = ExpertPages(file, {0: names}, 3)
    assert pages.kept(0) == []
    pages.update({0: np.array([5, 0, 7, 5, 5, 0, 0, 0])})
    assert pages.kept(0) == [0, 2, 3]
    pages.update({0: np.array([5, 0, 7, 5, 9, 0, 0, 0])})
    assert pages.kept(0) == [0, 2, 4]
    found = pages.report()
    one = sum(b - a for a, b in expert_runs(file, names[0]))
    assert (found.counted, found.touched_bytes, found.kept_bytes) == (4, 4 * one, 3 * one)
    file.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts_resident": 9}, "a layer has 8 experts"),
        ({"experts_resident": -1}, "a layer has 8 experts"),
        ({"experts_resident": 2, "mmap": False}, "leave out --no-mmap"),
        ({"experts_resident": 2, "mlock": True}, "--mlock"),
        ({"experts_resident": "2"}, "experts_resident"),
    ],
)
def test_what_cannot_be(made: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(chalot.ChalotError, match=message):
        chalot.load(made, threads=1, **options)


def test_a_dense_model_has_none(tmp_path: Path) -> None:
    folder = write_folder(Case("dense", qwen2(vocab_size=64)), 0, tmp_path / "dense")
    chalot.convert(folder, tmp_path / "d.myai", threads=1)
    with pytest.raises(chalot.ChalotError, match="has no experts"):
        chalot.load(tmp_path / "d.myai", experts_resident=1)
    with chalot.load(tmp_path / "d.myai") as model:
        assert model.experts.report() is None


def test_shared_experts_are_not_counted(tmp_path: Path) -> None:
    folder = write_folder(Case("shared", qwen2_moe(num_experts=4)), 0, tmp_path / "m")
    chalot.convert(folder, tmp_path / "m.myai", threads=1)
    with chalot.load(tmp_path / "m.myai", experts_resident=1) as model:
        model.logits(TEXT)
        read = model.experts.report()
    assert read is not None and read.experts == 8
    counts = model.experts.pages.counts
    assert all(n.sum() == 3 * len(TEXT) for n in counts.values())


@pytest.fixture
def quiet(capsys: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    yield capsys


def test_describe_says_what_a_token_reads(made: Path, quiet: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(made), "--json"]) == 0
    found = json.loads(quiet.readouterr().out)
    mixture = found["mixture"]
    experts = sum(t["bytes"] for t in found["tensors"] if ".experts." in t["name"])
    assert (mixture["experts"], mixture["top"], mixture["layers"]) == (8, 2, 2)
    assert mixture["expert_bytes"] == experts
    embedding = next(t["bytes"] for t in found["tensors"] if t["name"] == "embedding")
    assert mixture["token_bytes"] == found["bytes"] - embedding - experts + experts // 4
    assert mixture["active_parameters"] == found["parameters"] - 2 * 6 * 3 * 256 * 512
    at = {m["context"]: m for m in found["memory_at"]}
    assert at[0]["unread"] > experts // 2 and at[1000]["unread"] < experts // 100
    assert main(["describe", str(made)]) == 0
    said = quiet.readouterr().out
    assert "8 of width 512 in 2 layers, a token takes 2" in said and "a token" in said
