"""The Python interface on the bundled model: text, ids, sessions, seeds, limits."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot.demo import FOLDER
from chalot.errors import ContextError, FormatError, KernelError, LimitError
from chalot.load import Model

PROMPTS = [
    "def add(a, b):",
    "import os\n",
    "class Queue:",
    "Return the",
    "# 日本語 Tiếng Việt 🙂\n",
]


def test_same_seed_same_text_other_seed_other_text(model: Model) -> None:
    first = model.generate(PROMPTS[0], seed=1, max_tokens=40)
    assert model.generate(PROMPTS[0], seed=1, max_tokens=40) == first
    others = {model.generate(PROMPTS[0], seed=s, max_tokens=40) for s in range(2, 6)}
    assert others != {first}


ONE_RUN = """
import sys, chalot
with chalot.load(sys.argv[1], threads=int(sys.argv[2])) as model:
    for n, prompt in enumerate({prompts!r}):
        with model.session(seed=n) as session:
            session.prefill(model.tokenizer.encode(prompt))
            print([session.step() for _ in range(20)])
"""


def test_ten_processes_give_the_same_ids(demo_file: Path) -> None:
    """Five prompts in ten processes, on other numbers of threads."""
    code = ONE_RUN.format(prompts=PROMPTS)
    outputs = set()
    for i in range(10):
        command = [sys.executable, "-c", code, str(demo_file), str(i % 3 + 1)]
        outputs.add(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(outputs) == 1
    assert len(outputs.pop().splitlines()) == len(PROMPTS)


def test_stream_is_generate_in_pieces(model: Model) -> None:
    pieces = list(model.stream(PROMPTS[0], seed=3, max_tokens=60))
    assert len(pieces) > 1
    assert "".join(pieces) == model.generate(PROMPTS[0], seed=3, max_tokens=60)


def test_session_is_what_logits_say(model: Model) -> None:
    ids = model.tokenizer.encode("def add(a, b):\n    return")
    every = model.logits(ids)
    assert every.shape == (len(ids), model.config.vocabulary) and every.dtype == np.float32
    with model.session(temperature=0) as session:
        session.prefill(ids[:5])
        session.prefill(ids[5:])
        assert session.step() == int(every[-1].argmax())
    np.testing.assert_array_equal(model.logits(ids, last=3), every[-3:])


def test_logits_do_not_depend_on_chunks(model: Model) -> None:
    ids = [int(i) for i in np.arange(700) * 31 % model.config.vocabulary]
    whole = model.logits(ids)
    np.testing.assert_array_equal(model.logits(ids, last=1), whole[-1:])
    np.testing.assert_array_equal(model.logits(ids[:300]), whole[:300])


def test_generate_stops(model: Model) -> None:
    text = model.generate(PROMPTS[0], seed=3, max_tokens=60)
    stop = text[10:14]
    assert (
        model.generate(PROMPTS[0], seed=3, max_tokens=60, stop=[stop]) == text[: text.index(stop)]
    )
    assert model.generate(PROMPTS[0], max_tokens=0) == ""


def test_chat_reuses_what_the_cache_holds(model: Model) -> None:
    messages = [{"role": "user", "content": "What does os.getcwd do?"}]
    first = model.chat(messages, seed=1, max_tokens=24)
    read = model.last_stats.prompt_tokens
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Thanks"}]
    second = model.chat(messages, seed=1, max_tokens=24)
    assert model.last_stats.prompt_tokens < read + 40
    with Model(model.file.path) as fresh:
        assert fresh.chat(messages, seed=1, max_tokens=24) == second


def test_context_overflow_names_both_numbers(demo_file: Path) -> None:
    with chalot.load(demo_file, context=32) as model:
        with pytest.raises(ContextError, match="40 tokens.*32.*--context"):
            model.generate([5] * 40)
        assert model.generate([5] * 30, seed=1) is not None  # ends at the context's end
        with model.session(temperature=0) as session:
            session.prefill([5] * 31)
            session.step()
            with pytest.raises(ContextError, match="33 tokens.*32"):
                session.step(), session.step()


def test_bad_ids_and_options(model: Model, demo_file: Path) -> None:
    with pytest.raises(ContextError, match="token ids must be 0 to"):
        model.generate([10**6])
    with pytest.raises(ContextError, match="nothing was read"), model.session() as session:
        session.step()
    with pytest.raises(chalot.ChalotError, match="temperature"):
        model.generate("a", temperature=-1)
    with pytest.raises(ContextError, match="--context"):
        chalot.load(demo_file, context=10**7)
    with pytest.raises(KernelError, match="avx9.*scalar"):
        chalot.load(demo_file, isa="avx9")
    with pytest.raises(FormatError, match="cache type"):
        chalot.load(demo_file, kv="f8")


def test_logits_that_do_not_fit_are_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chalot.machine.memory_available", lambda: 10_000)
    with pytest.raises(LimitError, match=r"5 tokens need 81,920 bytes, 10,000"):
        model.logits([1] * 5)


def test_sessions_in_threads_do_not_mix(model: Model) -> None:
    alone = {p: model.generate(p, seed=4, max_tokens=12) for p in PROMPTS}
    got: dict[str, str] = {}

    def work(prompt: str) -> None:
        got[prompt] = model.generate(prompt, seed=4, max_tokens=12)

    threads = [threading.Thread(target=work, args=(p,)) for p in PROMPTS]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == alone


def test_a_fork_computes_the_same(demo_file: Path) -> None:
    code = f"""
