"""NEON under an emulator: the committed hashes, from code compiled for aarch64 on another machine.

Needs qemu-user and a cross compiler (`apt-get install g++-aarch64-linux-gnu qemu-user`); skipped,
and said so, where one is missing. An aarch64 machine runs all other tests with NEON anyway.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

import chalot
import replay
import tiny
from chalot.kernels.backend import open_backend
from test_exactness import KNOWN, digest, feed, ids

COMPILER = "aarch64-linux-gnu-g++"
QEMU = "qemu-aarch64"
MISSING = [name for name in (COMPILER, QEMU) if shutil.which(name) is None]
FOR_ARM = [
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    f"-DCMAKE_CXX_COMPILER={COMPILER}",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
]
# instruction set, threads, chunk
RUNS = [("neon", t, c) for t in (1, 2) for c in (1, 64)] + [("scalar", 1, 64), ("scalar", 2, 1)]
VOCABULARY = tiny.config().vocabulary

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed")


@pytest.fixture(scope="module")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """replay for aarch64."""
    return replay.build(tmp_path_factory.mktemp("aarch64"), *FOR_ARM)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """scheme -> the tiny model of test_exactness.KNOWN with its tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    return {
        scheme: replay.write(folder / scheme, tiny.program(tiny.config(), scheme), ids(0))
        for scheme in KNOWN
    }


@pytest.mark.parametrize(("isa", "threads", "chunk"), RUNS)
@pytest.mark.parametrize("scheme", KNOWN)
def test_tiny_models(
    executable: Path, files: dict[str, Path], scheme: str, isa: str, threads: int, chunk: int
) -> None:
    name, logits = replay.run(
        [QEMU, executable], files[scheme], VOCABULARY, isa=isa, threads=threads, chunk=chunk
    )
    assert (name, digest(logits)) == (isa, KNOWN[scheme])


@pytest.mark.parametrize("isa", ["scalar", "neon"])
@pytest.mark.parametrize("scheme", ["nl4", "int8"])
def test_bundled_model(
    executable: Path, demo_files: dict[str, Path], tmp_path: Path, scheme: str, isa: str
) -> None:
    with chalot.load(demo_files[scheme]) as model:
        vocabulary = model.config.vocabulary
        tokens = replay.bundled_ids(vocabulary)
        file = replay.write(tmp_path / "bundled", replay.bundled(model), tokens)
    logits = replay.run([QEMU, executable], file, vocabulary, isa=isa, threads=2, chunk=64)[1]
    expected = Path(__file__).with_name("bundled_hashes.txt").read_text().split()
    assert f"{scheme}={digest(logits)}" in expected


@pytest.mark.parametrize(
    ("scheme", "activation", "cache"),
    [
        ("nl4", "silu", "f32"),
        ("int8", "gelu_tanh", "f16"),
        ("f32", "silu", "f16"),
        ("f16", "gelu_tanh", "f32"),
        ("nl4", "silu", "int8"),
        ("every", "silu", "f16"),
    ],
)
def test_what_known_leaves_out(
    executable: Path, tmp_path: Path, scheme: str, activation: str, cache: str
) -> None:
    """16-bit activations, the other gate, cache type and number formats, as this machine has it."""
    program = tiny.program(tiny.config(activation=activation), scheme, 2, cache)
    text = ids(5, 20)
    expected = digest(feed(open_backend(threads=1), program, [text], 20)[0])
    file = replay.write(tmp_path / "file", program, text)
    logits = replay.run([QEMU, executable], file, VOCABULARY, isa="neon", threads=2, chunk=9)[1]
    assert digest(logits) == expected


def test_a_lesser_processor_is_known(executable: Path, files: dict[str, Path]) -> None:
    """Cortex-A53 has no dot product: scalar kernels are chosen, and NEON cannot be forced."""
    old = [QEMU, "-cpu", "cortex-a53", executable]
    assert replay.run([QEMU, executable], files["nl4"], VOCABULARY, tokens=2)[0] == "neon"
    assert replay.run(old, files["nl4"], VOCABULARY, tokens=2)[0] == "scalar"
    forced = subprocess.run(
        [*old, files["nl4"], "--isa", "neon"], capture_output=True, text=True, check=False
    )
    assert forced.returncode == 1 and "neon is not built, or cannot run here" in forced.stderr


def test_a_damaged_file_is_refused(
    executable: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    whole = files["nl4"].read_bytes()
    damaged = tmp_path / "damaged"
    for length in (0, 15, 16, 40, 200, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        done = subprocess.run([QEMU, executable, damaged], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("replay: ") == 1, length
