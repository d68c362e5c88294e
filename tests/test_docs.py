"""The pages say what the code says: errors as they are printed, files that are there."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TROUBLE = ROOT / "docs" / "troubleshooting.md"
HEADINGS = re.findall(r"^### `(.+)`$", TROUBLE.read_text("utf-8"), re.MULTILINE)


def messages() -> set[str]:
    """Every string in the sources, "..." where an f-string has a value."""
    found = set()
    for path in (ROOT / "src" / "chalot").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        pieces = {v for node in nodes if isinstance(node, ast.JoinedStr) for v in node.values}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node not in pieces:  # a piece's beginning is no message's beginning
                    found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                found.add(re.sub("\0+", "...", "".join(map(str, parts))))
    return found


def test_there_are_headings() -> None:
    assert len(HEADINGS) > 30
    assert len(set(HEADINGS)) == len(HEADINGS)
    other = [line for line in TROUBLE.read_text("utf-8").splitlines() if line.startswith("### ")]
    assert len(other) == len(HEADINGS), "a heading of the third level is an error in backquotes"


def test_each_heading_is_the_beginning_of_a_message() -> None:
    """A heading is a message as the code has it, from its start, "..." for what varies."""
    known = messages()
    unknown = [h for h in HEADINGS if not any(m.startswith(h) for m in known)]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_file_map_is_true() -> None:
    """Each path of README's map exists, and each folder of the package is in it."""
    text = (ROOT / "README.md").read_text("utf-8")
    part = text.split("## Where things are")[1].split("\n## ")[0]
    named = set()
    for line in re.findall(r"^ {4}(.*)$", part, re.MULTILINE):
        base = ROOT / "src" / "chalot" if line.startswith("  ") else ROOT
        for name in re.split(r" {2,}", line.strip())[0].replace(" ...", "").split():
            assert (base / name).exists(), name
            named.add(name.rstrip("/"))
    folders = {p.name for p in (ROOT / "src" / "chalot").iterdir() if (p / "__init__.py").exists()}
    assert folders <= named


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse writes help in another way")
def test_the_commands_page_is_their_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    page = importlib.import_module("command_reference")
    assert page.PAGE.read_text("utf-8") == page.reference(), "python tools/command_reference.py"
