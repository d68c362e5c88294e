"""Every target of `convert`: where it goes wrong, a typed error and nothing left; the verb."""

import json
import sys
from pathlib import Path

import pytest

import chalot
from chalot.cli import main
from chalot.errors import ChalotError, FormatError, LimitError, OutputError, SchemeError
from chalot.export import TARGETS, export, target_of
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.new_file import NewFile
from myai_files import checkpoint
from test_convert_faults import BEGIN, finished, start

OUTS = {"gguf": "m.gguf", "safetensors": "folder"}
READ = "from chalot.export import export\n"

# Exports again and again, each time with another limit on the length of a file.
FULL = (
    BEGIN
    + READ
    + """
to = sys.argv[3]
export(source, out, to)
place = os.path.dirname(out)
files = [out] if os.path.isfile(out) else [os.path.join(out, n) for n in os.listdir(out)]
size = max(map(os.path.getsize, files))
for file in files:
    os.unlink(file)
if os.path.isdir(out):
    os.rmdir(out)
for limit in (0, 1, 300, 5000, size // 2, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        export(source, out, to)
    except chalot.ChalotError as error:
        assert type(error).__name__ == "OutputError" and "cannot be written" in str(error), error
        assert ".partial" not in str(error), error
    else:
        raise SystemExit(f"{limit} bytes sufficed")
    assert os.listdir(place) == [], (limit, os.listdir(place))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
export(source, out, to)
"""
)

INTERRUPTED = (
    BEGIN
    + READ
    + """
def progress(name, done, total):
    if done * 2 > total:
        os.kill(os.getpid(), signal.SIGINT)
try:
    export(source, out, sys.argv[3], progress=progress)
except KeyboardInterrupt:
    print("interrupted")
"""
)

