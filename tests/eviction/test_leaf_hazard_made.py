"""Leaf-hazard on made-up traces that teach nothing: it is a fifth of a point below leaf-LRU at most."""

from __future__ import annotations

from array import array
from dataclasses import replace
from random import Random

import pytest

from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import Trace

BLOCK_TOKENS = 16
GROWTH = 4


def memoryless(seed: int, sessions: int = 1_500) -> Trace:
    """Sessions that may end at any turn, and come back at any time: what was, says nothing."""
    random = Random(seed)
    asked: list[tuple[float, int, int]] = []
    for session in range(sessions):
        at_ms, turn = random.uniform(0, 3_600_000), 1
        while turn == 1 or random.random() > 0.2:
            asked.append((at_ms, session, turn))
            at_ms += random.expovariate(1 / 60_000)
            turn += 1
    asked.sort()
    return _grown(asked)


def _grown(asked: list[tuple[float, int, int]]) -> Trace:
    """A session's prompt has ``GROWTH`` blocks more each turn."""
    parents, leaves, lasts = array("i"), array("i"), dict[int, int]()
    for _, session, _ in asked:
        for _ in range(GROWTH):
            parents.append(lasts.get(session, -1))
            lasts[session] = len(parents) - 1
        leaves.append(lasts[session])
    return Trace(
        BLOCK_TOKENS,
        parents,
        array("H", [BLOCK_TOKENS]) * len(parents),
        leaves,
        array("q", [int(at_ms) for at_ms, _, _ in asked]),
        array("i", [turn * GROWTH * BLOCK_TOKENS for _, _, turn in asked]),
        array("i", bytes(4 * len(asked))),
        array("i", [session for _, session, _ in asked]),
        array("B", bytes(len(asked))),
        ("unknown",),
    )


def below_leaf_lru(trace: Trace, percent: float, **settings: float) -> float:
    """By how much of the hit ratio."""
    forest = Forest(trace)
    capacity = int(len(forest.parent) * percent / 100)
    usual = replay(forest, "leaf-lru", capacity)
    learned = replay(forest, "leaf-hazard", capacity, settings=settings)
    assert not learned.policy_fault
    return usual.prefix_token_hit_ratio - learned.prefix_token_hit_ratio


@pytest.mark.slow
@pytest.mark.parametrize("decline", [0, 1])
@pytest.mark.parametrize(("seed", "percent"), [(1, 1), (1, 3), (3, 3), (3, 5)])
def test_gaps_that_say_nothing(seed: int, percent: float, decline: float) -> None:
    assert below_leaf_lru(memoryless(seed), percent, decline=decline) <= 0.002


@pytest.mark.parametrize("instant_ms", [0, 5])
@pytest.mark.parametrize("percent", [3, 30])
def test_where_no_time_passes_it_is_leaf_lru(instant_ms: int, percent: float) -> None:
    trace = generate(Workload(request_count=600, seed=2))
    trace = replace(trace, arrivals_ms=array("q", [instant_ms]) * trace.request_count)
    assert below_leaf_lru(trace, percent) == 0