import os, chalot
model = chalot.load({str(demo_file)!r}, threads=2)
first = model.generate("def add", seed=1, max_tokens=10)
child = os.fork()
again = model.generate("def add", seed=1, max_tokens=10)
if child == 0:
    os._exit(0 if again == first else 1)
assert again == first and os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_two_processes_share_the_mapped_file(demo_file: Path) -> None:
    """The pages of the mapping are shared, and none was copied."""
    code = (
        "import sys, chalot; m = chalot.load(sys.argv[1]); m.logits([1, 2, 3]); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(demo_file)]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    try:
        for process in both:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in both:
            mappings = Path(f"/proc/{process.pid}/smaps").read_text().split(demo_file.name)[1:]
            assert mappings
            fields = dict(re.findall(r"(\w+):\s+(\d+) kB", mappings[0].split("\nVmFlags")[0]))
            assert int(fields["Rss"]) > 1000
            assert int(fields["Private_Dirty"]) == 0
            # a page that only one of them has touched so far counts as private
            assert int(fields["Shared_Clean"]) > 0.8 * int(fields["Rss"])
    finally:
        for process in both:
            process.communicate()


def test_import_is_quick_and_light() -> None:
    code = "import sys, chalot; print(sorted({'numpy', 'tokenizers', 'rich'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_names_survive_importing_their_modules() -> None:
    code = (
        "import chalot; chalot.Model; import chalot.convert, chalot.describe; "
        "assert callable(chalot.load) and callable(chalot.convert) and callable(chalot.describe)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_oracle_generates_the_same(demo_file: Path, model: Model) -> None:
    with chalot.load(demo_file, isa="reference") as slow:
        assert slow.generate("def add", seed=2, max_tokens=4) == model.generate(
            "def add", seed=2, max_tokens=4
        )


@pytest.mark.parametrize("scheme", ["nl4", "int8"])
def test_bundled_model_has_the_committed_hash(demo_files: dict[str, Path], scheme: str) -> None:
    """Converting and running the bundled model gives the same bits on every platform."""
    import hashlib

    ids = [int(i) for i in np.arange(300) * 37 % 4096]
    with chalot.load(demo_files[scheme], context=512) as model:
        digest = hashlib.sha256(np.ascontiguousarray(model.logits(ids), "<f4").tobytes())
    expected = Path(__file__).with_name("bundled_hashes.txt").read_text().split()
    assert f"{scheme}={digest.hexdigest()[:16]}" in expected
    assert FOLDER.is_dir()
