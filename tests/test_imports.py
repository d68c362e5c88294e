"""Who imports whom: the rule of docs/architecture.md, read from the sources with ast.

    cli -> verbs -> engine -> model -> kernels -> quant
                \\--> formats ----------------> quant
                \\--> text

Every import counts: at the top, inside a function, under TYPE_CHECKING.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "chalot"
LEAVES = {"errors", "machine", "home"}  # anyone may import them; they import leaves only
COMMAND_LINE = {"cli", "commands", "__main__"}
VERBS_USE = {"engine", "model", "kernels", "formats", "quant", "text"}
MAY_IMPORT = {  # folder -> folders
    "quant": {"quant"},
    "kernels": {"kernels", "quant"},
    "model": {"model", "kernels", "quant"},
    "engine": {"engine", "model", "kernels", "quant"},
    "formats": {"formats", "quant"},
    "text": {"text"},
}
OF_EXTRAS = {  # room -> what it imports late
    "evaluate": {"lm_eval", "rouge_score", "sacrebleu"},
    "serve": {"starlette", "uvicorn", "h11", "llguidance", "prometheus_client"},
}
FORBIDDEN = {  # folder -> modules of the standard library and others
    "model": {"pathlib", "os", "io", "tokenizers"},
    "engine": {"pathlib", "tokenizers", "jinja2", "minijinja"},
    "kernels": {"pathlib"},
}


class Import(NamedTuple):
    """`file`, relative to the package, imports `module` at `line`."""

    file: Path
    line: int
    module: str

    @property
    def room(self) -> str:
        """The folder or top-level module that imports."""
        return self.file.parts[0].removesuffix(".py")

    @property
    def top(self) -> str:
        """The outermost package that is imported."""
        return self.module.split(".")[0]

    @property
    def imported(self) -> str:
        """The room that is imported from; "" outside of chalot and for the package itself."""
        parts = self.module.split(".")
        return parts[1] if parts[0] == "chalot" and len(parts) > 1 else ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(text: str, file: Path) -> Iterator[Import]:
    """Every import of a module's text. `from chalot import x` counts as chalot.x."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import; write it out"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = (SOURCES.parent / whole.replace(".", "/")).with_suffix(".py").exists()
                is_package = (SOURCES.parent / whole.replace(".", "/")).is_dir()
                named = is_module or is_package
                yield Import(file, node.lineno, whole if named else node.module)


ALL = [
    found
    for path in sorted(SOURCES.rglob("*.py"))
    for found in imports_of(path.read_text("utf-8"), path.relative_to(SOURCES))
]
VERBS = {
    p.stem if p.suffix == ".py" else p.name
    for p in SOURCES.iterdir()
    if p.suffix == ".py" or (p / "__init__.py").exists()
} - {*LEAVES, *COMMAND_LINE, *MAY_IMPORT, "__init__"}


def breaks_the_rule(found: Import) -> bool:
    """Whether an import goes up, sideways, or out of the house by a door that is not there."""
    room, target = found.room, found.imported
    if found.top != "chalot":
        return found.top in FORBIDDEN.get(room, set())
    if not target or target in LEAVES or room == "__init__":
        return False
    if room in LEAVES:
        return True
    if room in MAY_IMPORT:
        return target not in MAY_IMPORT[room]
    if room in COMMAND_LINE:
        return target not in VERBS | COMMAND_LINE
    return target not in VERBS_USE | VERBS  # a verb


def test_imports_go_downward_only() -> None:
    assert [str(i) for i in ALL if breaks_the_rule(i)] == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("quant/codes.py", "from chalot.formats.files import quoted"),
        ("model/cache.py", "import pathlib"),
        ("model/cache.py", "def f():\n    from chalot.formats.myai import MyaiFile"),
        ("engine/generate.py", "from chalot.text.tokenizer import Tokenizer"),
        ("formats/files.py", "from chalot.model.config import ModelConfig"),
        ("kernels/native.py", "from chalot import load"),
        ("cli.py", "from chalot.quant.scheme import Scheme"),
        ("merge.py", "from chalot import cli"),
        ("errors.py", "import chalot.machine\nimport chalot.load"),
    ],
)
def test_a_broken_rule_is_seen(file: str, text: str) -> None:
    assert any(breaks_the_rule(i) for i in imports_of(text, Path(file)))


def test_verbs_do_not_import_each_other_in_a_circle() -> None:
    uses = {
        v: {i.imported for i in ALL if i.room == v and i.imported in VERBS - {v}} for v in VERBS
    }
    while ends := {v for v, targets in uses.items() if not targets}:
        uses = {v: targets - ends for v, targets in uses.items() if v not in ends}
    assert uses == {}


def test_only_native_imports_the_extension() -> None:
    importers = {
        str(p.relative_to(SOURCES))
        for p in SOURCES.rglob("*.py")
        if "import _native" in p.read_text()
    }
    assert importers == {"kernels/native.py"}
    found = [i for i in ALL if i.module.startswith("chalot.kernels.native")]
    assert {str(i.file) for i in found} <= {"kernels/backend.py"}


def test_quant_is_numpy_and_the_standard_library() -> None:
    known = {*sys.stdlib_module_names, "numpy", "chalot"}
    assert [str(i) for i in ALL if i.room == "quant" and i.top not in known] == []


def test_what_is_imported_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {d.split(">")[0].split("=")[0].split("<")[0] for d in project["dependencies"]}
    third = {i.top for i in ALL if i.top not in OF_EXTRAS.get(i.room, set())}
    third -= {*sys.stdlib_module_names, "chalot"}
    assert third <= declared, "imported and not declared"
    assert not third & {"torch", "transformers", "gguf"}


def test_verbs_are_imported_when_called() -> None:
    """`import chalot` and `chalot --help` load neither numpy nor a verb."""
    code = "import sys, chalot, chalot.cli; chalot.cli.build_parser(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "numpy" not in loaded
    heavy = {f"chalot.{name}" for name in {*VERBS, *MAY_IMPORT}}
    assert not loaded & heavy
