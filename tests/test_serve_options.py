"""What `chalot serve` refuses before it opens anything."""

from pathlib import Path

import pytest

from chalot.cli import main

REFUSED = [
    (["--host", "0.0.0.0"], "expected --api-key-file or --api-key, or --no-key if anybody may ask"),
    (["--no-key", "--api-key", "12345678"], "leave one of them out"),
    (["--api-key", "12345678", "--api-key-file", "EMPTY"], "holds no key; expected one a line"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_keys_are_asked_for_where_others_reach(
    options: list[str],
    said: str,
    demo_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("starlette")
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").write_text("\n")
    assert main(["serve", str(demo_file), *options]) == 1
    assert said in capsys.readouterr().err


def test_a_drain_is_no_negative_time(demo_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("starlette")
    with pytest.raises(SystemExit):
        main(["serve", str(demo_file), "--drain", "-1"])
    assert "--drain: found -1, expected 0 to 86400" in capsys.readouterr().err
