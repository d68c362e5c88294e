"""The exactness contract: equal hashes of logits, whatever computes them, however fed."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

import tiny
from chalot.kernels.backend import Backend, instruction_sets, open_backend
from chalot.kernels.program import PAGE, Batch, Program
from chalot.kernels.reference import best_of
from chalot.model.cache import PageCache, Sequence
from chalot.model.config import inverse_frequencies as inverse
from chalot.model.rope import RopeScaling
from chalot.model.transformer import build
from chalot.quant.scheme import SCHEMES, Scheme

ISAS = [name for name, runs in instruction_sets() if runs]
NATIVE = [name for name in ISAS if name != "reference"]
CODED = [s.name for s in SCHEMES.values() if s.is_coded]
TOKENS = 300  # more than a page
# Hashes of the last logits of TOKENS tokens, the same on every platform.
KNOWN = {
    "nl4": "8ccd9262d71377d4",
    "int8": "9da0d336a64dda8e",
    "bf16": "e95f8bcd16257989",
    "mixed": "d738afd46bb20b9c",
    "every": "f599d6800e8a5cfb",
}


def ids(seed: int, count: int = TOKENS) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(seed))
    return rng.integers(0, 301, count).astype(np.int32)


def digest(logits: np.ndarray) -> str:
    assert np.isfinite(logits).all() and logits.any()
    return hashlib.sha256(np.ascontiguousarray(logits, "<f4").tobytes()).hexdigest()[:16]


def feed(
    backend: Backend,
    program: Program,
    texts: list[np.ndarray],
    chunks: Iterator[int] | int,
    cache: PageCache | None = None,
) -> list[np.ndarray]:
    """Logits of every token of every text, all texts going through in one batch a step."""
    runnable = backend.compile(program)
    cache = cache or PageCache(program.cache, sum(len(t) + PAGE for t in texts))
    sequences = [Sequence(cache) for _ in texts]
    out: list[list[np.ndarray]] = [[] for _ in texts]
    while any(s.length < len(t) for s, t in zip(sequences, texts, strict=True)):
        size = chunks if isinstance(chunks, int) else next(chunks)
        tokens, positions, rows = [], [], []
        for i, (s, t) in enumerate(zip(sequences, texts, strict=True)):
            part = t[s.length : s.length + size]
            s.reserve(s.length + len(part))
            tokens.append(part)
            positions.append(np.arange(s.length, s.length + len(part)))
            rows.append(np.full(len(part), i))
            s.length += len(part)
        where = np.concatenate(rows).astype(np.int32)
        batch = Batch(
            np.concatenate(tokens).astype(np.int32),
            np.concatenate(positions).astype(np.int32),
            where,
            cache.tables(sequences),
            np.arange(len(where), dtype=np.int32),
        )
        logits = runnable.run(batch, cache.arena)
        for i in range(len(texts)):
            out[i].append(logits[where == i])
    for s in sequences:
        s.close()
    return [np.concatenate(o) for o in out]


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """Logits (TOKENS, vocabulary) of each scheme: scalar kernels, one thread, one batch."""
    backend = open_backend("scalar" if "scalar" in ISAS else "reference", 1)
    c = tiny.config()
    return {s: feed(backend, tiny.program(c, s), [ids(0)], TOKENS)[0] for s in KNOWN}


@pytest.mark.parametrize("scheme", KNOWN)
def test_hash_is_the_committed_one(expected: dict[str, np.ndarray], scheme: str) -> None:
    assert digest(expected[scheme]) == KNOWN[scheme]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("scheme", KNOWN)
def test_instruction_sets_and_threads(
    expected: dict[str, np.ndarray], scheme: str, isa: str, threads: int
) -> None:
    backend = open_backend(isa, threads)
    assert (backend.name, backend.threads) == (isa, threads)
    got = feed(backend, tiny.program(tiny.config(), scheme), [ids(0)], TOKENS)[0]
    assert digest(got) == digest(expected[scheme])


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("isa", NATIVE)
def test_chunks(expected: dict[str, np.ndarray], isa: str, chunk: int) -> None:
    for scheme in KNOWN:
        got = feed(open_backend(isa, 2), tiny.program(tiny.config(), scheme), [ids(0)], chunk)[0]
        assert digest(got) == digest(expected[scheme]), scheme


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("isa", NATIVE)
def test_batches(expected: dict[str, np.ndarray], isa: str, count: int) -> None:
    """A text's logits do not depend on its neighbours, nor on pages that lie out of order."""
    texts = [ids(0), *(ids(i, 40 * i) for i in range(1, count))]
    for scheme in ("nl4", "mixed"):
        got = feed(open_backend(isa, 2), tiny.program(tiny.config(), scheme), texts, 50)
        assert digest(got[0]) == digest(expected[scheme]), scheme
        alone = feed(open_backend(isa, 1), tiny.program(tiny.config(), scheme), [texts[2]], 7)[0]
        assert digest(got[2]) == digest(alone)


