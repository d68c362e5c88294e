"""Programs and batches that do not fit are refused before anything runs."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

import tiny
from chalot.errors import KernelError
from chalot.kernels.backend import instruction_sets, open_backend
from chalot.kernels.program import PAGE, Batch, Op, Program, Slot
from chalot.model.cache import PageCache

NATIVE = [name for name, runs in instruction_sets() if runs and name != "reference"]
pytestmark = pytest.mark.skipif(not NATIVE, reason="the oracle checks less")

SMALL = tiny.program(tiny.config(layers=1, vocabulary=33), "nl4")
Ops = tuple[Op, ...]


def at(kind: str, ops: Ops = SMALL.ops) -> int:
    """The place of the first operation of a kind."""
    return next(i for i, op in enumerate(ops) if op.kind == kind)


def overwritten() -> Program:
    """Gate and up whose codes go where their input comes from."""
    program = tiny.program(tiny.config(layers=1, feed_forward=160), "nl4")
    first = at("gate", program.ops) - 1
    assert not program.ops[first].fused
    fused = replace(program.ops[first], fused=True)
    return replace(program, ops=(*program.ops[:first], fused, *program.ops[first + 1 :]))


def changed(kind: str, **fields: object) -> Program:
    """The small program, its first operation of a kind with other fields."""
    first = at(kind)
    op = replace(SMALL.ops[first], **fields)  # type: ignore[arg-type]
    return replace(SMALL, ops=(*SMALL.ops[:first], op, *SMALL.ops[first + 1 :]))


FEWER = tiny.program(tiny.config(layers=1, vocabulary=17), "nl4").ops[-1].parts


def with_frequencies(found: np.ndarray) -> Program:
    """The small program with other frequencies of rope, (sets, pairs)."""
    return replace(SMALL, inverse_frequency=found.astype(np.float32))


PROGRAMS: dict[str, tuple[Callable[[], Program], str]] = {
    "has no frequencies of that number": (lambda: changed("rope_store", rope=1), "frequencies"),
    "adds a bias that is too short": (
        lambda: changed("norm", bias=np.zeros(16, np.float32)),
        "padded to 16",
    ),
    "turns more pairs than a head has": (lambda: with_frequencies(np.ones((1, 13))), "1 to head"),
    "turns nothing": (lambda: with_frequencies(np.ones((1, 0))), "1 to head"),
    "has no set of frequencies": (lambda: with_frequencies(np.ones((0, 12))), "1 to head"),
    "turns by a factor that is none": (
        lambda: replace(SMALL, rope_factor=float("nan")),
        "a finite factor",
    ),
    "reads what nothing wrote": (
        lambda: replace(SMALL, ops=SMALL.ops[:1] + SMALL.ops[2:]),
        "operation 1: nothing has written",
    ),
    "reads what a fused product leaves out": (
        lambda: replace(
            SMALL,
            slots=(*SMALL.slots, Slot(SMALL.slots[SMALL.ops[at("gate")].target].width)),
            ops=(*SMALL.ops, Op("restore", SMALL.ops[at("gate")].target, len(SMALL.slots))),
        ),
        "nothing has written",
    ),
    "attends after gather": (
        lambda: replace(
            SMALL, ops=(*SMALL.ops[: at("gather") + 1], *SMALL.ops[1 : at("attend") + 1])
        ),
        "only the wanted tokens",
    ),
    "writes over what it reads": (overwritten, "write over what it reads"),
    "has too many heads": (
        lambda: replace(SMALL, heads=2**30, cache=replace(SMALL.cache, kv_heads=2)),
        "heads must be",
    ),
    "adds to what nothing wrote": (
        lambda: replace(SMALL, ops=(SMALL.ops[0], replace(SMALL.ops[1], add=True), *SMALL.ops[2:])),
        "nothing has written what it adds to",
    ),
    "has a norm of heads of another size": (
        lambda: changed("rope_store", weight=np.ones(16, np.float32)),
        "must be two heads",
    ),
    "has too short a norm": (lambda: changed("norm", weight=np.ones(16, np.float32)), "norm needs"),
    "caps what are no logits": (lambda: changed("linear", cap=1.0), "only logits are capped"),
    "writes a slot that is not there": (
        lambda: changed("linear", target=99, parts=()),
        "slot does not exist",
    ),
    "rotates into another slot": (
        lambda: changed("rope_store", target=0),
        "rope_store writes what it reads",
    ),
    "embeds twice, of fewer tokens": (
        lambda: replace(SMALL, ops=(replace(SMALL.ops[0], parts=FEWER), *SMALL.ops)),
        "embeddings differ in vocabulary",
    ),
    "has logits twice, of fewer tokens": (
        lambda: replace(SMALL, ops=(*SMALL.ops, replace(SMALL.ops[-1], parts=FEWER))),
        "logits differ in vocabulary",
    ),
    "has a head size whose padding overflows": (
        lambda: replace(SMALL, cache=replace(SMALL.cache, head_dim=2**31 - 2)),
        "the head size even and <= 1024",
    ),
    "has an infinite embedding": (lambda: changed("embed", number=np.inf), "must be finite"),
    "has a negative window": (
        lambda: replace(SMALL, ops=tuple(replace(op, window=-1) for op in SMALL.ops)),
        "window and cap",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_does_not_fit_is_refused(name: str) -> None:
    make, words = PROGRAMS[name]
    with pytest.raises(KernelError, match=words):
        open_backend(NATIVE[0], 2).compile(make())


def whole(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


GOOD = Batch(whole(1, 2), whole(0, 1), whole(0, 0), whole(0).reshape(1, 1), whole(1))
BATCHES: dict[str, tuple[Batch, str]] = {
    "token": (replace(GOOD, tokens=whole(1, 33)), "vocabulary"),
    "sequence": (replace(GOOD, sequences=whole(0, 1)), "page table"),
    "negative position": (replace(GOOD, positions=whole(-1, 0)), "page table"),
    "position": (replace(GOOD, positions=whole(0, PAGE)), "page table"),
    "no page": (replace(GOOD, pages=whole(-1).reshape(1, 1)), "outside the cache"),
    "page": (replace(GOOD, pages=whole(1).reshape(1, 1)), "outside the cache"),
    "wanted": (replace(GOOD, wanted=whole(2)), "outside the batch"),
    "wanted of nothing": (
        Batch(whole(), whole(), whole(), whole(0).reshape(1, 1), whole(0)),
        "outside the batch",
    ),
    "lengths": (replace(GOOD, positions=whole(0)), "sizes differ"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_that_does_not_fit_is_refused(name: str) -> None:
    runnable = open_backend(NATIVE[0], 2).compile(SMALL)
    arena = PageCache(SMALL.cache, PAGE).arena
    before = runnable.run(GOOD, arena)
    batch, words = BATCHES[name]
    with pytest.raises(KernelError, match=words):
        runnable.run(batch, arena)
    np.testing.assert_array_equal(runnable.run(GOOD, arena), before)


@pytest.mark.parametrize("isa", NATIVE)
def test_a_row_may_be_wanted_often_or_never(isa: str) -> None:
    runnable = open_backend(isa, 3).compile(SMALL)
    arena = PageCache(SMALL.cache, PAGE).arena
    both = runnable.run(replace(GOOD, wanted=whole(0, 1)), arena)
    often = runnable.run(replace(GOOD, wanted=whole(1, 0, 1, 1, 0)), arena)
    np.testing.assert_array_equal(often, both[[1, 0, 1, 1, 0]])
    assert runnable.run(replace(GOOD, wanted=whole()), arena).shape == (0, 33)
    assert runnable.best(replace(GOOD, wanted=whole()), arena, 3)[0].shape == (0, 3)
