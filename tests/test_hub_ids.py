"""ORG/NAME of the hub, or a path: told apart without asking anybody, nor importing much."""

import os
import subprocess
import sys

import pytest

from chalot.formats.hub import is_hub_id


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", True),
        ("a/b", True),
        ("gpt2", False),
        ("a/b/c", False),
        ("./a/b", False),
        ("/a/b", False),
        ("a/..", False),
        ("a/b.myai", False),
        ("models/x.gguf", False),
        ("a b/c", False),
        ("a/b\n", False),
        ("é/b", False),
        ("", False),
    ],
)
def test_hub_ids(text, expected):
    assert is_hub_id(text) is expected


def test_a_path_that_exists_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_id("org/name") and is_hub_id("org/other")


def test_huggingface_hub_is_imported_when_asked_for_and_not_before():
    code = "import sys, chalot.formats.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0
