"""The exactness contract: equal hashes of logits, whatever computes them, however fed."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

import tiny
from chalot.kernels.backend import Backend, instruction_sets, open_backend
from chalot.kernels.program import PAGE, Batch, Program
from chalot.model.cache import PageCache, Sequence
from chalot.model.config import inverse_frequencies as inverse
from chalot.model.transformer import build

ISAS = [name for name, runs in instruction_sets() if runs]
NATIVE = [name for name in ISAS if name != "reference"]
TOKENS = 300  # more than a page
# Hashes of the last logits of TOKENS tokens, the same on every platform.
KNOWN = {
    "nl4": "52489862a56d0642",
    "int8": "e2315bbae1ae704b",
    "bf16": "1628d2fc1acd1811",
    "mixed": "d738afd46bb20b9c",
}


def ids(seed: int, count: int = TOKENS) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(seed))
    return rng.integers(0, 301, count).astype(np.int32)


def digest(logits: np.ndarray) -> str:
    assert np.isfinite(logits).all() and logits.any()
    return hashlib.sha256(np.ascontiguousarray(logits, "<f4").tobytes()).hexdigest()[:16]


def feed(
    backend: Backend, program: Program, texts: list[np.ndarray], chunks: Iterator[int] | int
) -> list[np.ndarray]:
    """Logits of every token of every text, all texts going through in one batch a step."""
    runnable = backend.compile(program)
    cache = PageCache(program.cache, sum(len(t) + PAGE for t in texts))
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


@pytest.mark.parametrize("cache", ["f16", "f32"])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("scheme", ["nl4", "int8", "f32", "f16", "bf16", "mixed"])
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


@pytest.mark.parametrize("scheme", ["int8", "nl4"])
@pytest.mark.parametrize("weights", [plain_weights, tied_weights, lonely_weights])
@pytest.mark.parametrize("isa", NATIVE)
def test_native_codes_are_numpys(
    isa: str, weights: Callable[[np.random.Generator], np.ndarray], scheme: str
) -> None:
    from chalot.quant.scheme import Scheme

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
