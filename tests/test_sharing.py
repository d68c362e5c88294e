"""Two files in a folder, of which one leaves to the other what both hold."""

import os
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot import shelf
from chalot.cli import main
from chalot.describe import describe
from chalot.describe.description import render
from chalot.errors import ChalotError, FormatError, LimitError, OutputError
from chalot.formats import safetensors
from chalot.formats.myai import MyaiFile
from chalot.formats.safetensors import SafetensorsFolder
from chalot.verify import verify
from myai_files import checkpoint
from test_resuming import names

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
MIXED = "attention=int8"  # beside nl4: all but attention is the same


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "source")


@pytest.fixture
def pair(source: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A file, and one that shares with it."""
    folder = tmp_path / "pair"
    folder.mkdir()
    chalot.convert(source, folder / "base.myai")
    chalot.convert(source, folder / "part.myai", MIXED, share=folder / "base.myai")
    return folder / "base.myai", folder / "part.myai"


def logits(path: Path, **how: object) -> np.ndarray:
    with chalot.load(path, **how) as model:  # type: ignore[arg-type]
        return np.asarray(model.logits(IDS))


def test_it_computes_what_a_whole_file_computes(pair: tuple[Path, Path], source: Path) -> None:
    base, part = pair
    whole = part.parent / "whole.myai"
    chalot.convert(source, whole, MIXED)
    assert np.array_equal(logits(part), logits(whole))
    assert np.array_equal(logits(part, mmap=False), logits(whole))
    with closing(MyaiFile(part)) as file:
        elsewhere = {name for name, extent in file.extents() if extent.elsewhere}
        assert {"embedding", "head", "tables.nl4"} <= elsewhere
        assert not any("query" in name or "norm" in name for name in elsewhere)
        assert file.all_bytes - file.size == sum(e.bytes for _, e in file.extents() if e.elsewhere)
        alike = whole.stat().st_size - file.all_bytes
    assert abs(alike) < 64 * 40  # fill and the manifest's words
    assert verify(part).ok


def test_it_is_said_where_the_rest_is(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = describe(pair[1])
    assert found.origin.other == "base.myai" and found.origin.elsewhere > 0
    assert "in 'base.myai' beside it" in render(found)
    assert found.file_bytes == found.origin.bytes + found.origin.elsewhere
    assert main(["verify", str(pair[1])]) == 0
    assert "all as written" in capsys.readouterr().out


def test_a_lost_file_is_named(pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    base, part = pair
    base.rename(tmp_path / "away")
    with pytest.raises(FormatError, match=r"part\.myai: has .* bytes in base\.myai, which must"):
        chalot.load(part)
    chalot.convert(checkpoint(tmp_path / "b", hidden_size=32), base)
    with pytest.raises(FormatError, match="not in .*base.myai any more; bring back"):
        chalot.load(part)
    (tmp_path / "away").replace(base)
    base.write_bytes(base.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"part\.myai: .*base\.myai: found .* expected"):
        chalot.load(part)


def test_the_other_may_be_made_again_if_it_holds_the_same(
    pair: tuple[Path, Path], source: Path
) -> None:
    before = logits(pair[1])
    chalot.convert(source, pair[0], "ffn=nl4,embedding=nl4,attention=f16", name="again")
    assert np.array_equal(logits(pair[1]), before)


def test_a_link_leads_to_both(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "link.myai").symlink_to(pair[1])
    assert np.array_equal(logits(tmp_path / "link.myai"), logits(pair[1]))


def test_damage_elsewhere_is_found(pair: tuple[Path, Path]) -> None:
    with closing(MyaiFile(pair[1])) as file:
        home, at = file.home(file.manifest.tensors["embedding"].extent)
        assert home.path == pair[0]
    raw = bytearray(pair[0].read_bytes())
    raw[at + 5] ^= 1
    pair[0].write_bytes(raw)
    found = verify(pair[1])
    assert [d.name for d in found.damaged] == ["'embedding'"]
    assert "of base.myai" in found.damaged[0].what
    with pytest.raises(FormatError, match="damaged"):
        chalot.convert(pair[1], pair[1].with_name("copy.myai"))


def test_a_cut_is_noticed_in_both(pair: tuple[Path, Path]) -> None:
    with chalot.load(pair[1]) as model:
        model.logits(IDS)
        os.truncate(pair[0], 4096)
        with pytest.raises(FormatError, match="base.myai: was cut"):
            model.logits(IDS)


def test_a_copy_is_whole_and_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Bytes go as they are, whoever makes it whole; nothing is quantised again."""
    report = chalot.convert(pair[1], tmp_path / "copy.myai")
    assert all(kind.error == 0 for kind in report.kinds)
    with closing(MyaiFile(tmp_path / "copy.myai")) as copy, closing(MyaiFile(pair[1])) as file:
        assert copy.other is None and not copy.manifest.other
        assert copy.manifest.config == file.manifest.config
        for name, entry in file.manifest.tensors.items():
            found = copy.manifest.tensors[name]
            assert (found.scheme, found.shape, found.activation, found.error) == (
                *(entry.scheme, entry.shape, entry.activation, entry.error),
            )
            assert found.extent.sha256 == entry.extent.sha256
    assert np.array_equal(logits(tmp_path / "copy.myai"), logits(pair[1]))


def test_a_mix_with_numbers_is_copied_too(source: Path, tmp_path: Path) -> None:
    chalot.convert(source, tmp_path / "a.myai", "embedding=f16,attention=nl2")
    chalot.convert(tmp_path / "a.myai", tmp_path / "b.myai")
    assert np.array_equal(logits(tmp_path / "a.myai"), logits(tmp_path / "b.myai"))


def test_what_a_third_leaves_to_the_second_is_its_own(
    pair: tuple[Path, Path], source: Path
) -> None:
    third = pair[1].with_name("third.myai")
    pair[0].rename(pair[0].with_name("away"))  # nobody asks for it
    chalot.convert(source, third, MIXED, share=pair[1])
    with closing(MyaiFile(third)) as file:
        elsewhere = {name for name, extent in file.extents() if extent.elsewhere}
        assert "layers.0.query" in elsewhere and "embedding" not in elsewhere
    assert logits(third).shape == (len(IDS), 130)


def test_one_that_has_nothing_of_it_stands_alone(source: Path, tmp_path: Path) -> None:
    chalot.convert(checkpoint(tmp_path / "b", hidden_size=32), tmp_path / "base.myai", "bf16")
    report = chalot.convert(source, tmp_path / "x.myai", "f32", share=tmp_path / "base.myai")
    assert "base.myai has nothing of it; it stands alone" in report.notes
    (tmp_path / "base.myai").unlink()
    assert logits(tmp_path / "x.myai").shape == (len(IDS), 130)


def test_it_goes_on_where_it_was_interrupted(source: Path, tmp_path: Path) -> None:
    chalot.convert(source, tmp_path / "base.myai")
    (tmp_path / "x").mkdir()
    shutil.copy(tmp_path / "base.myai", tmp_path / "x")
    seen: list[str] = []
    there = tmp_path / "part.myai"

    def watch(name: str, *_: object) -> None:
        if name and name not in seen:
            seen.append(name)
            if len(seen) == 9:
                for left in tmp_path.glob(".part.*"):
                    shutil.copy(left, tmp_path / "x")

    chalot.convert(source, there, MIXED, share=tmp_path / "base.myai", progress=watch, command="c")
    out = tmp_path / "x" / "part.myai"
    found = chalot.convert(source, out, MIXED, share=tmp_path / "x" / "base.myai", command="c")
    assert found.notes[0].startswith("8 of 8 tensors")
    assert out.read_bytes() == there.read_bytes()
    assert names(tmp_path / "x") == ["base.myai", "part.myai"]


@pytest.mark.parametrize("what", ["itself", "another folder", "nothing", "no file", "a folder"])
def test_what_cannot_be_shared_with_is_refused(
    what: str, pair: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    folder = pair[0].parent
    places = {"itself": pair[1], "another folder": source / "base.myai"}
    places |= {"nothing": folder / "no.myai", "no file": folder / "text", "a folder": folder}
    (folder / "text").write_text("no file of ours" * 100)
    shutil.copy(pair[0], source)
    before = pair[1].read_bytes()
    with pytest.raises(ChalotError):
        chalot.convert(source, pair[1], share=places[what])
    assert pair[1].read_bytes() == before
    assert names(folder) == ["base.myai", "part.myai", "text"]


def test_options_that_need_one_file_say_so(pair: tuple[Path, Path]) -> None:
    for how in ({"budget": 1 << 20}, {"keep": ["deep"]}):
        with pytest.raises(FormatError, match="needs all in one file; chalot convert"):
            chalot.load(pair[1], **how)  # type: ignore[arg-type]


def test_other_targets_have_no_use_for_it(
    pair: tuple[Path, Path], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in (["--to", "gguf"], ["--fit"]):
        with pytest.raises(SystemExit) as stop:
            main(["convert", str(source), *more, "--share", str(pair[0])])
        assert stop.value.code == 2
        assert "--share" in capsys.readouterr().err


def test_a_model_that_another_needs_is_not_removed(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHALOT_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "models"
    folder.mkdir(parents=True)
    for path in pair:
        shutil.copy(path, folder)
    with pytest.raises(OutputError, match="part has bytes in it; remove part too"):
        shelf.remove(["base"])
    assert names(folder) == ["base.myai", "part.myai"]
    assert [model.name for model in shelf.remove(["base", "part"])] == ["base", "part"]
    assert not names(folder)


def test_a_file_of_numbers_is_made_whole_as_it_is(
    pair: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    part = pair[0].with_name("numbers.myai")
    chalot.convert(source, pair[0].with_name("f16.myai"), "f16")
    chalot.convert(source, part, "f16", share=pair[0].with_name("f16.myai"))
    report = chalot.convert(part, tmp_path / "whole.myai")
    assert {kind.scheme for kind in report.kinds} == {"f16", "f32"}
    assert np.array_equal(logits(part), logits(tmp_path / "whole.myai"))


def test_bytes_that_the_other_file_lost_are_kept(pair: tuple[Path, Path], source: Path) -> None:
    with closing(MyaiFile(pair[0])) as file:
        at = file.manifest.tensors["embedding"].extent.offset
    raw = bytearray(pair[0].read_bytes())
    raw[at + 5] ^= 1
    pair[0].write_bytes(raw)
    chalot.convert(source, pair[1], MIXED, share=pair[0])
    assert verify(pair[1]).ok
    with closing(MyaiFile(pair[1])) as file:
        assert not file.manifest.tensors["embedding"].extent.elsewhere
        assert file.manifest.tensors["head"].extent.elsewhere


def test_a_link_may_lie_beside_another_model(
    pair: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    chalot.convert(checkpoint(tmp_path / "b", hidden_size=32), folder / "base.myai")
    (folder / "link.myai").symlink_to(pair[1])
    assert np.array_equal(logits(folder / "link.myai"), logits(pair[1]))


def test_a_disk_that_holds_what_is_new_suffices(
    pair: tuple[Path, Path], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chalot.machine.disk_free", lambda _: 0)
    chalot.convert(source, pair[1], MIXED, share=pair[0])
    with pytest.raises(LimitError, match="the disk has 0 free"):
        chalot.convert(source, pair[1], MIXED)


def test_tensors_whose_scheme_stays_are_copied(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """But for those that calibration scales: here none of them."""
    out = tmp_path / "nl4.myai"
    report = chalot.convert(pair[1], out, "nl4")
    with closing(MyaiFile(pair[1])) as before, closing(MyaiFile(out)) as after:
        for name, entry in before.manifest.tensors.items():
            same = entry.extent.sha256 == after.manifest.tensors[name].extent.sha256
            assert same == (entry.scheme != "int8"), name
    assert "quantising them again (int8 to nl4) adds" in report.notes[0]


def test_equal_bytes_of_other_shapes_are_two_tensors(source: Path, tmp_path: Path) -> None:
    """Zeros of gate and of down: the same bytes as float16, in other rows."""
    with SafetensorsFolder(source) as opened:
        tensors = {name: opened.float32(name) for name in opened.tensors}
    for part in ("gate_proj", "down_proj"):
        tensors[f"model.layers.0.mlp.{part}.weight"][:] = 0
    safetensors.write(
        source / "model.safetensors", [(n, "f32", t.shape, t) for n, t in tensors.items()]
    )
    chalot.convert(source, tmp_path / "base.myai", "f16")
    chalot.convert(source, tmp_path / "part.myai", "f16", share=tmp_path / "base.myai")
    with closing(MyaiFile(tmp_path / "part.myai")) as file:
        entries = file.manifest.tensors
        assert entries["layers.0.gate"].extent == entries["layers.0.down"].extent
        assert not file.aliases
    assert np.array_equal(logits(tmp_path / "part.myai"), logits(tmp_path / "base.myai"))
    chalot.convert(tmp_path / "part.myai", tmp_path / "whole.myai")
    assert np.array_equal(logits(tmp_path / "whole.myai"), logits(tmp_path / "base.myai"))
