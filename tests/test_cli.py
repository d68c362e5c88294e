"""Commands as a user meets them: answers on stdout, the rest on stderr, no traceback ever."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chalot import cli
from chalot.commands import VERBS
from chalot.demo import FOLDER


def chalot(
    *arguments: str, stdin: str | bytes = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run(
        [sys.executable, "-m", "chalot.cli", *arguments],
        input=data,
        capture_output=True,
        timeout=120,
        env={**os.environ, **env},
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def test_bare_command_says_what_to_do_next() -> None:
    done = chalot()
    assert done.returncode == 0 and "chalot demo" in done.stdout and not done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert "--threads" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("chalot 0.")


def test_unknown_verb_is_a_usage_error() -> None:
    done = chalot("convrt")
    assert done.returncode == 2 and "convrt" in done.stderr and "--help" in done.stderr


def test_run_streams_text_and_shows_the_seed(demo_file: Path) -> None:
    first = chalot("run", str(demo_file), "def add(a, b):", "--max-tokens", "12")
    assert first.returncode == 0 and first.stdout.strip()
    seed = first.stderr.split("seed ")[1].split()[0]
    again = chalot("run", str(demo_file), "def add(a, b):", "--max-tokens", "12", "--seed", seed)
    assert again.stdout == first.stdout


def test_the_seed_is_shown_before_the_text(demo_file: Path) -> None:
    command = [sys.executable, "-m", "chalot.cli", "run", str(demo_file), "def f(", "--max-tokens"]
    done = subprocess.run([*command, "3"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert re.match(rb"seed \d+\n", done.stdout)


def test_run_reads_stdin_and_reports_json(demo_file: Path) -> None:
    done = chalot(
        "run", str(demo_file), "--max-tokens", "5", "--seed", "3", "--json", stdin="import "
    )
    report = json.loads(done.stdout)
    assert report["prompt"] == "import " and report["options"]["seed"] == 3
    assert report["stats"]["new_tokens"] <= 5
    plain = chalot("run", str(demo_file), "import ", "--max-tokens", "5", "--seed", "3", "-q")
    assert plain.stdout == report["text"] + "\n" and plain.stderr == ""


def test_run_takes_a_folder_and_converts_it_once(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    arguments = ("run", str(FOLDER), "def f", "--max-tokens", "4", "--seed", "1")
    first = chalot(*arguments, CHALOT_HOME=home)
    assert first.returncode == 0 and "converting" in first.stderr
    second = chalot(*arguments, CHALOT_HOME=home)
    assert second.stdout == first.stdout and "converting" not in second.stderr


def test_convert_reports(tmp_path: Path) -> None:
    out = tmp_path / "m.myai"
    scheme = "attention=int8,ffn=nl4,embedding=int8"
    done = chalot("convert", str(FOLDER), "-o", str(out), "--scheme", scheme, "--json")
    report = json.loads(done.stdout)
    assert report["bytes"] == out.stat().st_size
    found = {k["kind"]: k["scheme"] for k in report["kinds"]}
    assert found == {"embedding": "int8", "attention": "int8", "ffn": "nl4", "vector": "f32"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "nowhere.myai", "x"), "no such file"),
        (("run", "/etc/hostname", "x"), ""),
        (("convert", "nowhere/at/all", "-o", "x.myai"), "no such file"),
        (
            ("convert", "no/where", "-o", "x.myai"),
            "no such file or folder here; asked the hub: no/",
        ),
        (("run", "tinylama", "x"), "did you mean tinyllama?"),
        (("rm", "nothing"), "no converted model of that name"),
        (("convert", str(FOLDER), "-o", "x.myai", "--scheme", "nl5"), "nl4"),
        (("convert", str(FOLDER), "-o", "/nowhere/x.myai"), "Make the folder /nowhere first"),
        (("convert", str(FOLDER), "-o", "/"), "directory"),
        (
            ("convert", str(FOLDER), "-o", "x.myai", "--scheme", "head=int8"),
            "head is its embedding",
        ),
        (("convert", "a" * 300, "-o", "x.myai"), "too long"),
        (("convert", str(FOLDER), "-o", "a" * 300 + "/x.myai"), "too long"),
        (("verify", "nowhere.myai"), "nowhere.myai"),
        (("describe", "nowhere.myai"), "nowhere.myai"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "chalot.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("chalot: ")
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


def test_bad_options_are_one_line(demo_file: Path) -> None:
    bad = (
        ["--temperature", "-1"],
        ["--top-p", "nan"],
        ["--context", "99999999"],
        ["--context", "0"],
        ["--stop", ""],
        ["--max-tokens", "-1"],
        ["--threads", "0"],
    )
    for options in bad:
        done = chalot("run", str(demo_file), "x", *options)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    done = chalot("run", str(demo_file), stdin=b"\xff\xfe")
    assert done.returncode == 1 and "UTF-8" in done.stderr
    assert chalot("run", str(demo_file), "").returncode == 1
    done = chalot("run", str(demo_file), "x", CHALOT_ISA="avx9")
    assert done.returncode == 1 and "avx9" in done.stderr
    done = chalot("run", str(demo_file), "x", CHALOT_THREADS="many")
    assert done.returncode == 1 and "CHALOT_THREADS" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kv-budget", "-5MB"), "'-5MB' is no size; expected bytes"),
        (("--max-tokens", "many"), "found 'many', expected a whole number"),
        (("--temperature", "hot"), "found 'hot', expected a number"),
        (("--temprature", "1"), "'--temprature', which chalot run does not take; did you mean"),
        (("--zzz",), "found option '--zzz', which chalot run does not take"),
        (("y", "z"), "found argument 'z', which chalot run does not take"),
        (("--kv", "f8"), "argument --kv: found 'f8', expected one of int8, f16, f32"),
        (("--top-k", "9" * 5000), "--top-k: found '999"),
    ],
)
def test_usage_errors_say_found_and_expected(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = () if options[0] == "y" else ("x",)
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "m.myai", *text, *options])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.endswith("Try: chalot run --help\n")


@pytest.mark.parametrize(
    ("arguments", "words", "help_"),
    [
        (["rnu", "x"], "found 'rnu', expected one of convert, run, ", "chalot --help"),
        (["rnu", "x"], "; did you mean run?", "chalot --help"),
        (["convert", "x", "--bits", "5"], "argument --bits: found '5', expected one of 8, 6, 4",
         "chalot convert --help"),
        (["convert", "x", "--tolerance", "much"], "found 'much', expected a number",
         "chalot convert --help"),
        (["tokenizer", "encode", "x", "--spezials"], "does not take; did you mean --specials?",
         "chalot tokenizer encode --help"),
        (["--zzz", "validate", "x", "--against", "y"], "which chalot validate does not take",
         "chalot validate --help"),
    ],
)  # fmt: skip
def test_hints_name_the_verbs_own_help(
    arguments: list[str], words: str, help_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.endswith(f"Try: {help_}\n")


def test_a_budget_that_is_too_small_names_one_that_works(demo_file: Path) -> None:
    run = ("run", str(demo_file), "x", "--max-tokens", "2", "-q", "--kv-budget")
    done = chalot(*run, "1kB")
    found = re.search(r"--kv-budget (\w+) would do", done.stderr)
    assert done.returncode == 1 and found, done.stderr
    assert chalot(*run, found[1]).returncode == 0


def test_more_threads_than_cores_are_said(demo_file: Path) -> None:
    run = ("run", str(demo_file), "x", "--max-tokens", "1")
    for done in (chalot(*run, "--threads", "300"), chalot(*run, CHALOT_THREADS="300")):
        assert done.returncode == 0 and "300 threads share" in done.stderr
    assert "share" not in chalot(*run, "--threads", "1").stderr


def test_prompt_over_the_context_is_refused_with_both_numbers(demo_file: Path) -> None:
    done = chalot("run", str(demo_file), "word " * 200, "--context", "64")
    assert done.returncode == 1 and "64" in done.stderr and "--context" in done.stderr


def test_remedies_of_a_text_too_long_can_work(
    demo_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "word " * 2000
    assert cli.main(["run", str(demo_file), long]) == 1
    said = capsys.readouterr().err
    assert "--window" in said and "--context" not in said
    window = said.split("--window ")[1].split(":")[0]
    again = ["--window", window, "--max-tokens", "1", "-q"]
    assert cli.main(["run", str(demo_file), "word", *again]) == 0
    capsys.readouterr()
    budget = ["run", str(demo_file), long, "--kv-budget", "1MB"]
    assert cli.main(budget) == 1
    said = capsys.readouterr().err
    assert "is what --kv-budget holds" in said and "choose a larger --kv-budget" in said
    assert cli.main([*budget, "-q"]) == 1
    assert "is what --kv-budget holds" not in capsys.readouterr().err


def test_a_file_that_may_not_be_read_is_named(
    demo_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:  # root may read whatever its mode
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert cli.main(["run", str(demo_file), "a"]) == 1
    said = capsys.readouterr().err
    assert str(demo_file) in said and "may read" in said and "Errno" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    for words in ((FOLDER, "-o", tmp_path / "\udcff.myai"), (tmp_path / "\udcff",)):
        done = chalot("convert", *map(str, words), "-q")
        assert done.returncode == 1
        assert done.stderr.startswith("chalot: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


STEERS = "a\x1b[2J\x9b31m\u202eb"


def steers(text: str) -> bool:
    """Whether a terminal would obey any of it."""
    return any(not c.isprintable() for c in text.replace("\n", "").replace("\t", ""))


def test_names_do_not_steer_the_terminal(
    demo_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from chalot.cli import main

    folder = tmp_path / STEERS
    folder.mkdir()
    file = folder / f"{STEERS}.myai"
    file.write_bytes(demo_file.read_bytes())
    for words, code in (
        (["describe", file], 0),
        (["describe", file, "--json"], 0),
        (["describe", folder / "nowhere"], 1),
        (["verify", file], 0),
        (["convert", file, "--dry-run"], 0),
        (["convert", file, "--scheme", STEERS], 1),
        (["eval", file, "--text", folder / "t"], 1),
        (["plan", folder], 1),
    ):
        assert main([str(word) for word in words]) == code
        shown = capsys.readouterr()
        assert not steers(shown.out) and not steers(shown.err), words
        assert "1b[2J" in shown.out + shown.err
    for usage in (["describe", file, STEERS], ["describe", file, f"--{STEERS}"]):
        with pytest.raises(SystemExit):
            main([str(word) for word in usage])
        assert not steers(capsys.readouterr().err)


def test_what_steers_is_escaped_in_json_and_the_same_when_read() -> None:
    from chalot.commands.output import as_json
    from chalot.table import printable, rows

    every = "".join(map(chr, range(0x250))) + "\u2028\u202e\u2066 text \u65e5"
    assert json.loads(as_json({"a": every})) == {"a": every}
    assert not steers(re.sub("[\xa0\xad]", "", as_json({"a": every})))  # a space, a hyphen
    assert printable("one\n\ttwo \u65e5 \x1b") == "one\n\ttwo \u65e5 \\x1b"
    assert rows([["a"], ["b\nc"]]).count("\n") == 2


PLACES = [
    (["m", "--seed", "3", "--", "-x = 5"], "-x = 5"),
    (["m", "--seed", "3", "--", "--seed"], "--seed"),
    (["m", "--seed", "3", "--", "--"], "--"),
    (["--seed", "3", "--", "m", "-x"], "-x"),
    (["--seed", "3", "m", "--", "-5MB"], "-5MB"),
    (["m", "--seed", "3", "text"], "text"),
    (["m", "text", "--seed", "3"], "text"),
]


@pytest.mark.parametrize(("words", "prompt"), PLACES)
def test_a_prompt_may_stand_behind_options_and_behind_two_dashes(
    words: list[str], prompt: str
) -> None:
    parser = cli.build_parser("run")
    found, unknown = parser.parse_known_args(cli.with_values(["run", *words]))
    assert (found.model, found.prompt, found.seed, unknown) == ("m", prompt, 3, [])


def test_more_words_than_a_verb_takes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "m", "a", "--", "--b"])
    assert "found argument '--b', which chalot run does not take" in capsys.readouterr().err


def test_a_home_is_found_behind_an_equals_sign(tmp_path: Path) -> None:
    done = chalot("convert", str(FOLDER), "--output-dir=~/models", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["model-nl4.myai"]


def test_the_package_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "chalot", "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.startswith("chalot ")
