"""The oracle of an index of leading blocks, and the random caller that tells both the same.

The oracle is a set of hashes for each holder and tier, looked up block by block. Prompts are paths in a
small tree, so that they share roots, fork, and end within one another.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Collection, Iterable, Sequence
from hashlib import blake2b

from kvcache.index import TIER_COUNT, Index

BYTES_MAX = 1 << 26
Answer = tuple[int, int, int, tuple[int, ...]]  # Worker, rank, blocks, of these in each tier.


def blocks(values: Iterable[int]) -> array[int]:
    return array("Q", values)


def path(choices: Iterable[int]) -> list[int]:
    """The hashes of a prompt, chained: the same choices up to a block name the same block."""
    name, made = b"root", []
    for choice in choices:
        name = blake2b(name + bytes([choice]), digest_size=8).digest()
        made.append(int.from_bytes(name, "little"))
    return made


class IndexModel:
    """Sets, and nothing clever."""

    def __init__(self) -> None:
        self.held: dict[int, list[set[int]]] = {}
        self.ranks: dict[int, tuple[int, int]] = {}
        self.answering: dict[tuple[int, int], int] = {}

    def open(self, holder: int, worker: int, rank: int) -> None:
        assert holder not in self.held, "a handle is given out once"
        self.held[holder] = [set() for _ in range(TIER_COUNT)]
        self.ranks[holder] = (worker, rank)

    def serve(self, holder: int) -> int:
        """Returns the holder that is gone, or this one."""
        former = self.answering.get(self.ranks[holder], holder)
        if former != holder:
            self.close(former)
        self.answering[self.ranks[holder]] = holder
        return former

    def close(self, holder: int) -> None:
        del self.held[holder]
        rank = self.ranks.pop(holder)
        if self.answering.get(rank) == holder:
            del self.answering[rank]

    def match(
        self, query: Sequence[int], tiers: int, candidates: Collection[int] | None = None
    ) -> list[Answer]:
        answers = []
        for (worker, rank), holder in self.answering.items():
            if candidates is not None and worker not in candidates:
                continue
            having = [self.held[holder][tier] if tiers >> tier & 1 else set() for tier in range(TIER_COUNT)]
            count, counts = 0, [0] * TIER_COUNT
            for block in query:
                where = [block in each for each in having]
                if not any(where):
                    break
                count += 1
                counts = [known + there for known, there in zip(counts, where, strict=True)]
            if count:
                answers.append((worker, rank, count, tuple(counts)))
        return sorted(answers)


class IndexPair:
    """One index and the oracle, told the same."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.model = IndexModel()

    def open(self, worker: int, rank: int = 0, shadow: bool = False) -> int:
        make = self.index.open_shadow if shadow else self.index.open
        holder = make(worker, rank)
        self.model.open(holder, worker, rank)
        if not shadow:
            self.model.serve(holder)
        return holder

    def serve(self, holder: int) -> None:
        self.index.serve(holder)
        self.model.serve(holder)

    def close(self, holder: int) -> None:
        self.index.close(holder)
        self.model.close(holder)

    def store(self, holder: int, tier: int, run: Sequence[int], parent: int | None = None) -> None:
        assert self.index.store(holder, tier, blocks(run), parent) == 0
        self.model.held[holder][tier].update(run)

    def store_loose(self, holder: int, tier: int, some: Sequence[int]) -> None:
        assert self.index.store_loose(holder, tier, blocks(some)) == 0
        self.model.held[holder][tier].update(some)

    def store_runs(self, holder: int, tier: int, runs: Sequence[Sequence[int]]) -> None:
        joined = blocks(block for run in runs for block in run)
        assert self.index.store_runs(holder, tier, joined, array("H", map(len, runs))) == 0
        self.model.held[holder][tier].update(joined)

    def remove(self, holder: int, tier: int, some: Sequence[int]) -> None:
        held = self.model.held[holder][tier]
        assert self.index.remove(holder, tier, blocks(some)) == len(held & set(some))
        held.difference_update(some)

    def clear(self, holder: int, tier: int) -> None:
        self.index.clear(holder, tier)
        self.model.held[holder][tier].clear()

    def compare(self, query: Sequence[int], tiers: int = 15) -> None:
        assert answers(self.index.match(blocks(query), tiers).table) == self.model.match(query, tiers)

    def compare_chosen(self, query: Sequence[int], candidates: Sequence[int], limit: int) -> None:
        """The best of the candidates: the first ``limit`` by blocks, then by worker and rank."""
        chosen = array("I", candidates)
        full = self.model.match(query, 15, candidates)
        best = sorted(full, key=lambda answer: (-answer[2], answer[0], answer[1]))[:limit]
        assert answers(self.index.match(blocks(query), candidates=chosen).table) == full
        found = self.index.match(blocks(query), 15, chosen, limit)
        assert answers(found.table) == sorted(best)
        if len(full) > limit:
            assert list(found.workers) == [answer[0] for answer in best], "best first"
        twice = self.index.match_many(
            blocks([*query, *query]), blocks([len(query), 2 * len(query)]), 15, chosen, limit
        )
        assert twice.table.tobytes() == 2 * found.table.tobytes()

    def compare_held(self) -> None:
        for holder, tiers in self.model.held.items():
            for tier, held in enumerate(tiers):
                assert sorted(self.index.held(holder, tier)) == sorted(held)
                hashes, lengths = self.index.runs(holder, tier)
                assert sorted(hashes) == sorted(held) and sum(lengths) == len(held) and 0 not in lengths
                joined = 0
                for block in held:
                    joined ^= block
                assert self.index.digest(holder, tier) == (len(held), joined, sum(held) % (1 << 64))
        union = set().union(*(tier for tiers in self.model.held.values() for tier in tiers))
        stats = self.index.stats()
        assert stats["blocks"] == len(union) and stats["ghosts"] <= len(union)
        assert stats["members"] == sum(len(tier) for tiers in self.model.held.values() for tier in tiers)

    def reload(self, into: Index) -> None:
        """Everything into another index, as a snapshot does, and that one from now on."""
        former, held, ranks = self.index, self.model.held, self.model.ranks
        answering = set(self.model.answering.values())
        self.index, self.model = into, IndexModel()
        for holder in held:
            loaded = self.open(*ranks[holder], shadow=holder not in answering)
            for tier in range(TIER_COUNT):
                assert into.store_runs(loaded, tier, *former.runs(holder, tier)) == 0
                self.model.held[loaded][tier].update(held[holder][tier])

    def check(self) -> None:
        self.index.check()
        self.compare_held()


