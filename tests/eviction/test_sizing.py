"""What is named is enough, and what is clearly less is not."""

from __future__ import annotations

import pytest

from kvcache.errors import BadInput
from kvcache.eviction.admission import ALL, parse_admission
from kvcache.eviction.advise.sizing import Goal, Option, Sizer, _least
from kvcache.eviction.simulate.curves import Estimator
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.simulate.spill import Below
from kvcache.eviction.simulate.tiers import replay_tiers
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.generate import Workload, generate

FOREST = Forest(generate(Workload(request_count=250, seed=5, block_tokens=64, arrivals_a_second=0.1)))
WHOLE = Estimator(FOREST, 1.0)
MOST = WHOLE.most


def found_by(option: Option, nvme_blocks: int) -> tuple[float, float]:
    assert option.admission is not None
    below = Below(nvme_blocks, admission=option.admission, blocks_a_second=option.budget_blocks_a_second)
    result = replay_tiers(FOREST, option.policy, option.memory_blocks, below)
    return result.whole.prefix_token_hit_ratio, result.drive_writes_a_day


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["leaf-lru", "leaf-arc"])
def test_memory_alone_is_the_least(policy: str) -> None:
    goal = 0.8 * MOST
    option = Sizer(WHOLE, Goal(goal)).memory(policy)
    assert option.confirmed and option.admission is None
    assert replay(FOREST, policy, option.memory_blocks).prefix_token_hit_ratio == option.ratio >= goal
    assert replay(FOREST, policy, int(option.memory_blocks * 0.94)).prefix_token_hit_ratio < goal


@pytest.mark.slow
def test_a_drive_is_large_enough_to_find_enough() -> None:
    goal = Goal(0.9 * MOST, drive_writes_a_day=1e6)
    option = Sizer(WHOLE, goal).nvme("leaf-lru", 20, ALL, budget=False)
    assert option is not None and option.confirmed
    assert found_by(option, option.nvme_blocks) == (option.ratio, option.drive_writes_a_day)
    assert option.ratio >= goal.ratio > found_by(option, int(option.nvme_blocks * 0.9))[0]


@pytest.mark.slow
def test_a_drive_is_large_enough_to_bear_what_is_written() -> None:
    option = Sizer(WHOLE, Goal(0.5 * MOST, drive_writes_a_day=2.0)).nvme("leaf-lru", 20, ALL, budget=False)
    assert option is not None
    assert option.nvme_blocks > FOREST.trace.block_count
    assert 1.9 < option.drive_writes_a_day <= 2.0 < found_by(option, int(option.nvme_blocks * 0.9))[1]
    assert option.written_blocks_a_second == pytest.approx(2.0 * option.nvme_blocks / 86_400, rel=0.05)


@pytest.mark.slow
def test_with_a_write_budget_a_smaller_drive_does() -> None:
    sizer = Sizer(WHOLE, Goal(0.3 * MOST, drive_writes_a_day=2.0))
    plain = sizer.nvme("leaf-lru", 20, ALL, budget=False)
    thrifty = sizer.nvme("leaf-lru", 20, ALL, budget=True)
    assert plain is not None and thrifty is not None
    assert thrifty.nvme_blocks < plain.nvme_blocks
    assert thrifty.drive_writes_a_day <= 2.0 and thrifty.ratio >= 0.3 * MOST
    assert thrifty.budget_blocks_a_second == pytest.approx(0.95 * 2.0 * thrifty.nvme_blocks / 86_400)


@pytest.mark.slow
def test_a_sample_gives_about_the_same_size() -> None:
    larger = Forest(generate(Workload(request_count=900, seed=5, block_tokens=64, arrivals_a_second=0.1)))
    goal = Goal(0.9 * Estimator(larger).most, drive_writes_a_day=1e6)
    sizes = []
    for rate in (0.3, 1.0):
        option = Sizer(Estimator(larger, rate), goal).nvme("leaf-lru", 100, ALL, budget=False)
        assert option is not None and option.confirmed == (rate == 1.0)
        sizes.append(option.nvme_blocks)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_a_rule_that_never_finds_enough_has_no_size() -> None:
    sizer = Sizer(WHOLE, Goal(MOST))
    assert sizer.nvme("leaf-lru", 20, parse_admission("touched>=9"), budget=False) is None


def test_what_the_sample_says_is_confirmed_on_the_whole() -> None:
    goal = 0.7 * MOST
    sizer = Sizer(Estimator(FOREST, 0.5), Goal(goal))
    confirmed = sizer.confirm(Option("leaf-lru", 1))
    assert not confirmed.confirmed and 1 < confirmed.memory_blocks < 20
    least = WHOLE.exact.least_blocks(goal)
    confirmed = sizer.confirm(Option("leaf-lru", int(least * 0.9)))
    assert confirmed.confirmed and confirmed.ratio >= goal
    drive = Option("leaf-lru", 20, int(least * 1.2), ALL, budget_blocks_a_second=0.0)
    grown = Sizer(Estimator(FOREST, 0.5), Goal(goal, 1e6)).confirm(drive)
    assert grown.confirmed and grown.nvme_blocks >= drive.nvme_blocks


@pytest.mark.parametrize(
    ("ratio", "what"), [(MOST + 0.001, "cannot be had at any size"), (0.0, "0.0%"), (1.5, "150")]
)
def test_a_goal_that_cannot_be_met_is_refused(ratio: float, what: str) -> None:
    with pytest.raises(BadInput, match=what):
        Sizer(WHOLE, Goal(ratio))


@pytest.mark.parametrize("edge", [1, 2, 3, 50, 999, 1_000])
def test_the_least_is_found(edge: int) -> None:
    found = _least(1, 1_000, lambda size: size >= edge)
    assert edge <= found <= max(edge * 1.03, edge)
