"""Leaf-hazard on published traces: what it closes of the gap to the optimum, and that it costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.trace import read_trace

SHARED = Path(__file__).parents[3] / "shared" / "traces"
CELLS = [
    ("mooncake_conversation_first_half", 1, 0.23),
    ("mooncake_conversation_first_half", 3, 0.28),
    ("mooncake_conversation_first_half", 10, 0.09),
    ("claude_code_dev", 1, 0.55),
    ("claude_code_dev", 3, 0.30),
    ("lmcache_agent_b64", 1, 0.25),
    ("mooncake_synthetic", 30, 0.10),
]
NO_LOSS = [
    ("mooncake_conversation_first_half", 30),
    ("mooncake_synthetic", 1),
    ("mooncake_synthetic", 3),
    ("mooncake_synthetic", 10),
    ("claude_code_dev", 10),
    ("claude_code_dev", 30),
    ("lmcache_agent_b64", 3),
    ("lmcache_agent_b64", 10),
    ("lmcache_agent_b64", 30),
]


def hits(name: str, percent: int, *policies: str) -> list[float]:
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"NOT TESTED on a published trace: {path.name} is not beside the project")
    forest = Forest(read_trace(path))
    capacity = len(forest.parent) * percent // 100
    results = [replay(forest, policy, capacity) for policy in policies]
    assert not any(result.policy_fault for result in results)
    return [result.prefix_token_hit_ratio for result in results]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "percent", "share"), CELLS)
def test_so_much_of_the_gap_is_closed(name: str, percent: int, share: float) -> None:
    usual, learned, best = hits(name, percent, "leaf-lru", "leaf-hazard", "belady")
    assert learned - usual >= share * (best - usual)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "percent"), NO_LOSS)
def test_it_is_never_worse_by_more_than_a_fifth_of_a_point(name: str, percent: int) -> None:
    usual, learned = hits(name, percent, "leaf-lru", "leaf-hazard")
    assert learned >= usual - 0.002
