"""Plans: EWQ as the paper has it, budgets that hold, tables that survive, bad input that ends."""

import itertools
import json
import math
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chalot.plan
from chalot import cli
from chalot.checking import read_config
from chalot.demo import FOLDER
from chalot.errors import ChalotError, FormatError, KernelError, LimitError, WeightError
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.safetensors import SafetensorsFolder
from chalot.model.layers import TensorSpec, model_tensors
from chalot.plan import fast_ewq, losses, plan
from chalot.plan.choose import Chosen, improve, item_bytes, options
from chalot.plan.swap import Item, items_of
from chalot.planfile import PlanDocument
from chalot.quant import codes
from chalot.quant.entropy import decide, fit
from chalot.quant.packing import stored_bytes
from chalot.quant.scheme import SCHEMES, Scheme
from checkpoints import Weights, write_checkpoint

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PARTS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
VARIANTS = ("softmax", "softmax-eps", "histogram", "codes")
NONE = ("--exchanges", "0")
BYTES = {"raw": 16, "middle": 8, "low": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plan") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text((FOLDER / "calibration.txt").read_text("utf-8")[:1100], "utf-8")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHALOT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(*words: object) -> int:
    return cli.main(["plan", *map(str, words)])


def least_said(error: str) -> tuple[int, float]:
    """Bytes of the file, and bits a weight, that a message names."""
    said = error.split("is a file of ")[1].split(" bits a weight")[0]
    size, bits = said.split(" bytes, ")
    return int(size.replace(",", "")), float(bits)


def entropy(w: np.ndarray, variant: str) -> float:
    """As the papers write it, all at once."""
    if variant == "histogram":
        p = np.histogram(w, 128)[0] / w.size
        return float(-sum(x * math.log2(x) for x in p if x))
    if variant == "codes":
        used = codes.quantize(w, SCHEMES["nl4"]).codes[: w.shape[0], : w.shape[1]]
        p = np.unique(used, return_counts=True)[1] / w.size
        return float(-(p * np.log2(p)).sum())
    p = np.exp(w.astype(np.float64).ravel())
    p /= p.sum()
    return float(-(p * np.log(p + (0.01 if variant == "softmax-eps" else 0.0))).sum())


def papers_levels(folder: Path, variant: str, x: float) -> tuple[list[float], list[str]]:
    """Block entropies weighted by size, and the rule: section 3 of arXiv 2503.04704."""
    names = [[f"model.layers.{i}.{p}.weight" for p in PARTS] for i in range(3)]
    with closing(SafetensorsFolder(folder)) as source:
        blocks = [[source.float32(n) for n in each] for each in names]
    h = [
        sum(entropy(w, variant) * w.size for w in block) / sum(w.size for w in block)
        for block in blocks
    ]
    mu, sigma = np.mean(h), np.std(h)
    rule = ["nl4" if v <= mu - x * sigma else "int8" if v <= mu else "bf16" for v in h]
    return h, rule


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("x", [0.0, 1.0])
def test_ewq_decides_as_the_paper(folder: Path, tmp_path: Path, variant: str, x: float) -> None:
    made = plan(folder, tmp_path / "p.json", method="ewq", variant=variant, x=x)
    h, rule = papers_levels(folder, variant, x)
    found = made.details["blocks"]
    assert [found[str(i)]["entropy"] for i in range(3)] == pytest.approx(h, rel=1e-9)
    for i in range(3):
        assert {s for n, s in made.tensors.items() if f"layers.{i}." in n} == {rule[i]}
    assert made.tensors["embedding"] == "int8" and made.details["variant"] == variant
    assert made.details["threshold"] == pytest.approx(np.mean(h) - x * np.std(h))
    if variant == "softmax":
        sizes = [4096, 2048, 2048, 4096, 6144, 6144, 6144]
        even = sum(n * math.log(n) for n in sizes) / sum(sizes)
        assert found["0"]["deficit"] == pytest.approx(even - h[0], abs=1e-9)


entropies = st.lists(st.floats(0, 12), min_size=1, max_size=7)


@settings(max_examples=80, deadline=None)
@given(h=entropies, x=st.floats(0, 2), share=st.floats(0, 1.2))
def test_budgets_demote_the_least_and_promote_the_most(
    h: list[float], x: float, share: float
) -> None:
    """The paper's walk, written out: lowest entropies a level down, turn by turn; then up."""
    order, budget = ("low", "middle", "raw"), int(share * 16 * len(h))
    start = decide(h, x).levels
    found = fit(h, start, [BYTES] * len(h), budget)
    now, ranks = list(start), sorted(range(len(h)), key=lambda i: (h[i], i))

    def size() -> int:
        return sum(BYTES[level] for level in now)

    if 4 * len(h) > budget:
        assert found is None
        return
    while size() > budget:
        for i in ranks:
            if size() > budget and now[i] != "low":
                now[i] = order[order.index(now[i]) - 1]
    for i in reversed(ranks):
        for level in order[order.index(now[i]) + 1 :]:
            if size() - BYTES[now[i]] + BYTES[level] <= budget:
                now[i] = level
    assert found == tuple(now) and size() <= budget


def test_equal_entropies_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def alike(weights: Weights) -> None:
        for name, values in weights.items():
            values *= 1e-5 if ".norm" not in name else 1

    same = write_checkpoint(tmp_path / "same", alike)
    assert run(same, "--method", "ewq", "-o", tmp_path / "p.json") == 0
    assert "less than a millionth" in capsys.readouterr().err
    assert json.loads((tmp_path / "p.json").read_text())["details"]["indistinct"]


def test_ewq_takes_its_levels_from_the_schemes(folder: Path, tmp_path: Path) -> None:
    four = ["bf16", "nl4", "f32", "int8"]
    made = plan(folder, tmp_path / "p.json", method="ewq", schemes=four, rest="nl4", bits=5.0)
    levels = {made.tensors[f"layers.{i}.down"] for i in range(3)}
    assert "nl4" in levels and levels <= set(four)  # the fourth, as there was no other way
    free = plan(folder, tmp_path / "p.json", method="ewq", schemes=four)
    assert {"f32", "int8"} <= set(free.tensors.values()) <= set(four) - {"nl4"}


@pytest.mark.parametrize(
    ("method", "untied"), [("ewq", True), ("fast-ewq", False), ("error", True), ("linear", False)]
)
def test_a_file_of_the_plan_has_the_size_asked_for(
    tmp_path: Path, text: Path, method: str, untied: bool
) -> None:
    folder = write_checkpoint(tmp_path / "m", tie_word_embeddings=not untied)
    bound = {"rest": "nl4", "text": text, "exchanges": 2, "method": method}
    with pytest.raises(LimitError) as caught:
        plan(folder, tmp_path / "p.json", size=1000, **bound)
    least, bits = least_said(str(caught.value))
    assert not (tmp_path / "p.json").exists()
    with pytest.raises(LimitError):
        plan(folder, tmp_path / "p.json", size=least - 1, **bound)
    made = plan(folder, tmp_path / "p.json", bits=bits + 1e-3, **bound)
    assert made.bits_per_weight <= bits + 1e-3
    size = least + 30_000
    made = plan(folder, tmp_path / "p.json", size=size, **bound)
    assert size - 60_000 < written(folder, tmp_path / "p.json", tmp_path / "m.myai") <= size
    assert ("head" in made.tensors) == untied
    assert_fused(made)


def assert_fused(made: PlanDocument) -> None:
    """What one product reads is stored alike."""
    for i in range(3):
        for names in (("query", "key", "value"), ("gate", "up")):
            assert len({made.tensors[f"layers.{i}.{n}"] for n in names}) == 1


def written(folder: Path, planned: Path, out: Path) -> int:
    """Bytes of the file that a plan makes."""
    assert cli.main(["convert", str(folder), "--plan", str(planned), "-o", str(out), "-q"]) == 0
    return out.stat().st_size


@pytest.mark.parametrize("method", ["activation", "fisher", "measured"])
def test_plans_are_as_good_as_the_best_of_all(tmp_path: Path, text: Path, method: str) -> None:
    """With two schemes and nine items there are 512 plans."""
    folder = write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    names = ["int8", "nl4"]
    made = plan(
        folder, tmp_path / "p.json", method=method, text=text, bits=6.5, exchanges=0, schemes=names
    )
    table = made.details["losses"]
    with closing(open_checkpoint(folder)) as source:
        config = read_config(source)
    items = items_of(model_tensors(config))
    ways = options(items, table, [SCHEMES[n] for n in names])
    weights = sum(i.weights for i in items)
    fits = [p for p in itertools.product(*ways) if sum(o.bytes for o in p) <= weights * 6.5 / 8]
    best = min(sum(o.loss for o in p) for p in fits)
    worst = max(sum(o.loss for o in p) for p in fits)
    assert made.bytes <= weights * 6.5 / 8 and len(items) == 9
    assert made.bytes == sum(
        stored_bytes(SCHEMES[made.tensors[t.name]], *t.shape) for i in items for t in i.tensors
    )
    assert best <= made.expected_loss <= best + 0.05 * (worst - best)
    assert all(row["int8"] < row["nl4"] for row in table.values())


def test_matrices_can_be_planned_apart(
    folder: Path, tmp_path: Path, text: Path, home: Path
) -> None:
    """Their own losses, whatever was kept of them together; and the file is what was planned."""
    common = {"text": text, "bits": 5.0, "method": "fisher", "exchanges": 2}
    out = tmp_path / "p.json"
    assert_fused(plan(folder, out, **common))
    made = plan(folder, out, apart=True, **common)
    assert len(made.details["losses"]) == 1 + 3 * 7 and made.bits_per_weight <= 5.0
    assert {"layers.1.key", "layers.1.up"} <= made.details["losses"].keys()
    report = chalot.convert(folder, tmp_path / "m.myai", plan=out)
    assert sum(k.bytes for k in report.kinds if k.kind != "vector") == made.bytes
    assert len(list((home / "plans").iterdir())) == 2


def test_exchanges_lower_the_true_kl(folder: Path, tmp_path: Path, text: Path) -> None:
    common = {"text": text, "bits": 5.0, "method": "error"}
    one, many = (plan(folder, tmp_path / "p.json", exchanges=n, **common) for n in (1, 6))
    assert many.measured_loss <= one.measured_loss and many.bits_per_weight <= 5.0


def test_exchanges_start_from_one_scheme_for_all_where_that_is_better() -> None:
    """A plan that its table is wrong about; the text knows better."""
    items = [Item(n, i, (TensorSpec(n, (64, 512), "ffn"),)) for i, n in enumerate("ab")]

    class Known:
        """Losses that differ from the table's: of `a` stored coarsely, far more."""

        def __init__(self) -> None:
            self.items = items

        def encoded(self, item: Item, scheme: Scheme) -> dict[str, str]:
            return {item.name: str(scheme)}

        def kl_by_window(self, stored: dict[str, str]) -> list[float]:
            cost = {"int8": 0.0, "nl4": 1.0, "nl2": 9.0 if stored["a"] == "nl2" else 4.0}
            return [cost[stored["a"]] + cost[stored["b"]]] * 2

    schemes = [SCHEMES[n] for n in ("int8", "nl4", "nl2")]
    table = {"a": {"int8": 0.0, "nl4": 3.0, "nl2": 0.1}, "b": {"int8": 0.0, "nl4": 0.1, "nl2": 9.0}}
    same = sum(item_bytes(i, SCHEMES["nl4"]) for i in items)
    wrong = {"a": "nl2", "b": "nl4"}
    start = Chosen(wrong, sum(item_bytes(i, SCHEMES[wrong[i.name]]) for i in items), 0.2)
    found, kl = improve(Known(), table, schemes, start, same, tries=0)  # type: ignore[arg-type]
    assert found.schemes == {"a": "nl4", "b": "nl4"} and kl == 2.0 and found.bytes == same
    better = Chosen({"a": "int8", "b": "int8"}, 0, 0.0)
    assert improve(Known(), table, schemes, better, same, tries=0)[0].schemes == better.schemes  # type: ignore[arg-type]


def test_a_bounded_kl(folder: Path, tmp_path: Path, text: Path) -> None:
    common = {"text": text, "exchanges": 0, "method": "linear"}
    small = plan(folder, tmp_path / "p.json", max_kl=1e-2, **common)
    large = plan(folder, tmp_path / "p.json", max_kl=1e-4, **common)
    assert small.expected_loss <= 1e-2 and large.expected_loss <= 1e-4
    assert small.bytes < large.bytes
    with pytest.raises(LimitError, match="allow wider"):
        plan(folder, tmp_path / "p.json", max_kl=1e-9, schemes=["nl4", "nl2"], **common)
    with pytest.raises(FormatError, match="measured"):
        plan(folder, tmp_path / "p.json", max_kl=0.1, method="ewq")


def test_fisher_is_the_error_times_a_number_of_the_item(
    folder: Path, tmp_path: Path, text: Path
) -> None:
    w = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32)
    added = losses.noisy(w, 0) - w
    assert (added**2).sum() / (w**2).sum() == pytest.approx(losses.NOISE**2, rel=1e-4)
    tables = [
        plan(folder, tmp_path / "p.json", method=m, text=text, exchanges=0).details["losses"]
        for m in ("error", "fisher")
    ]
    for item, row in tables[0].items():
        assert tables[1][item]["int8"] / tables[1][item]["nl4"] == pytest.approx(
            row["int8"] / row["nl4"]
        )


