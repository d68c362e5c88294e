"""What goes wrong while converting: a typed error, and nothing under the final name."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot import machine
from chalot.errors import (
    ChalotError,
    FormatError,
    LimitError,
    OutputError,
    UnsupportedError,
    WeightError,
)
from chalot.formats import safetensors
from chalot.formats.safetensors import SafetensorsFolder
from chalot.verify import verify
from myai_files import checkpoint

BEGIN = "import os, resource, signal, sys; import chalot; source, out = sys.argv[1:3]\n"

# Stops at a stage of the conversion: says so on stdout and waits to be killed.
STOPS = (
    BEGIN
    + """
stage = sys.argv[3]
def wait(*_):
    print("here", flush=True)
    sys.stdin.read()
def progress(name, done, total):
    if stage == "first" or stage == "last" and done == total:
        wait()
if stage == "sync":
    os.fsync = wait
chalot.convert(source, out, progress=progress)
"""
)

# Converts again and again, each time with another limit on the length of a file.
FULL = (
    BEGIN
    + """
chalot.convert(source, out)
size = os.path.getsize(out)
os.unlink(out)
for limit in (0, 1, 255, 256, 300, 5000, size // 2, size - 3000, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        chalot.convert(source, out)
    except chalot.ChalotError as error:
        assert type(error).__name__ == "OutputError" and "cannot be written" in str(error), error
    else:
        raise SystemExit(f"{limit} bytes sufficed")
    assert os.listdir(os.path.dirname(out)) == [], (limit, os.listdir(os.path.dirname(out)))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
chalot.convert(source, out)
"""
)

INTERRUPTED = (
    BEGIN
    + """
def progress(name, done, total):
    if done * 2 > total:
        os.kill(os.getpid(), signal.SIGINT)
try:
    chalot.convert(source, out, progress=progress)
except KeyboardInterrupt:
    print("interrupted")
"""
)

LITTLE_MEMORY = (
    BEGIN
    + """
from chalot import machine
room = int(sys.argv[3])
started = False
def progress(name, done, total):
    global started
    if not started:
        started = True
        held = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (held + room, resource.RLIM_INFINITY))
try:
    chalot.convert(source, out, "f32", progress=progress)
except (MemoryError, chalot.ChalotError) as error:
    print(type(error).__name__)
"""
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    return checkpoint(tmp_path_factory.mktemp("faults") / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where to convert to: a folder of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "x.myai"


def start(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Python code in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def finished(process: subprocess.Popen[bytes]) -> str:
    """What the process printed; it must end well."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    return out.decode().strip()


@pytest.fixture
def stopped(source: Path, out: Path, request: pytest.FixtureRequest) -> Iterator[
    subprocess.Popen[bytes]
]:  # fmt: skip
    """A conversion in another process that waits at a stage."""
    process = start(STOPS, source, out, getattr(request, "param", "first"))
    assert process.stdout is not None
    said = process.stdout.readline()
    if said != b"here\n":
        pytest.fail(process.communicate()[1].decode())
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("stopped", ["first", "last", "sync"], indirect=True)
def test_killed_at_any_stage(stopped: subprocess.Popen[bytes], source: Path, out: Path) -> None:
    """Nothing is under the final name, and the next conversion is not blocked."""
    stopped.send_signal(signal.SIGKILL)
    stopped.wait()
    assert not out.exists()
    chalot.convert(source, out)
    assert verify(out).ok and list(out.parent.iterdir()) == [out]


def test_an_older_file_stays_until_the_new_one_is_whole(source: Path, out: Path) -> None:
    chalot.convert(source, out, "int8")
    before = out.read_bytes()

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    with chalot.load(out) as model:
        with pytest.raises(RuntimeError):
            chalot.convert(source, out, "nl4", progress=fail)
        assert out.read_bytes() == before and list(out.parent.iterdir()) == [out]
        logits = model.logits([1, 2])
        chalot.convert(source, out, "nl4")  # who has the old file mapped keeps it
        assert np.array_equal(model.logits([1, 2]), logits)
    assert out.read_bytes() != before


def test_two_conversions_of_one_output(
    stopped: subprocess.Popen[bytes], source: Path, out: Path
) -> None:
    with pytest.raises(OutputError, match="another conversion is writing"):
        chalot.convert(source, out)
    assert not out.exists()
    stopped.kill()
    stopped.wait()
    chalot.convert(source, out)
    assert verify(out).ok


