"""What leaf-first LRU would have found is told exactly; who falls behind it leaves more to recency."""

from __future__ import annotations

import pytest

from kvcache.eviction.leaf_hazard import LeafHazard
from kvcache.eviction.lru_beside import LruBeside
from kvcache.eviction.reuse_times import ReuseTimes, Use
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.policy import TreeView

KIND = ReuseTimes(1.0).kind(())


def use(count: int) -> Use:
    return Use(KIND, count, 0, 1, 1.0)


class Noted(LruBeside):
    """Adds up what LRU was said to find."""

    def __init__(self) -> None:
        super().__init__()
        self.lru = self.mine = 0

    def found(self, mine: int, lru: int, asked: int) -> None:
        super().found(mine, lru, asked)
        self.lru += lru
        self.mine += mine
        if not self._turns % 20:
            self.check()


@pytest.mark.parametrize("percent", [0.5, 2, 10, 60])
def test_it_is_what_leaf_lru_finds_in_a_cache_of_its_own(percent: float) -> None:
    forest = Forest(generate(Workload(request_count=500, seed=3, turn_gap_s=20)))
    capacity = int(forest.trace.block_count * percent / 100)
    noted = Noted()

    def make(tree: TreeView, capacity_bytes: int) -> LeafHazard:
        policy = LeafHazard(tree, capacity_bytes)
        policy._lru = noted
        return policy

    learned = replay(forest, make, capacity)
    usual = replay(forest, "leaf-lru", capacity)
    assert noted.mine == learned.hit_blocks
    assert noted.lru == pytest.approx(usual.hit_blocks, rel=0.003)


def test_the_last_blocks_of_the_oldest_use_go_first() -> None:
    lru = LruBeside()
    old, young = use(6), use(5)
    for each in (old, young):
        lru.used(each)
        lru.end_request(8)
    assert [lru.held(old, count, 8) for count in (2, 3, 6)] == [2, 3, 3]
    assert lru.held(young, 5, 8) == 5
    third = use(3)
    lru.used(third)
    lru.end_request(8)
    assert lru.held(old, 6, 8) == 0
    assert lru.held(young, 5, 8) == 5
    lru.check()


def test_of_one_request_the_first_blocks_stay_longest() -> None:
    lru = LruBeside()
    first, second, behind = use(4), use(4), use(4)
    lru.used(first)
    lru.declined(behind)
    lru.used(second)
    lru.end_request(8)
    assert [lru.held(each, 4, 8) for each in (first, second, behind)] == [4, 4, 0]


def test_what_was_used_again_takes_no_room_where_it_was() -> None:
    lru = LruBeside()
    often, once = use(4), use(4)
    for each in (often, once):
        lru.used(each)
        lru.end_request(8)
    for _ in range(9):
        lru.lost(often, 4)
        often.count = 0
        often = use(4)
        lru.used(often)
        lru.end_request(8)
        assert lru.held(once, 4, 8) == 4
    lru.check()


def test_who_is_ahead_decides_and_who_is_behind_leaves_it_to_recency() -> None:
    lru = LruBeside()
    lru.found(900, 800, 100_000)
    assert not any(lru.is_due(1_000) for _ in range(100))
    lru.found(0, 175, 0)  # 75 behind; 150 is the slack.
    assert 10 <= sum(lru.is_due(1_000) for _ in range(100)) <= 15
    lru.found(0, 60, 0)
    assert 70 <= sum(lru.is_due(1_000) for _ in range(100)) <= 75
    lru.found(0, 900, 0)
    assert all(lru.is_due(1_000) for _ in range(100))
    lru.found(2_000, 0, 0)
    assert not any(lru.is_due(1_000) for _ in range(100))


def test_a_cache_that_is_never_full_costs_no_memory_for_what_was_used_again() -> None:
    lru = LruBeside()
    stays = use(3)
    lru.used(stays)
    last = use(2)
    lru.used(last)
    for _ in range(20_000):
        lru.lost(last, 2)
        last.count = 0
        last = use(2)
        lru.used(last)
        lru.end_request(0)
        assert len(lru._uses) <= 2_048
    assert lru.held(stays, 3, 0) == 3
    lru.check()
