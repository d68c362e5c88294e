"""Programs run by `native/replay.cpp`, the kernels without Python: emulated, counted, or elsewhere.

    python tests/replay.py MODEL.myai FILE      writes the file for it, with the 300 tokens whose
    replay FILE --isa neon | sha256sum          logits tests/bundled_hashes.txt has the hashes of

The file is what the extension is given to make a program, in that order (see replay.cpp).
"""

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chalot.kernels.native import program_fields
from chalot.kernels.program import Program
from chalot.load import Model
from chalot.model.transformer import build as build_program
from chalot.reading import read_frequencies, read_weights

ROOT = Path(__file__).parent.parent
MAGIC = b"chalot replay 3\n"
RELEASE = "-DCMAKE_BUILD_TYPE=Release"


def bundled_ids(vocabulary: int) -> NDArray[np.int32]:
    """The tokens of tests/bundled_hashes.txt."""
    return (np.arange(300) * 37 % vocabulary).astype(np.int32)


def put(out: bytearray, value: object) -> None:
    """Append a field: see the head of replay.cpp."""
    if isinstance(value, float):
        out += struct.pack("<f", value)
    elif isinstance(value, int):
        out += struct.pack("<i", value)
    elif value is None:
        put(out, np.zeros(0, np.uint8))
    elif isinstance(value, np.ndarray):
        out += struct.pack("<I", value.nbytes)
        out += bytes(-len(out) % 64)
        out += np.ascontiguousarray(value).tobytes()
    elif isinstance(value, (list, tuple)):
        if isinstance(value, list):
            put(out, len(value))
        for member in value:
            put(out, member)
    else:
        raise TypeError(f"{type(value).__name__}: expected a number, an array or a list of them")


def write(path: Path, program: Program, tokens: NDArray[np.int32]) -> Path:
    """Write a program and the tokens to run; returns the path."""
    out = bytearray(MAGIC)
    put(out, program_fields(program))
    put(out, tokens)
    path.write_bytes(out)
    return path


def tool(name: str) -> str | None:
    """A command of this environment or of the system."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def build(folder: Path, *options: str, target: str = "replay") -> Path:
    """Compile replay, or fuzz, with CMake and its options; returns the executable."""
    cmake = tool("cmake")
    assert cmake, "cmake is missing; `pip install cmake ninja`"
    ninja = tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    what = f"-DCHALOT_{target.upper()}=ON"
    folder.mkdir(parents=True, exist_ok=True)
    for command in (
        [cmake, "-S", ROOT, "-B", folder, *generator, RELEASE, what, *options],
        [cmake, "--build", folder, "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / target


def compiler(folder: Path) -> str:
    """Name and major version of the compiler that `build` used."""
    text = next(folder.glob("CMakeFiles/*/CMakeCXXCompiler.cmake")).read_text()
    found = dict(
        re.findall(r'^set\(CMAKE_CXX_COMPILER_(ID|VERSION) "([^"]*)"\)', text, re.MULTILINE)
    )
    return f"{found['ID']} {found['VERSION'].split('.')[0]}"


def run(
    command: Sequence[str | Path], file: Path, vocabulary: int, **options: object
) -> tuple[str, NDArray[np.float32]]:
    """Instruction set and logits (rows, vocabulary) of replay, run by `command`."""
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    done = subprocess.run([*command, file, *words], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stderr.decode().strip(), np.frombuffer(done.stdout, "<f4").reshape(-1, vocabulary)


def bundled(model: Model, cache: str = "int8") -> Program:
    """A loaded model's program, as `load` builds it."""
    file, config = model.file, model.config
    frequencies = read_frequencies(file, config)
    return build_program(config, read_weights(file, config, None), frequencies, cache)


if __name__ == "__main__":
    with Model(sys.argv[1]) as model:
        write(Path(sys.argv[2]), bundled(model), bundled_ids(model.config.vocabulary))