def test_interrupted(source: Path, out: Path) -> None:
    assert finished(start(INTERRUPTED, source, out)) == "interrupted"
    assert list(out.parent.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_disk_full_at_many_points(source: Path, out: Path) -> None:
    finished(start(FULL, source, out))
    assert verify(out).ok


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc and RLIMIT_AS")
def test_little_memory(tmp_path: Path, out: Path) -> None:
    """Out of memory in the middle: MemoryError or a ChalotError, and nothing is left."""
    large = checkpoint(tmp_path / "large", vocab_size=200_000)  # 51 MB in one tensor
    assert finished(start(LITTLE_MEMORY, large, out, 4 << 20)) in ("MemoryError", "LimitError")
    assert list(out.parent.iterdir()) == []


def test_free_disk_is_asked_first(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "disk_free", lambda _: 1000)
    with pytest.raises(LimitError, match="1,000 free"):
        chalot.convert(source, out)
    assert list(out.parent.iterdir()) == []


def test_targets_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    targets = [
        tmp_path,
        tmp_path / "no" / "such" / "folder.myai",
        tmp_path / "file" / "x.myai",
        tmp_path / ("n" * 300),
        tmp_path / "zero\0byte",
        Path("/proc/x.myai"),
        Path("/sys/x.myai"),
    ]
    for target in targets:
        with pytest.raises((OutputError, LimitError)):  # /proc has no room at all
            chalot.convert(source, target)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_other_files_are_not_replaced(source: Path, tmp_path: Path) -> None:
    """Least of all the weights that are being read."""
    copy = checkpoint(tmp_path / "copy")
    os.mkfifo(tmp_path / "pipe")
    for target in (copy / "model.safetensors", copy / "config.json", tmp_path / "pipe"):
        with pytest.raises(OutputError, match="no .myai file"):
            chalot.convert(copy, target)
    for name in ("model.safetensors", "config.json"):
        assert (copy / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(source: Path, out: Path) -> None:
    out.parent.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            chalot.convert(source, out)
    finally:
        out.parent.chmod(0o700)


def test_a_planted_link_is_not_followed(source: Path, out: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (out.parent / f".{out.name}.partial").symlink_to(victim)
    with pytest.raises(OutputError):
        chalot.convert(source, out)
    assert victim.read_text() == "precious" and not out.exists()


def test_source_that_changes(source: Path, out: Path, tmp_path: Path) -> None:
    copy = checkpoint(tmp_path / "copy")

    def touch(*_: object) -> None:
        os.utime(copy / "model.safetensors", (1, 1))

    with pytest.raises(FormatError, match="changed"):
        chalot.convert(copy, out, progress=touch)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_weights_that_are_not_finite(bad: float, name: str, out: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "bad")
    folder = SafetensorsFolder(path)
    held = {n: np.array(folder.raw(n)) for n in folder.tensors}
    folder.close()
    held[name].reshape(-1)[-1] = bad
    safetensors.write(path / "model.safetensors", [(n, "f32", v.shape, v) for n, v in held.items()])
    with pytest.raises(WeightError, match=name):
        chalot.convert(path, out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"vocab_size": 131}, FormatError),
        ({"num_hidden_layers": 3}, FormatError),
        ({"num_hidden_layers": 1 << 24}, FormatError),
        ({"num_key_value_heads": 3}, FormatError),
        ({"num_attention_heads": 0}, ChalotError),
        ({"hidden_size": "64"}, ChalotError),
        ({"rope_theta": 0}, ChalotError),
        ({"rope_theta": 1e29}, None),
        ({"rope_theta": 1e308}, ChalotError),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1,
          "high_freq_factor": 1, "original_max_position_embeddings": 10}}, ChalotError),
        ({"model_type": "mamba"}, UnsupportedError),
        ({"model_type": ["qwen2"]}, UnsupportedError),
        ({"hidden_act": []}, UnsupportedError),
    ],
)  # fmt: skip
def test_configuration_that_contradicts(
    changes: dict[str, object], kind: type[ChalotError] | None, source: Path, out: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    import json

    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    if kind is None:
        chalot.convert(tmp_path, out)
        return
    with pytest.raises(kind):
        chalot.convert(tmp_path, out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("extra", "refused"),
    [
        ("model.layers.0.self_attn.o_proj.bias", True),  # the configuration denies it
        ("model.layers.1.self_attn.q_norm.weight", True),
        ("model.layers.2.mlp.up_proj.weight", True),  # one layer too many
        ("rotary_emb.inv_freq.weight", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),  # computed, and once stored
    ],
)
def test_tensors_that_the_configuration_does_not_name(
    extra: str, refused: bool, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "model", tie_word_embeddings=True)
    plain, out = tmp_path / "plain.myai", tmp_path / "x.myai"
    chalot.convert(folder, plain)
    source = SafetensorsFolder(folder)
    tensors = [(n, "f32", i.shape, source.raw(n)) for n, i in source.tensors.items()]
    more = tmp_path / "more"
    more.mkdir()
    (more / "config.json").write_bytes((folder / "config.json").read_bytes())
    added = (extra, "f32", (8,), np.ones(8, np.float32))
    safetensors.write(more / "model.safetensors", [*tensors, added])
    source.close()
    if refused:
        with pytest.raises(FormatError, match="1 tensors are not in the model") as error:
            chalot.convert(more, out)
        assert extra in str(error.value) and not out.exists()
    else:
        chalot.convert(more, out)
        with chalot.load(plain) as expected, chalot.load(out) as found:
            assert np.array_equal(found.logits([1, 2]), expected.logits([1, 2]))


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "model.myai"
    link.symlink_to(tmp_path / "real" / "model.myai")
    chalot.convert(checkpoint(tmp_path / "source"), link)
    assert link.is_symlink() and (tmp_path / "real" / "model.myai").is_file()
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["model.myai"]
