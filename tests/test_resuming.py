"""A conversion that goes on where another was interrupted makes the file that one would have."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot import machine
from chalot.cli import main
from chalot.convert import ConvertReport
from chalot.convert.conversion import Conversion
from chalot.convert.refining import Refine
from chalot.errors import LimitError, OutputError, WeightError, out_of_memory, told
from chalot.formats import safetensors
from chalot.formats.myai import writer as myai_writer
from chalot.formats.safetensors import SafetensorsFolder
from chalot.formats.scratch import scratch
from chalot.model.layers import TensorSpec
from myai_files import checkpoint

DEMO = Path(chalot.__file__).parent / "demo" / "model"
WAYS: dict[str, dict[str, object]] = {
    "nl4": {},
    "mixed": {"scheme": "attention=int8,ffn=nl2,embedding=bf16"},
    "absmean": {"scheme": "ternary", "ternary": "absmean"},
    "hqq": {"scheme": "int6", "refine": Refine.of("hqq")},
    "gptq": {"scheme": "nl3", "refine": Refine.of("gptq")},
    "keep": {},  # of a file in codes
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("resuming") / "source")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def interrupted(
    source: Path, folder: Path, tensors: int = 9, **how: object
) -> tuple[Path, ConvertReport]:
    """What a kill leaves at so many tensors: in `folder`, to go on as x.myai. And the whole."""
    (folder / "whole").mkdir(parents=True)
    seen: list[str] = []

    def watch(name: str, *_: object) -> None:
        if name and name not in seen:
            seen.append(name)
            if len(seen) == tensors:
                for left in (folder / "whole").glob(".*"):
                    shutil.copy(left, folder)

    report = chalot.convert(source, folder / "whole" / "x.myai", progress=watch, **how)  # type: ignore[arg-type]
    assert len(seen) >= tensors
    return folder / "x.myai", report


def went_on(source: Path, out: Path, **how: object) -> ConvertReport:
    """Convert, and compare with the whole file."""
    report = chalot.convert(source, out, **how)  # type: ignore[arg-type]
    assert out.read_bytes() == (out.parent / "whole" / out.name).read_bytes()
    assert names(out.parent) == ["whole", "x.myai"]
    return report


@pytest.mark.parametrize("way", WAYS)
def test_it_makes_the_same_file(way: str, tmp_path: Path) -> None:
    source, how = DEMO, WAYS[way]
    if way == "keep":
        source = tmp_path / "codes.myai"
        chalot.convert(DEMO, source, "int8")
    out, whole = interrupted(source, tmp_path / "x", 40, **how)
    found = went_on(source, out, **how)
    assert found.kinds == whole.kinds and found.notes[1:] == whole.notes
    kept, _, count, *_ = found.notes[0].split()
    assert kept == count and int(kept) >= 38


def test_from_every_tensor(plain: Path, tmp_path: Path) -> None:
    for tensors in range(1, 28):
        out, _ = interrupted(plain, tmp_path / str(tensors), tensors)
        went_on(plain, out)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda partial, journal: flip(partial, 20_000), True),
        (lambda partial, journal: flip(partial, 300), False),
        (lambda partial, journal: cut(partial, 5_000), True),
        (lambda partial, journal: partial.write_bytes(b""), False),
        (lambda partial, journal: partial.unlink(), False),
        (lambda partial, journal: cut(journal, 1), True),
        (lambda partial, journal: cut(journal, 100), True),
        (lambda partial, journal: flip(journal, 5), False),
        (lambda partial, journal: flip(journal, 1_500), True),
        (lambda partial, journal: journal.write_bytes(b"\n" * 9), False),
        (lambda partial, journal: journal.write_bytes(b"\0" * 3_000), False),
        (lambda partial, journal: journal.unlink(), False),
    ],
)
def test_what_is_damaged_is_made_again(
    damage: Callable[[Path, Path], None], kept: bool, plain: Path, tmp_path: Path
) -> None:
    """As a power cut may leave it."""
    out, _ = interrupted(plain, tmp_path / "x", 20)
    damage(out.with_name(".x.myai.partial"), out.with_name(".x.myai.journal"))
    notes = went_on(plain, out).notes
    assert (bool(notes) and not notes[0].startswith("0 of")) is kept


def changed(folder: Path, name: str, factor: float) -> None:
    """Multiply a column of a matrix."""
    source = SafetensorsFolder(folder)
    held = {n: np.array(source.raw(n)) for n in source.tensors}
    source.close()
    held[f"model.{name}.weight"][:, 3] *= factor
    tensors = [(n, "f32", v.shape, v) for n, v in held.items()]
    safetensors.write(folder / "model.safetensors", tensors)


@pytest.mark.parametrize(
    ("name", "tensors", "factor", "kept"),
    [
        ("embed_tokens", 20, 1.5, 0),
        ("layers.0.mlp.down_proj", 20, 1.5, 12),
        ("layers.1.mlp.up_proj", 16, 1.5, 15),  # which was not reached
        ("layers.1.mlp.down_proj", 26, 30, 23),  # up has factors that balance its columns
    ],
)
def test_another_source(name: str, tensors: int, factor: float, kept: int, tmp_path: Path) -> None:
    """What is behind the change is made again, and so is what channel factors took from it."""
    source = checkpoint(tmp_path / "source")
    out, _ = interrupted(source, tmp_path / "x", tensors)
    changed(source, name, factor)
    (out.parent / "whole" / "x.myai").unlink()
    chalot.convert(source, out.parent / "whole" / "x.myai")
    assert went_on(source, out).notes[0].startswith(f"{kept} of {tensors - 1} ")


def test_other_settings(plain: Path, tmp_path: Path) -> None:
    out, _ = interrupted(plain, tmp_path / "x", 20)
    (out.parent / "whole" / "x.myai").unlink()
    chalot.convert(plain, out.parent / "whole" / "x.myai", "int8")
    assert went_on(plain, out, scheme="int8").notes[0].startswith("0 of ")


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (KeyboardInterrupt(), True),
        (OutputError("the disk is full"), True),
        (MemoryError(), True),
        (WeightError("NaN"), False),
        (RuntimeError("a progress bar"), False),
    ],
)
def test_what_stays(
    error: BaseException,
    stays: bool,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str, done: int, total: int) -> None:
        if done * 2 > total:
            raise error

    kind = LimitError if isinstance(error, MemoryError) else type(error)
    for worth in (1 << 24, 0):
        monkeypatch.setattr(myai_writer, "WORTH", worth)
        with pytest.raises(kind) as raised:
            chalot.convert(plain, tmp_path / "x.myai", progress=fail)
        stay = stays and worth == 0
        assert names(tmp_path) == [".x.myai.journal", ".x.myai.partial"] * stay
        assert ("the same command goes on from there" in told(raised.value)) is stay


def test_a_command_says_what_is_kept(
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(work: Conversion, spec: TensorSpec, _: int) -> None:
        if spec.name == "layers.1.key":
            raise KeyboardInterrupt

    command = ["convert", str(plain), "-o", str(tmp_path / "x.myai")]
    with monkeypatch.context() as patch:
        patch.setattr(myai_writer, "WORTH", 0)
        patch.setattr(Conversion, "_advance", stop)
        assert main(command) == 130
    said = capsys.readouterr().err
    assert said.startswith("chalot: interrupted; 15 finished tensors are kept in /")
    assert said.count("\n") == 1
    assert main(command) == 0
    assert "15 of 15 tensors that an interrupted conversion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("can't start new thread"), True),
        (ImportError("x.so: failed to map segment from shared object"), True),
        (OSError(2, "No such file"), False),
        (RuntimeError("another"), False),
        (ValueError("can't start new thread"), False),
    ],
)
def test_which_errors_are_of_memory(error: Exception, is_one: bool) -> None:
    assert out_of_memory(error) is is_one


def test_a_folder_that_goes_keeps_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as raised, scratch(tmp_path, "x-"):
        error = OutputError("the disk is full")
        error.add_note("9 finished tensors are kept in it")
        raise error
    assert told(raised.value) == "the disk is full"


def test_what_is_there_counts_as_free(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = interrupted(plain, tmp_path / "x", 20)
    whole = (out.parent / "whole" / "x.myai").stat().st_size
    monkeypatch.setattr(machine, "disk_free", lambda _: whole // 2)
    with pytest.raises(LimitError):
        chalot.convert(plain, tmp_path / "y.myai")
    went_on(plain, out)
