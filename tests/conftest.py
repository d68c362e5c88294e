"""The bundled model, converted once for the whole run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import chalot
from chalot.demo import FOLDER
from chalot.load import Model


@pytest.fixture(scope="session")
def demo_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """scheme -> file of the bundled model."""
    folder = tmp_path_factory.mktemp("demo")
    files = {scheme: folder / f"{scheme}.myai" for scheme in ("nl4", "int8")}
    for scheme, path in files.items():
        chalot.convert(FOLDER, path, scheme)
    return files


@pytest.fixture(scope="session")
def demo_file(demo_files: dict[str, Path]) -> Path:
    """The bundled model in nl4."""
    return demo_files["nl4"]


@pytest.fixture
def model(demo_file: Path) -> Iterator[Model]:
    """The bundled model, loaded."""
    with chalot.load(demo_file) as loaded:
        yield loaded
