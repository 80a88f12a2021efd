"""Two tiers: nothing below is out of reach, what has a copy is not written again, and what may be is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.errors import BadInput
from kvcache.eviction.admission import DAY_S, RULES, parse_admission
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.simulate.spill import Below
from kvcache.eviction.simulate.tiers import TiersResult, TwoTiers, replay_tiers
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import read_trace

SHARED = Path(__file__).parents[3] / "shared" / "traces"
MADE = Forest(generate(Workload(request_count=500, block_tokens=64, seed=9)))


def tiers(memory: int, below: int, rule: str = "all", partial: bool = True, rate: float = 0) -> TiersResult:
    admission = parse_admission(rule)
    return replay_tiers(MADE, "leaf-lru", memory, Below(below, "leaf-lru", admission, partial, rate))


def test_a_lower_tier_without_end_finds_all_that_was_ever_there() -> None:
    endless = replay(MADE, "leaf-lru", len(MADE.parent))
    found = tiers(20, len(MADE.parent))
    assert found.whole.hit_tokens == endless.hit_tokens
    assert found.memory_hit_tokens == replay(MADE, "leaf-lru", 20).hit_tokens < endless.hit_tokens
    assert found.declined_blocks == 0


def test_what_has_a_copy_below_is_not_written_again() -> None:
    """However often blocks go up and come down: with room for all, each is written once at most."""
    found = tiers(20, len(MADE.parent))
    assert found.promoted_blocks > found.written_blocks // 2
    assert found.written_blocks <= len(MADE.parent)


def test_memory_that_is_large_enough_writes_nothing() -> None:
    found = tiers(len(MADE.parent), 10)
    assert (found.written_blocks, found.promoted_blocks, found.drive_writes_a_day) == (0, 0, 0)


def test_what_nobody_wanted_twice_is_not_written() -> None:
    every, twice = tiers(30, 200), tiers(30, 200, "touched>=2")
    assert 0 < twice.written_blocks < every.written_blocks
    assert twice.declined_blocks > 0
    assert tiers(30, 200, "touched>=1").written_blocks == every.written_blocks
    assert tiers(30, 200, "touched>=999").whole.hit_tokens == twice.memory_hit_tokens


def test_a_branch_that_came_back_is_written_whole() -> None:
    twice, branch = tiers(30, 400, "touched>=2"), tiers(30, 400, "branch-reused")
    assert twice.written_blocks < branch.written_blocks < tiers(30, 400).written_blocks
    assert branch.whole.hit_tokens > twice.whole.hit_tokens


def test_partial_blocks_are_not_written_unless_they_are_to() -> None:
    full = tiers(30, 200, partial=False)
    assert full.written_tokens == full.written_blocks * MADE.trace.block_tokens
    assert tiers(30, 200).written_tokens < tiers(30, 200).written_blocks * MADE.trace.block_tokens


def test_the_budget_is_kept() -> None:
    free, bound = tiers(30, 200), tiers(30, 200, rate=0.5)
    assert bound.written_blocks <= 0.5 * (bound.span_s + 60) + 1
    assert bound.written_blocks < free.written_blocks / 2
    assert free.drive_writes_a_day == pytest.approx(free.written_blocks / 200 * DAY_S / free.span_s)


@pytest.mark.slow
@given(
    seed=st.integers(0, 1 << 32),
    memory=st.integers(1, 40),
    below=st.integers(1, 60),
    rule=st.sampled_from(RULES),
    policy=st.sampled_from(["leaf-lru", "leaf-fifo"]),
    rate=st.sampled_from([0.0, 0.2]),
)
@settings(max_examples=100, deadline=None)
def test_nothing_is_ever_out_of_reach(
    seed: int, memory: int, below: int, rule: str, policy: str, rate: float
) -> None:
    forest = Forest(generate(Workload(request_count=30, block_tokens=200, seed=seed)))
    under = Below(below, policy, parse_admission(rule), rate > 0, rate)
    two = TwoTiers(forest, policy, memory, under, settings={}, hints=True)
    for index, leaf in enumerate(forest.trace.leaves):
        if leaf >= 0:
            two.serve(index, leaf)
        two.check()
        assert two.memory.tree.count <= memory
        assert two.spill.tree.count <= below
    assert not two.memory.guard.last_fault
    assert not two.spill.guard.last_fault


def test_what_is_no_rule_is_refused() -> None:
    for text in ("touched>=0", "touched", "", "always", "touched>=99999"):
        with pytest.raises(BadInput):
            parse_admission(text)
    for text in ("hazard=0%", "hazard=101%", "hazard=30", "hazard=%"):
        with pytest.raises(BadInput):
            parse_admission(text)
    assert parse_admission("touched>=3").touches == 3
    assert parse_admission("hazard").share == parse_admission("hazard=30%").share == 0.3
    with pytest.raises(BadInput):
        tiers(30, 0)
    with pytest.raises(BadInput, match="arc over two tiers"):
        replay_tiers(MADE, "arc", 30, Below(100))


@pytest.mark.slow
def test_learned_admission_keeps_most_hits_for_a_third_of_the_writes() -> None:
    path = SHARED / "mooncake_conversation_first_half.npz"
    if not path.exists():
        pytest.skip(f"NOT TESTED on a published trace: {path.name} is not beside the project")
    forest = Forest(read_trace(path))
    blocks = len(forest.parent)
    every, best = (
        replay_tiers(forest, "leaf-lru", blocks // 100, Below(blocks // 10, admission=parse_admission(rule)))
        for rule in ("all", "hazard=30%")
    )
    assert best.whole.hit_tokens > 0.94 * every.whole.hit_tokens
    assert best.written_blocks < 0.37 * every.written_blocks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rule", "partial", "hit", "written"),
    [
        ("mooncake_synthetic", "all", True, 0.275, 1.00),
        ("mooncake_synthetic", "all", False, 0.282, 0.98),
        ("mooncake_synthetic", "touched>=2", True, 0.289, 0.51),
        ("mooncake_synthetic", "branch-reused", True, 0.288, 0.52),
        ("lmcache_agent_b64", "all", True, 0.885, 0.89),
        ("lmcache_agent_b64", "touched>=2", True, 0.844, 0.49),
    ],
)
def test_another_simulator_says_about_the_same(
    name: str, rule: str, partial: bool, hit: float, written: float
) -> None:
    """At 1 % of the blocks in memory and 10 % below."""
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"NOT TESTED on a published trace: {path.name} is not beside the project")
    trace = read_trace(path)
    blocks = trace.block_count
    below = Below(blocks // 10, "leaf-lru", parse_admission(rule), partial)
    found = replay_tiers(trace, "leaf-lru", blocks // 100, below)
    assert found.whole.prefix_token_hit_ratio == pytest.approx(hit, abs=0.005)
    assert found.written_ratio == pytest.approx(written, abs=0.01)
