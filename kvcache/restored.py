"""What a device still holds, put in an order in which a tree can take it: parents first, run by run.

    entries, in any order ── plan ──► runs: each a path that begins at the root, behind a block that is
                                      held, or behind a block of an earlier run; and what has none of these

A run goes on as long as it can; where several entries continue one, it goes on with the one that comes
first, and each other begins a run of its own. Runs whose last entry comes earlier come earlier, unless
they continue a later one: so a policy that is told of them in this order takes what was listed first
for the oldest.

The sum: 0.4 us an entry, most of it spent on waiting for memory: keys are in no order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvcache.block import Slot, StorageKey
from kvcache.prefix import NONE, Run


class Restored(NamedTuple):
    """A block and where it lies. (No dataclass: there are hundreds of thousands of them.)"""

    key: StorageKey
    parent: StorageKey | None  # None for a first block
    slot: Slot
    block_bytes: int
    checksum: bytes


def plan(
    keys: Sequence[StorageKey],
    parents: Sequence[StorageKey | None],
    find: Callable[[StorageKey], int],
) -> tuple[list[int], list[Run]]:
    """The order of those that can be taken, by their places in ``keys``; and its runs, parents first.

    REQUIRES: no key comes twice; ``find`` gives the held block of a key, or NONE."""
    place_of = dict(zip(keys, range(len(keys)), strict=True))
    before = [place_of.get(parent) if parent is not None else None for parent in parents]
    eldest, younger = [NONE] * len(keys), [NONE] * len(keys)
    starts: list[tuple[int, int, int, int]] = []  # place, held block, run it continues, where in that run
    for place in range(len(keys) - 1, -1, -1):
        previous = before[place]
        if previous is not None:
            younger[place] = eldest[previous]
            eldest[previous] = place
        elif (parent := parents[place]) is None:
            starts.append((place, NONE, NONE, NONE))
        elif (held := find(parent)) != NONE:
            starts.append((place, held, NONE, NONE))
    starts.reverse()
    return _in_order(*_walk(starts, eldest, younger))


_Begin = tuple[int, int, int, int]


def _walk(
    starts: list[_Begin], eldest: list[int], younger: list[int]
) -> tuple[list[_Begin], list[list[int]], list[int]]:
    """How each run begins, its places, and the age it is listed by."""
    paths: list[list[int]] = []
    ages: list[int] = []
    for place, _, continued, _ in starts:
        path = [place]
        branches: list[tuple[int, int]] = []
        while (place := eldest[place]) != NONE:
            if (branch := younger[place]) != NONE:
                branches.append((branch, len(path) - 1))
            path.append(place)
        for first, at in branches:
            branch = first
            while branch != NONE:
                starts.append((branch, NONE, len(paths), at))
                branch = younger[branch]
        ages.append(max(path[-1], ages[continued]) if continued != NONE else path[-1])
        paths.append(path)
    return starts, paths, ages


def _in_order(starts: list[_Begin], paths: list[list[int]], ages: list[int]) -> tuple[list[int], list[Run]]:
    order: list[int] = []
    runs: list[Run] = []
    began = [NONE] * len(paths)
    for at in sorted(range(len(paths)), key=ages.__getitem__):
        _, held, continued, behind = starts[at]
        began[at] = len(order)
        order += paths[at]
        runs.append(
            Run(began[at], len(order), held, NONE if continued == NONE else began[continued] + behind)
        )
    return order, runs
