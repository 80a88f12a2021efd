"""The curve of leaf-lru is what replaying leaf-lru gives, at every size."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings

from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.simulate.stack_curve import stack_curve
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import Trace, read_trace
from tests.eviction.test_replay import tiny, workloads

SHARED = Path(__file__).parents[3] / "shared" / "traces"


@given(workload=workloads)
@settings(max_examples=40)
def test_it_is_what_replays_give(workload: Workload) -> None:
    trace = generate(workload)
    curve = stack_curve(Forest(trace))
    for capacity in {1, 2, 3, 7, 20, 61, trace.block_count}:
        result = replay(trace, "leaf-lru", capacity)
        assert curve.prefix_token_hit_ratio(capacity) == result.prefix_token_hit_ratio
        assert curve.block_hit_ratio(capacity) == result.block_hit_ratio


def test_by_hand() -> None:
    # The stack is 0 1 2 after the first and second, 0 3 1 2 after the third; the last finds 1 in place three.
    curve = stack_curve(Forest(tiny([-1, 0, 1, 0], [2, 2, 3, 2])))
    assert list(curve.hit_blocks) == [0, 3, 4, 6, 7]


def test_a_partial_block_counts_its_tokens() -> None:
    curve = stack_curve(Forest(tiny([-1, 0], [1, 1], last_tokens=3)))
    assert list(curve.hit_tokens) == [0, 10, 13]


def test_the_least_size_that_finds_so_much() -> None:
    curve = stack_curve(Forest(generate(Workload(request_count=300, seed=4))))
    most = curve.prefix_token_hit_ratio(1 << 30)
    for ratio in (0.1 * most, 0.5 * most, most):
        least = curve.least_blocks(ratio)
        assert curve.prefix_token_hit_ratio(least) >= ratio > curve.prefix_token_hit_ratio(least - 1)
    assert curve.least_blocks(most + 0.001) == 0


def test_empty_prompts_and_no_requests() -> None:
    assert stack_curve(Forest(tiny([-1], [-1, -1]))).prefix_token_hit_ratio(1) == 0.0
    empty = Trace(10, *(array(code) for code in "iHiqiiiB"))
    assert stack_curve(Forest(empty)).prefix_token_hit_ratio(1) == 0.0


def test_progress_is_told() -> None:
    told: list[int] = []
    stack_curve(Forest(tiny([-1], [0, 0, 0])), told.append)
    assert told == [1, 2, 3]


@pytest.mark.slow
def test_the_public_traces() -> None:
    paths = sorted(SHARED.glob("*.npz"))
    if not paths:
        pytest.skip(f"THE PUBLIC TRACES ARE NOT IN {SHARED}")
    for path in paths:
        forest = Forest(read_trace(path))
        curve = stack_curve(forest)
        for percent in (1, 10):
            blocks = forest.trace.block_count * percent // 100
            result = replay(forest, "leaf-lru", blocks)
            assert curve.hit_tokens[blocks] == result.hit_tokens
            assert curve.hit_blocks[blocks] == result.hit_blocks