def test_an_interrupted_table_is_taken_up_again(
    folder: Path, tmp_path: Path, text: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    row = losses.error_row

    def counted(swaps: object, item: object, schemes: object) -> dict[str, float]:
        asked.append(item.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return row(swaps, item, schemes)

    monkeypatch.setitem(losses.DEPTHS, "error", counted)
    out, command = (
        tmp_path / "p.json",
        [folder, "--method", "error", "--text", text, "-q", "--exchanges", 0],
    )
    assert run(*command, "-o", out) == 130
    assert list(tmp_path.glob("*.json")) == list(tmp_path.glob(".*.partial")) == []
    assert list((home / "eval").iterdir()) == []
    assert run(*command, "-o", out) == 0
    assert len(asked) == len(set(asked)) + 1 == 14  # the interrupted one twice
    (kept,) = (home / "plans").iterdir()
    kept.write_text('{"embedding": {"nl4": null}}')  # damaged: not trusted
    assert run(*command, "-o", tmp_path / "again.json", "--bpw", 5) == 0
    assert run(*command, "-o", tmp_path / "whole.json", "--bpw", 5) == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert len(asked) == 14 + 13


def test_an_edited_table_is_not_believed(
    folder: Path, tmp_path: Path, text: Path, home: Path
) -> None:
    def made() -> dict:
        options = {"method": "error", "text": text, "exchanges": 0}
        return plan(folder, tmp_path / "p.json", **options).details["losses"]

    true = made()
    (kept,) = (home / "plans").iterdir()
    whole = json.loads(kept.read_text())
    assert whole["losses"] == true
    for name, loss in (("nl4", 0.0), ("int8", -1.0), ("nl4", 1e400)):
        edited = json.loads(kept.read_text())
        edited["losses"]["embedding"][name] = loss
        kept.write_text(json.dumps(edited))
        assert made() == true
    keeper = losses.Keeper("key")
    row = dict.fromkeys(("nl4", "int8"), 1.0)
    keeper.write({"a": row, "b": row | {"nl4": -1.0}, "c": {"nl4": 1.0}})
    assert keeper.read(["int8", "nl4"]) == {"a": row}
    assert losses.Keeper("other").read(["int8", "nl4"]) == {}


def test_fast_ewq_looks_at_no_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def zeros(weights: Weights) -> None:
        for values in weights.values():
            values[...] = 0

    empty = write_checkpoint(tmp_path / "empty", zeros)
    one, other = (plan(f, tmp_path / "p.json", method="fast-ewq") for f in (folder, empty))
    assert one.tensors == other.tensors and one.details == other.details
    assert run(folder, "--method", "fast-ewq", "-o", tmp_path / "p.json") == 0
    said = capsys.readouterr().out
    record = fast_ewq.fitted()
    assert f"{record.agreement:.0%}" in said and f"{record.majority:.0%}" in said


def test_the_tree_is_whole() -> None:
    def walk(tree: fast_ewq.Tree) -> int:
        if isinstance(tree, fast_ewq.Leaf):
            return sum(tree.counts)
        assert tree.feature in fast_ewq.FEATURES
        return walk(tree.below) + walk(tree.above)

    record = fast_ewq.fitted()
    assert walk(record.tree) == record.blocks


def broken(name: str, value: float) -> object:
    def change(weights: Weights) -> None:
        weights[name][..., :3] = value

    return change


@pytest.mark.parametrize("method", ["ewq", "error", "linear"])
def test_weights_that_are_no_numbers(tmp_path: Path, text: Path, method: str) -> None:
    folder = write_checkpoint(tmp_path / "m", broken("layers.1.up", np.nan))
    with pytest.raises(WeightError, match="up_proj"):
        plan(folder, tmp_path / "p.json", method=method, text=text)
    assert not list(tmp_path.glob("*p.json*"))


def test_activations_that_are_no_numbers(tmp_path: Path, text: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", broken("layers.1.ffn_norm", 3e38))
    with pytest.raises((WeightError, KernelError), match="NaN or Inf"):
        plan(folder, tmp_path / "p.json", method="linear", text=text)
    assert not list(tmp_path.glob("*p.json*"))


def test_tokens_outside_the_vocabulary(tmp_path: Path, text: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", vocab_size=300, eos_token_id=1, pad_token_id=1)
    with pytest.raises(ChalotError, match="300|vocabulary"):
        plan(folder, tmp_path / "p.json", method="linear", text=text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "hessian"], "choose ewq"),
        (["--method", "ewq", "--ewq-variant", "shannon"], "softmax-eps"),
        (["--method", "ewq", "--ewq-x", "nan"], "finite"),
        (["--method", "ewq", "--schemes", "nl4,nl2"], "three"),
        (["--method", "ewq", "--ewq-rest", "q9"], "q9"),
        (["--schemes", "nl4,nosuch"], "nosuch"),
        (["--schemes", "nl4,nl4"], "two schemes"),
        (["--bpw", "0.5"], "the least"),
        (["--bpw", "nan"], "bits a weight"),
        (["--bpw", "4", "--size", "1MB"], "not several"),
        (["--max-kl", "-1"], "above 0"),
        (["--exchanges", "-1"], "0 or more"),
        (["--text", "nowhere.txt"], "cannot be read"),
        (["--text", "EMPTY"], "0 tokens"),
        (["--text", "TINY"], "tokens, expected at least 32"),
        (["--text", "WEIGHTS"], "not UTF-8"),
        (["--method", "ewq", "-o", "nowhere/p.json"], "nowhere"),
        (["--method", "ewq", "-o", "TINY"], "is no plan file"),
        (["--plot", "nowhere/p.svg"], "nowhere"),
        (["--plot", "TINY"], "is no .svg file"),
        (["--method", "ewq", "--simple", "--schemes", "bf16,int8,nl3"], "leave out --simple"),
        (["--method", "ewq", "--simple", "--ewq-rest", "int8"], "leave out --ewq-rest"),
        (["--method", "ewq", "--ewq-x", "-1"], "0 or more"),
        (["--bpw", "-4"], "above 0"),
        (["--size", "1kB"], "a size of 1,000 bytes"),
    ],
)
def test_bad_input_ends_in_one_line(
    folder: Path,
    tmp_path: Path,
    options: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    calibration = FOLDER / "calibration.txt"
    if "--text" not in options and "ewq" not in options:
        Path("SOME").write_text(calibration.read_text("utf-8")[:1100], "utf-8")
        options = [*options, "--text", "SOME"]
    Path("EMPTY").write_text("")
    Path("TINY").write_text("two words")
    Path("WEIGHTS").write_bytes((folder / "model.safetensors").read_bytes()[-300:])
    assert run(folder, *options) == 1
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert sorted(p.name for p in tmp_path.glob("*p*.json*")) == []
    assert Path("TINY").read_text() == "two words"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--context", "100"], "--context, which is of use with --size fit only"),
        (["--context", "100", "--size", "1MB"], "--context"),
        (["--ewq-variant", "codes"], "--ewq-variant"),
        (["--method", "fast-ewq", "--ewq-x", "1"], "--ewq-x"),
        (["--method", "measured", "--ewq-rest", "int8"], "--ewq-rest"),
        (["--simple"], "--simple, which is of use with --method ewq or fast-ewq only"),
        (["--method", "ewq", "--text", "t"], "--text"),
        (["--method", "fast-ewq", "--exchanges", "0"], "--exchanges"),
        (["--method", "ewq", "--apart"], "--apart"),
        (["--schemes", "nl4,,int8"], "names with commas"),
        (["--schemes", ""], "empty"),
        (["--plot", " "], "empty"),
        (["--size", "-5MB"], "is no size"),
    ],
)
def test_what_would_be_ignored_is_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run("nowhere", *options)
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_places_are_checked_before_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        pytest.fail("planned")

    monkeypatch.setattr(chalot.plan, "by_entropy", work)
    monkeypatch.setattr(chalot.plan, "by_loss", work)
    for words in (
        ["--plot", tmp_path / "nowhere" / "p.svg"],
        ["--method", "ewq", "--simple", "--schemes", "bf16,int8,nl3"],
        ["--method", "ewq", "-o", tmp_path / "nowhere" / "p.json"],
    ):
        assert run(folder, "-o", tmp_path / "p.json", *words) == 1
    assert not list(tmp_path.glob("*p.json*"))