@pytest.mark.parametrize("isa", NATIVE)
def test_pages_that_held_another_text(expected: dict[str, np.ndarray], isa: str) -> None:
    """Keys and values of a text before, of any size, leave no trace."""
    for scheme in ("nl4", "mixed"):
        program = tiny.program(tiny.config(), scheme)
        cache = PageCache(program.cache, 2 * PAGE)
        cache.arena[:] = 0x7B  # large finite numbers, as scales and as float16
        for text in (ids(9, 2 * PAGE), ids(0)):
            got = feed(open_backend(isa, 2), program, [text], 64, cache)[0]
        assert digest(got) == digest(expected[scheme]), scheme


@pytest.mark.parametrize("cache", ["f16", "f32", "int8"])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("scheme", [*SCHEMES, "mixed"])
def test_oracle_agrees(scheme: str, planes: int, cache: str) -> None:
    """numpy and every native table give the same bits, with 8- and 16-bit activations."""
    program = tiny.program(tiny.config(), scheme, planes, cache)
    text = [ids(5, 20)]
    oracle = digest(feed(open_backend("reference"), program, text, 20)[0])
    for isa in NATIVE:
        assert digest(feed(open_backend(isa, 2), program, text, 9)[0]) == oracle, isa


@pytest.mark.parametrize("planes", [1, 2])
def test_coded_activations_of_dense_matrices_agree(planes: int) -> None:
    c = tiny.config()
    w = tiny.weights(c, {"*": "bf16"}, planes)
    program = build(c, replace(w, planes=dict.fromkeys(w.matrices, planes)), inverse(c), "f16")
    assert any(op.kind == "restore" for op in program.ops)
    oracle = digest(feed(open_backend("reference"), program, [ids(5, 9)], 9)[0])
    for isa in NATIVE:
        assert digest(feed(open_backend(isa, 2), program, [ids(5, 9)], 9)[0]) == oracle, isa


def test_oracle_agrees_over_pages() -> None:
    program = tiny.program(tiny.config(layers=1, feed_forward=32, vocabulary=33), "nl4")
    text = [ids(5, PAGE + 3) % 33]
    oracle = digest(feed(open_backend("reference"), program, text, PAGE + 3)[0])
    for isa in NATIVE:
        assert digest(feed(open_backend(isa, 2), program, text, 64)[0]) == oracle, isa


def test_gelu_agrees() -> None:
    program = tiny.program(tiny.config(activation="gelu_tanh"), "nl4")
    oracle = digest(feed(open_backend("reference"), program, [ids(5, 9)], 9)[0])
    for isa in NATIVE:
        assert digest(feed(open_backend(isa, 2), program, [ids(5, 9)], 9)[0]) == oracle, isa


