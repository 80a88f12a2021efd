"""The policies of the literature: each does what its paper says, and none holds more than it may."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from kvcache.errors import BadInput
from kvcache.eviction.reference.blocks import BLOCK_POLICIES, BlockPolicy
from kvcache.eviction.reference.tinylfu import Sketch
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.generate import Workload, generate

MADE = Forest(generate(Workload(request_count=400, block_tokens=64, seed=5)))


def used(name: str, capacity: int, blocks: Sequence[int]) -> BlockPolicy:
    policy = BLOCK_POLICIES[name](capacity)
    for block in blocks:
        policy.use(block)
    return policy


def held(policy: BlockPolicy) -> set[int]:
    return {block for block in range(100) if block in policy}


@pytest.mark.parametrize("name", [name for name in BLOCK_POLICIES if not name.endswith("-rev")])
@pytest.mark.parametrize("capacity", [1, 2, 7, 40])
def test_never_more_than_it_may_and_it_knows_what_it_has(name: str, capacity: int) -> None:
    policy, random = BLOCK_POLICIES[name](capacity), Random(capacity)
    for _ in range(3_000):
        block = min(random.randrange(100), random.randrange(100))
        expected = block in policy
        assert policy.use(block) == expected
        assert len(policy) == len(held(policy)) <= capacity


def test_fifo_forgets_uses_and_lru_does_not() -> None:
    assert held(used("fifo", 2, [1, 2, 1, 3])) == {2, 3}
    assert held(used("lru", 2, [1, 2, 1, 3])) == {1, 3}


def test_sieve_passes_over_what_was_used_and_the_hand_stays_where_it_was() -> None:
    """1 is passed over, 2 goes; then the hand looks at 3 before it comes back to 1."""
    assert held(used("sieve", 3, [1, 2, 3, 1, 4])) == {1, 3, 4}
    assert held(used("sieve", 3, [1, 2, 3, 1, 4, 5])) == {1, 4, 5}


def test_s3_fifo_lets_a_scan_through_the_small_queue_only() -> None:
    assert held(used("s3-fifo", 20, [1, 2, 1, 2, 1, 2, *range(10, 90)])) >= {1, 2}
    assert not held(used("lru", 20, [1, 2, 1, 2, 1, 2, *range(10, 90)])) & {1, 2}


def test_s3_fifo_remembers_what_it_let_go() -> None:
    scan = list(range(10, 40))
    policy = used("s3-fifo", 20, [1, *scan, 1])  # The second time, the ghost knows it.
    for block in range(50, 90):
        policy.use(block)
    assert 1 in policy


def test_arc_keeps_what_was_used_twice_over_a_scan() -> None:
    assert held(used("arc", 4, [1, 1, 2, 2, *range(10, 30)])) >= {1, 2}


def test_w_tinylfu_takes_only_what_is_asked_for_more() -> None:
    loop = [1, 2, 3, 4] * 5
    assert held(used("w-tinylfu", 5, [*loop, *range(10, 90)])) >= {1, 2, 3, 4}


def test_a_sketch_counts_and_forgets() -> None:
    sketch = Sketch(8)
    for _ in range(10):
        sketch.add(3)
    assert sketch.count(3) == 10
    assert sketch.count(4) == 0
    for _ in range(10 * 8 - 10):
        sketch.add(5)
    assert sketch.count(3) == 5


@pytest.mark.parametrize("name", list(BLOCK_POLICIES))
def test_none_beats_the_optimum(name: str) -> None:
    for capacity in (5, 50, 200):
        best = replay(MADE, "belady", capacity)
        assert replay(MADE, name, capacity).hit_blocks <= best.hit_blocks


def test_lru_from_the_end_is_leaf_first_lru() -> None:
    for capacity in (3, 30, 300):
        ours, theirs = replay(MADE, "leaf-lru", capacity), replay(MADE, "lru-rev", capacity)
        assert (ours.hit_tokens, ours.hit_blocks) == (theirs.hit_tokens, theirs.hit_blocks)


def test_they_have_no_settings() -> None:
    with pytest.raises(BadInput, match="sieve has no setting 'hand'"):
        replay(MADE, "sieve", 10, settings={"hand": 1})