def test_a_simple_plan_is_for_what_converting_makes_of_it(folder: Path, tmp_path: Path) -> None:
    """It says nothing of the embedding, so that its size is of the scheme this gets."""
    made = plan(folder, tmp_path / "p.json", method="ewq", simple=True)
    assert made.tensors["embedding"] == "nl4"
    out = tmp_path / "m.myai"
    report = chalot.convert(folder, out, plan=tmp_path / "p.json")
    stored = sum(k.bytes for k in report.kinds if k.kind != "vector")
    assert stored == made.bytes


def test_a_file_in_codes_can_be_planned(folder: Path, tmp_path: Path, text: Path) -> None:
    """Its numbers are what its codes stand for: at its own schemes nothing is lost but rounding."""
    coded = tmp_path / "coded.myai"
    assert cli.main(["convert", str(folder), "--scheme", "nl4", "-o", str(coded), "-q"]) == 0
    made = plan(coded, tmp_path / "p.json", method="error", text=text, exchanges=0, bits=5.0)
    assert made.source == "coded.myai" and made.bits_per_weight <= 5.0
    assert max(row["nl4"] for row in made.details["losses"].values()) < 0.002


def test_a_picture_of_the_plan(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, svg = tmp_path / "p.json", tmp_path / "p.svg"
    assert run(folder, "--method", "ewq", "-o", out, "--plot", svg, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["embedding"] == "int8"
    drawn = svg.read_text("utf-8")
    assert drawn.startswith("<svg") and drawn.count("<rect") == 3 * 7 + 1
