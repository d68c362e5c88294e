"""AMX where there is none: native/isa/amx.cpp over tiles in software gives the committed hashes.

A processor with AMX runs its kernels in every test that takes the instruction sets found here.
"""

from pathlib import Path

import pytest

import replay
import tiny
from chalot.kernels.backend import instruction_sets, open_backend
from test_exactness import KNOWN, digest, feed, ids

EMULATED = Path(__file__).with_name("amx_emulated.h")
runs_here = ("avx512vnni", True) in instruction_sets()
pytestmark = pytest.mark.skipif(not runs_here, reason="needs a processor with AVX-512 and VNNI")


@pytest.fixture(scope="module")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """replay with tiles in software."""
    return replay.build(tmp_path_factory.mktemp("amx"), f"-DCMAKE_CXX_FLAGS=-include {EMULATED}")


@pytest.mark.parametrize(("threads", "chunk"), [(1, 300), (2, 64), (1, 7)])
@pytest.mark.parametrize("scheme", KNOWN)
def test_tiny_models(
    executable: Path, tmp_path: Path, scheme: str, threads: int, chunk: int
) -> None:
    """Chunks of full tiles, of a rest, and too few for tiles."""
    file = replay.write(tmp_path / "tiny", tiny.program(tiny.config(), scheme), ids(0))
    name, logits = replay.run(
        [executable], file, tiny.config().vocabulary, isa="amx", threads=threads, chunk=chunk
    )
    assert (name, digest(logits)) == ("amx", KNOWN[scheme])


@pytest.mark.parametrize("scheme", ["nl4", "int8", "every"])
def test_activations_of_sixteen_bits(executable: Path, tmp_path: Path, scheme: str) -> None:
    """Two planes a token; columns that end within a tile."""
    c = tiny.config(hidden=200, feed_forward=1100)
    program = tiny.program(c, scheme, 2)
    expected = digest(feed(open_backend("scalar", 1), program, [ids(5, 41)], 41)[0])
    file = replay.write(tmp_path / "tiny", program, ids(5, 41))
    logits = replay.run([executable], file, c.vocabulary, isa="amx", threads=2, chunk=41)[1]
    assert digest(logits) == expected