KILLED = (
    BEGIN
    + READ
    + """
def progress(name, done, total):
    if done * 2 > total:
        print("here", flush=True)
        sys.stdin.read()
export(source, out, sys.argv[3], progress=progress)
"""
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    return checkpoint(tmp_path_factory.mktemp("export") / "source")


@pytest.fixture(params=OUTS)
def to(request: pytest.FixtureRequest) -> str:
    """A target."""
    return str(request.param)


@pytest.fixture
def out(tmp_path: Path, to: str) -> Path:
    """Where it goes: alone in a folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / OUTS[to]


def is_whole(out: Path) -> bool:
    """Whether there is a checkpoint, and nothing beside it."""
    open_checkpoint(out).close()
    return list(out.parent.iterdir()) == [out]


# ---- faults


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_leaves_nothing(source: Path, out: Path, to: str) -> None:
    finished(start(FULL, source, out, to))
    assert is_whole(out)


def test_an_interrupted_one_leaves_nothing(source: Path, out: Path, to: str) -> None:
    assert finished(start(INTERRUPTED, source, out, to)) == "interrupted"
    assert list(out.parent.iterdir()) == []


def test_a_killed_one_is_written_over(source: Path, out: Path, to: str) -> None:
    process = start(KILLED, source, out, to)
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    with pytest.raises(OutputError, match="another conversion is writing it"):
        export(source, out, to)
    process.kill()
    process.communicate()
    assert not out.exists()
    export(source, out, to)
    assert is_whole(out)


def test_what_is_there_stays(source: Path, tmp_path: Path) -> None:
    """A file of another kind, a folder with something in it; a GGUF file is replaced."""
    (tmp_path / "m.gguf").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"is there, and is no \.gguf file"):
        export(source, tmp_path / "m.gguf")
    with pytest.raises(OutputError, match="is there, and not empty; choose another name"):
        export(source, tmp_path / "folder", "safetensors")
    with pytest.raises(OutputError, match="is there, and is no folder; choose another name"):
        export(source, tmp_path / "m.gguf" / ".." / "link", "safetensors")
    with pytest.raises(OutputError, match="is a directory"):
        export(source, tmp_path / "folder", "gguf")
    assert (tmp_path / "m.gguf").read_text() == (tmp_path / "folder" / "notes").read_text()
    (tmp_path / "m.gguf").unlink()
    (tmp_path / "folder" / "notes").unlink()
    for _ in range(2):
        export(source, tmp_path / "m.gguf")
    export(source, tmp_path / "folder", "safetensors")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_source_is_not_written_over(source: Path) -> None:
    with pytest.raises(OutputError, match="source itself"):
        export(source, source, "safetensors")


def test_too_little_room(source: Path, out: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chalot.machine, "disk_free", lambda _: 50_000)
    with pytest.raises(LimitError, match="the disk has 50,000 free"):
        export(source, out, to)
    assert list(out.parent.iterdir()) == []


def test_a_write_that_fails_anywhere(
    source: Path, out: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("write", "commit"):

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(NewFile, method, full)
            with pytest.raises((ChalotError, OSError), match="No space left"):
                export(source, out, to)
        assert list(out.parent.iterdir()) == []


def test_a_source_that_changes_is_refused(tmp_path: Path, to: str, out: Path) -> None:
    folder = checkpoint(tmp_path / "changing")

    def change(name: str, done: int, total: int) -> None:
        if done == total:
            (folder / "config.json").write_text("{}")

    with pytest.raises(FormatError, match="changed since it was opened"):
        export(folder, out, to, progress=change)
    assert list(out.parent.iterdir()) == []


# ---- which target


@pytest.mark.parametrize(
    ("asked", "out", "found"),
    [
        (None, None, "myai"),
        (None, "x", "myai"),
        (None, "x.MYAI", "myai"),
        (None, "a/x.gguf", "gguf"),
        ("gguf", "x", "gguf"),
        ("safetensors", "x", "safetensors"),
        ("npz", "models.v2", "npz"),
        ("gguf", "x.myai", "--to gguf writes none; choose --to myai"),
        ("safetensors", "x.gguf", "choose --to gguf"),
        ("npz", "x.npz", "--to npz writes a folder"),
        (None, "x.safetensors", "writes a folder; leave out .safetensors"),
        ("onnx", "x", "--to onnx: not known; choose one of: myai, gguf, npz, safetensors"),
    ],
)
def test_the_target_is_asked_for_or_seen(asked: str | None, out: str | None, found: str) -> None:
    if found in TARGETS:
        assert target_of(asked, out) == found
    else:
        with pytest.raises(SchemeError, match=found):
            target_of(asked, out)


@pytest.mark.parametrize(
    ("setting", "to"),
    [
        ({"type": "q8_0"}, "myai"),
        ({"type": "f16"}, "npz"),
        ({"scheme": "nl4"}, "gguf"),
        ({"scheme": "nl4"}, "safetensors"),
        ({"bits": "4"}, "gguf"),
        ({"tokenizer": False}, "safetensors"),
    ],
)
def test_a_setting_without_use_is_refused(
    setting: dict[str, object], to: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(SchemeError, match=f"--to {to} has no use for it; it is of "):
        export(source, tmp_path / "out", to, **setting)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# ---- the verb


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--to gguf -o x.myai", "-o x.myai: is the name of a .myai file"),
        ("--to safetensors -o x.safetensors", "writes a folder"),
        ("--to npz --type f16", "--type: --to npz has no use for it; it is of gguf and safetens"),
        ("--scheme int8 -o x.gguf", "--scheme: --to gguf has no use for it; it is of myai"),
        ("--to safetensors --bits 4", "--bits: --to safetensors has no use for it"),
        ("--to gguf --dry-run", "--dry-run: --to gguf has no use for it"),
        ("--to gguf --no-validate", "--no-validate: --to gguf has no use for it; it is of npz"),
        ("--no-tokenizer", "--no-tokenizer: --to myai has no use for it; it is of gguf"),
        ("--context 100", "--context, which is of use with --fit and --dry-run only"),
        ("--calibration x.txt", "--calibration, which is of use with --refine only"),
        ("--to npz --no-validate --tolerance 0.1", "--tolerance, which is of use with what is val"),
    ],
)
def test_usage(words: str, message: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(source), *words.split()])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_tolerance_is_checked_before_anything_is_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in ("-1", "nan", "inf"):
        words = ["convert", str(source), "--to", "npz", "-o", str(tmp_path / "out")]
        assert main([*words, f"--tolerance={wrong}"]) == 1
        assert "expected a share such as 0.1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--scheme int8 -o b.myai", "quantising them again (nl4 to int8) adds to what that lost"),
        ("--scheme f16 -o b.myai", "its weights are nl4 already; what that lost stays lost"),
        ("--to gguf --type q8_0", "quantising them again (nl4 to q8_0) adds to what that lost"),
        ("-o b.gguf", "its weights are nl4 already; what that lost stays lost"),
        ("--to safetensors", "its weights are nl4 already; what that lost stays lost"),
        ("--to npz --bits 8 --no-validate", "(nl4 to row8) adds to what that lost"),
    ],
)
def test_a_source_in_codes_says_so_and_both_losses(
    words: str,
    what: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    made = chalot.convert(source, "a.myai", "nl4")
    before = {k.kind: k.error for k in made.kinds}
    assert main(["convert", "a.myai", *words.split()]) == 0
    said = capsys.readouterr()
    assert what in said.err
    table = said.err.splitlines()
    at = next(i for i, line in enumerate(table) if line.startswith("kind "))
    assert table[at].split()[5:7] == ["error", "before"]
    for line in table[at + 2 : at + 6]:
        (
            kind,
            *_,
        ) = line.split()
        lost = float(line.split()[6])
        assert lost == pytest.approx(before[kind], rel=0.3), line
    assert any(line.startswith("before: error of the source's") for line in table)
    name = said.out.split(":")[0]
    assert Path(name).exists()


def test_names_where_none_is_given(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in ("--to gguf", "--to gguf --type q4_0,head=q8_0", "--to safetensors", ""):
        assert main(["convert", str(source), *words.split(), "--output-dir", "made", "-q"]) == 0
    assert {p.name for p in (tmp_path / "made").iterdir()} == {
        *("source-f16.gguf", "source-q4_0-head-q8_0.gguf", "source-bf16", "source-nl4.myai")
    }
    capsys.readouterr()
    assert main(["convert", str(source), "-o", "x.gguf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == "x.gguf" and report["kinds"][0]["source_error"] is None
