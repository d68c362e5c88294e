"""From a loss table to a plan of exactly so many bytes, and exchanges that the true KL approves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chalot.errors import LimitError
from chalot.evaluate.quality import standard_error
from chalot.plan.losses import Table
from chalot.plan.swap import Item, Swaps
from chalot.quant.allocation import Option, allocate, hull, least
from chalot.quant.packing import Matrix, stored_bytes
from chalot.quant.scheme import SCHEMES, Scheme

Choice = dict[str, str]  # item -> scheme
EXCHANGES = 40  # pairs of items that are tried


@dataclass(frozen=True)
class Chosen:
    """A plan by item. `bytes` are of the items' tensors; `expected` is the sum of losses."""

    schemes: Choice
    bytes: int
    expected: float


def item_bytes(item: Item, scheme: Scheme) -> int:
    """Of all its tensors."""
    return sum(stored_bytes(scheme, *t.shape) for t in item.tensors)


def options(items: Sequence[Item], table: Table, schemes: Sequence[Scheme]) -> list[list[Option]]:
    """Every way to store each item."""
    return [
        [Option(str(s), item_bytes(item, s), table[item.name][str(s)]) for s in schemes]
        for item in items
    ]


def choose(items: Sequence[Item], table: Table, schemes: Sequence[Scheme], budget: int) -> Chosen:
    """The best within `budget` bytes of matrices. Raises LimitError, which says the least."""
    ways = options(items, table, schemes)
    found = allocate(ways, budget)
    if found is None:
        raise LimitError(
            f"{budget:,} bytes for the matrices; the least with these schemes is {least(ways):,}: "
            "ask for more, or allow smaller schemes with --schemes"
        )
    names = {item.name: o.name for item, o in zip(items, found.chosen, strict=True)}
    return Chosen(names, found.bytes, found.loss)


def cheapest(items: Sequence[Item], table: Table, schemes: Sequence[Scheme], most: float) -> Chosen:
    """The smallest plan whose expected loss is at most `most`: along the hulls' corners."""
    ways = options(items, table, schemes)
    budgets = sorted({sum(o.bytes for o in plan) for plan in corners(ways)})
    for budget in budgets:
        found = choose(items, table, schemes, budget)
        if found.expected <= most:
            return found
    raise LimitError(
        f"an expected KL of {most} is below what these schemes can do, "
        f"{found.expected:.5f}; allow wider ones with --schemes"
    )


def corners(ways: Sequence[Sequence[Option]]) -> Iterator[list[Option]]:
    """The plans that some multiplier makes the best, ascending in bytes."""
    hulls = [hull(o) for o in ways]
    at = [0] * len(hulls)
    yield [h[0] for h in hulls]
    steps = sorted(
        ((b.loss - a.loss) / (b.bytes - a.bytes), i)
        for i, h in enumerate(hulls)
        for a, b in zip(h, h[1:], strict=False)
    )
    for _, i in steps:
        at[i] += 1
        yield [h[n] for h, n in zip(hulls, at, strict=True)]


def exchanges(
    items: Sequence[Item],
    table: Table,
    schemes: Sequence[Scheme],
    now: Mapping[str, str],
    room: int,
) -> list[tuple[float, Choice]]:
    """Pairs of changes that fit `room` more bytes: one item wider, one narrower; best first."""
    ways = {
        item.name: {o.name: o for o in each}
        for item, each in zip(items, options(items, table, schemes), strict=True)
    }
    found = []
    for a in items:
        for b in items:
            if a.name == b.name:
                continue
            old_a, old_b = ways[a.name][now[a.name]], ways[b.name][now[b.name]]
            for up in ways[a.name].values():
                for down in ways[b.name].values():
                    more = up.bytes - old_a.bytes + down.bytes - old_b.bytes
                    if up.bytes > old_a.bytes and down.bytes < old_b.bytes and more <= room:
                        gain = up.loss - old_a.loss + down.loss - old_b.loss
                        found.append((gain, {a.name: up.name, b.name: down.name}))
    return sorted(found, key=lambda f: (f[0], sorted(f[1].items())))


def uniform(
    items: Sequence[Item], table: Table, schemes: Sequence[Scheme], budget: int
) -> dict[str, str] | None:
    """One scheme for all items, that which is expected to lose least; None if none fits."""
    fits = [str(s) for s in schemes if sum(item_bytes(i, s) for i in items) <= budget]
    if not fits:
        return None
    best = min(fits, key=lambda name: sum(table[i.name][name] for i in items))
    return dict.fromkeys((i.name for i in items), best)


def improve(
    swaps: Swaps,
    table: Table,
    schemes: Sequence[Scheme],
    chosen: Chosen,
    budget: int,
    tries: int = EXCHANGES,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[Chosen, float]:
    """Exchange pairs as long as the model's KL on the text falls; the plan and its KL.

    It must fall by more than its own standard error over the text's windows: what is not sure here
    is as likely a loss elsewhere. It begins from the plan or from one scheme for all that fits,
    whichever has the smaller KL.
    """
    by_name = {item.name: item for item in swaps.items}

    def stored(plan: Mapping[str, str]) -> dict[str, Matrix]:
        found: dict[str, Matrix] = {}
        for name, scheme in plan.items():
            found |= swaps.encoded(by_name[name], SCHEMES[scheme])
        return found

    now, matrices = dict(chosen.schemes), stored(chosen.schemes)
    best, used = np.array(swaps.kl_by_window(matrices)), chosen.bytes
    same = uniform(swaps.items, table, schemes, budget)
    if same is not None and same != now:
        other = stored(same)
        found = np.array(swaps.kl_by_window(other))
        if found.mean() < best.mean():
            now, matrices, best = same, other, found
            used = sum(item_bytes(by_name[i], SCHEMES[s]) for i, s in now.items())
    tried: set[str] = set()
    for n in range(tries):
        fresh = next(
            (
                change
                for _, change in exchanges(swaps.items, table, schemes, now, budget - used)
                if str(sorted(change.items())) not in tried
            ),
            None,
        )
        if fresh is None:
            break
        tried.add(str(sorted(fresh.items())))
        trial = dict(matrices)
        for name, scheme in fresh.items():
            trial |= swaps.encoded(by_name[name], SCHEMES[scheme])
        found = np.array(swaps.kl_by_window(trial))
        if (found - best).mean() < -np.nan_to_num(standard_error(found - best)):
            best, matrices, now = found, trial, {**now, **fresh}
            used = sum(item_bytes(by_name[i], SCHEMES[s]) for i, s in now.items())
            tried.clear()
        progress(f"KL {best.mean():.5f}", n + 1, tries)
    expected = sum(table[item][scheme] for item, scheme in now.items())
    return Chosen(now, used, expected), float(best.mean())