def answers(table: memoryview) -> list[Answer]:
    width = 3 + TIER_COUNT
    rows = [tuple(table[at : at + width]) for at in range(0, len(table), width)]
    return sorted((row[0], row[1], row[2], tuple(row[3:])) for row in rows)


def random_step(pair: IndexPair, generator: random.Random, depth: int) -> None:
    """One event of any kind, told to both, and one question."""
    prompt = path(
        [0] * generator.randrange(depth) + [generator.randrange(3) for _ in range(generator.randrange(depth))]
    )
    first = generator.randrange(len(prompt) + 1)
    last = generator.randrange(first, len(prompt) + 1)
    run, tier = prompt[first:last], generator.choice([0, 0, 0, 1, 2, 3])
    kind = generator.random()
    holders = list(pair.model.held)
    if kind < 0.03 or not holders:
        pair.open(generator.randrange(40), generator.randrange(2), shadow=generator.random() < 0.3)
    elif kind < 0.05:
        pair.serve(generator.choice(holders))
    elif kind < 0.06:
        pair.close(generator.choice(holders))
    elif kind < 0.08:
        pair.clear(generator.choice(holders), tier)
    elif kind < 0.6:
        known = first > 0 and generator.random() < 0.8
        pair.store(generator.choice(holders), tier, run, prompt[first - 1] if known else None)
    elif kind < 0.62:
        middle = len(run) // 2
        pair.store_runs(generator.choice(holders), tier, [run[middle:], [], run[:middle], run[:1]])
    elif kind < 0.65:
        pair.store_loose(generator.choice(holders), tier, generator.sample(run, len(run)))
    else:
        order = generator.choice([run, run[::-1], generator.sample(run, len(run)), run[:1]])
        pair.remove(generator.choice(holders), tier, order)
    pair.compare(prompt, generator.choice([15, 15, 15, 1, 6]))
    pair.compare_chosen(prompt, generator.sample(range(40), generator.randrange(40)), generator.randrange(6))