LONGROPE = RopeScaling(
    factor=4.0,
    kind="longrope",
    original_context=256,
    attention_factor=1.25,
    short_factor=(1.0, 1.5, 2.0, 2.5, 3.0, 3.5),
    long_factor=(1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
)
# What families add, and the hash of the last of 40 logits by mixed schemes, the same everywhere.
FAMILIES: dict[str, tuple[dict[str, object], str]] = {
    "gemma2": (
        {"post_norms": True, "embedding_scale": 12.625, "activation": "gelu_tanh"}
        | {"score_cap": 3.0, "logit_cap": 4.0, "score_scale": 0.3, "windows": (7, 0)},
        "17841b1ae0971d28",
    ),
    "qwen3": ({"head_norms": True, "query_key_value_bias": False}, "620786593bb660ee"),
    "bitnet": ({"inner_norms": True, "activation": "relu2"}, "dc5b12bd73c3a044"),
    "olmo2": ({"pre_norms": False, "post_norms": True, "whole_norms": True}, "857202cec0764dcd"),
    "smollm3": ({"rope_bases": (None, 0.0)}, "adb2e2eb4c0d0f1e"),
    "gemma3": (
        {"rope_bases": (400.0, None), "windows": (9, 0), "head_norms": True, "post_norms": True},
        "fa793219a902ae0c",
    ),
    "stablelm": ({"centred_norms": True, "turning": 6}, "13683b865b47c6ea"),
    "partial": ({"turning": 6}, "0ed1c5ee1e20e518"),
    "phi3": ({"rope_scaling": LONGROPE, "turning": 12}, "dbb11a82d0abca9e"),
}


@pytest.mark.parametrize("scheme", ["nl4", "f32", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_agree(family: str, scheme: str) -> None:
    """Norms behind and inside, of heads too, caps, factors and gates: the same bits everywhere."""
    changes, known = FAMILIES[family]
    program = tiny.program(tiny.config(**changes), scheme)
    plain = tiny.program(tiny.config(), scheme)
    text = [ids(5, 40)]
    oracle = digest(feed(open_backend("reference"), program, text, 40)[0][-1])
    if scheme == "mixed":
        assert oracle == known
    assert digest(feed(open_backend("reference"), plain, text, 40)[0][-1]) != oracle
    for isa in NATIVE:
        for threads, chunk in ((1, 40), (3, 7), (2, 1)):
            got = feed(open_backend(isa, threads), program, text, chunk)[0]
            assert digest(got[-1]) == oracle, (isa, threads, chunk)


@pytest.mark.parametrize("change", [{"logit_cap": 4.0}, {"inner_norms": True}])
def test_the_best_of_families(change: dict[str, object]) -> None:
    """Capped logits too, over a vocabulary that is no multiple of 16."""
    program = tiny.program(tiny.config(layers=1, **change), "nl4")
    line = np.arange(9, dtype=np.int32)
    where = np.zeros(9, np.int32)
    batch = Batch(ids(3, 9), line, where, where[:1, None], line)
    for isa in NATIVE:
        runnable = open_backend(isa, 3).compile(program)
        arena = PageCache(program.cache, PAGE).arena
        expected = best_of(runnable.run(batch, arena), 5)
        for a, b in zip(runnable.best(batch, arena, 5), expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("window", [0, 5, 256, 262])
@pytest.mark.parametrize("cache", ["f16", "int8"])
def test_windows_and_caps_agree(cache: str, window: int, cap: float) -> None:
    """A query that sees the last positions only, scores held by tanh; over a page's end."""
    c = tiny.config(layers=1, feed_forward=32, vocabulary=33, head_dim=20, heads=4)
    plain = tiny.program(c, "nl4", cache=cache)
    ops = tuple(
        replace(op, window=window, cap=cap) if op.kind == "attend" else op for op in plain.ops
    )
    text = [ids(5, PAGE + 9) % 33]
    oracle = feed(open_backend("reference"), replace(plain, ops=ops), text, PAGE + 9)[0]
    for isa in NATIVE:
        for threads, chunk in ((1, PAGE + 9), (3, 50)):
            got = feed(open_backend(isa, threads), replace(plain, ops=ops), text, chunk)[0]
            assert digest(got) == digest(oracle), (isa, threads)
    whole = feed(open_backend(NATIVE[0], 1), plain, text, PAGE + 9)[0]
    assert (digest(whole) == digest(oracle)) == (cap == 0 and window == 0)


@pytest.mark.parametrize("cache", ["f16", "int8"])
def test_pages_split_over_threads(cache: str) -> None:
    """One token's pages are dealt out, a prompt's are walked in a row: the bits are the same."""
    program = tiny.program(tiny.config(), "nl4", cache=cache)
    text = [np.resize(ids(7), 4 * PAGE + 5)]
    whole = digest(feed(open_backend(NATIVE[0], 1), program, text, len(text[0]))[0][-9:])
    for isa in NATIVE:
        if isa == "scalar":
            continue
        for threads in (1, 2, 5):
            tail = feed(open_backend(isa, threads), program, text, steps(4 * PAGE - 4, 1))[0]
            assert digest(tail[-9:]) == whole, (isa, threads)


def steps(first: int, rest: int) -> Iterator[int]:
    """A long chunk, then short ones."""
    yield first
    while True:
        yield rest


@pytest.mark.parametrize("isa", NATIVE)
def test_fused_operations_change_nothing(expected: dict[str, np.ndarray], isa: str) -> None:
    for scheme in ("nl4", "int8", "mixed", "every"):
        program = tiny.program(tiny.config(), scheme)
        assert any(op.fused for op in program.ops)
        apart = replace(program, ops=tuple(replace(op, fused=False) for op in program.ops))
        got = feed(open_backend(isa, 2), apart, [ids(0)], 64)[0]
        assert digest(got) == digest(expected[scheme]), scheme


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("scheme", CODED)
def test_mixed_schemes_in_one_fused_product(scheme: str, planes: int) -> None:
    """Gate and up, and query, key and value, of neighbouring schemes share one pass."""
    c = tiny.config(layers=1, feed_forward=72, vocabulary=33)
    beside = CODED[(CODED.index(scheme) + 1) % len(CODED)]
    own = {"layers.0.up": beside, "layers.0.key": beside, "embedding": "f32", "*": scheme}
    program = build(c, tiny.weights(c, own, planes), inverse(c), "int8")
    assert any({str(p.matrix.scheme) for p in op.parts} == {scheme, beside} for op in program.ops)
    text = [ids(5, 9) % 33]
    oracle = digest(feed(open_backend("reference"), program, text, 9)[0])
    apart = replace(program, ops=tuple(replace(op, fused=False) for op in program.ops))
    for isa in NATIVE:
        for chunk in (1, 9):
            for one in (program, apart):
                assert digest(feed(open_backend(isa, 2), one, text, chunk)[0]) == oracle, isa


@pytest.mark.parametrize("planes", [1, 2])
def test_a_layer_of_one_width_agrees(planes: int) -> None:
    """What a fused product makes must not go where its input lies."""
    program = tiny.program(tiny.config(hidden=160, feed_forward=160), "nl4", planes)
    oracle = digest(feed(open_backend("reference"), program, [ids(5, 9)], 9)[0])
    for isa in NATIVE:
        assert digest(feed(open_backend(isa, 2), program, [ids(5, 9)], 9)[0]) == oracle, isa


@pytest.mark.parametrize("cache", ["f16", "f32", "int8"])
def test_what_a_page_held_before_is_gone(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that nothing wrote since may hold anything: NaN in every number here."""
    program = tiny.program(tiny.config(), "nl4", cache=cache)
    clean = {isa: digest(feed(open_backend(isa, 2), program, [ids(5, 40)], 7)[0]) for isa in NATIVE}
    made = PageCache.__init__

    def dirty(self: PageCache, *arguments: object) -> None:
        made(self, *arguments)  # type: ignore[arg-type]
        self.arena[:] = 0xFF

    monkeypatch.setattr(PageCache, "__init__", dirty)
    for isa in NATIVE:
        got = digest(feed(open_backend(isa, 2), program, [ids(5, 40)], 7)[0])
        assert got == clean[isa], isa


@pytest.mark.parametrize("isa", NATIVE)
def test_the_best_are_those_of_all_logits(isa: str) -> None:
    """Chosen by threads in parts of the vocabulary, ties and all."""
    program = tiny.program(tiny.config(), "int8")
    text, wanted = ids(3, 20), np.array([0, 7, 19], np.int32)
    for threads in (1, 3):
        runnable = open_backend(isa, threads).compile(program)
        cache = PageCache(program.cache, PAGE)
        sequence = Sequence(cache)
        sequence.reserve(len(text))
        line = np.arange(len(text), dtype=np.int32)
        zeros = np.zeros(len(text), np.int32)
        batch = Batch(text, line, zeros, cache.tables([sequence]), wanted)
        logits = runnable.run(batch, cache.arena)
        for count in (1, 2, 40, 301):
            found = runnable.best(batch, cache.arena, count)
            for a, b in zip(found, best_of(logits, count), strict=True):
                np.testing.assert_array_equal(a, b)


def test_another_order_of_sums_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash must notice a single sum taken in another order."""
    from chalot.kernels import reference

    program = tiny.program(tiny.config(), "bf16")
    before = digest(feed(open_backend("reference"), program, [ids(5, 9)], 9)[0])

    def from_the_left(lanes: np.ndarray) -> np.ndarray:
        total = lanes[..., 0]
        for i in range(1, lanes.shape[-1]):
            total = total + lanes[..., i]
        return total

    monkeypatch.setattr(reference, "tree", from_the_left)
    assert digest(feed(open_backend("reference"), program, [ids(5, 9)], 9)[0]) != before


def test_exponential() -> None:
    edge = [0.0, -0.0, 88, 88.5, 1e30, -87, -87.01, -88, -1e30, -np.inf, 1e-30]
    x = np.concatenate([np.linspace(-90, 89, 40001), edge]).astype(np.float32)
    oracle = open_backend("reference").exp(x)
    usual = (x > -86.9) & (x < 88)
    np.testing.assert_allclose(oracle[usual], np.exp(x[usual].astype(np.float64)), rtol=1.2e-7)
    for isa in NATIVE:
        np.testing.assert_array_equal(open_backend(isa, 1).exp(x), oracle)


def plain_weights(rng: np.random.Generator) -> np.ndarray:
    """Normal, with a row of zeros, an outlier, and rows at the ends of float32."""
    w = rng.standard_normal((53, 1100)).astype(np.float32)
    w[3], w[7, :300], w[9, 5] = 0, 0, 500
    w[4] *= np.float32(1e-40)
    w[5] *= np.float32(1e37)
    return w


def tied_weights(rng: np.random.Generator) -> np.ndarray:
    """Middles of every table exactly, in large and small groups: values and levels tie."""
    reach = rng.choice([3, 6, 20, 254], (48, 20)).repeat(32, axis=1)
    w = np.rint(rng.uniform(-reach, reach)).astype(np.float32) * np.float32(0.5)
    w[:, ::512] = 127
    return w


def lonely_weights(rng: np.random.Generator) -> np.ndarray:
    """Groups of all sizes, some with one large weight: the level may be far from its own."""
    size = 2.0 ** -rng.integers(0, 12, (48, 20)).repeat(32, axis=1)
    w = (rng.standard_normal((48, 640)) * size).astype(np.float32)
    w[:, ::96] = rng.choice([-1, 1], (48, 7))
    return w


@pytest.mark.parametrize("scheme", CODED)
@pytest.mark.parametrize("weights", [plain_weights, tied_weights, lonely_weights])
@pytest.mark.parametrize("isa", NATIVE)
def test_native_codes_are_numpys(
    isa: str, weights: Callable[[np.random.Generator], np.ndarray], scheme: str
) -> None:
    w, s = weights(np.random.default_rng(3)), Scheme.parse(scheme)
    expected = open_backend("reference").encode(w, s)
    np.testing.assert_array_equal(open_backend(isa, 3).encode(w, s), expected)


def test_the_files_own_tables_count() -> None:
    """Native code and the oracle read the tables of the file, not those of this version."""
    program = tiny.program(tiny.config(layers=1), "nl4")
    before = digest(feed(open_backend("reference"), program, [ids(5, 9)], 9)[0])
    halved = []
    for op in program.ops:
        parts = tuple(
            replace(p, matrix=replace(p.matrix, tables=p.matrix.tables // 2))
            for p in op.parts
            if p.matrix.tables is not None
        )
        halved.append(replace(op, parts=parts))
    changed = replace(program, ops=tuple(halved))
    oracle = digest(feed(open_backend("reference"), changed, [ids(5, 9)], 9)[0])
    assert oracle != before
    for isa in NATIVE:
        assert digest(feed(open_backend(isa, 2), changed, [ids(5, 9)], 9)[0]) == oracle, isa
