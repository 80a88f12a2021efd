"""Replays: what is counted, by hand and by a second, slow way of counting; and the tree they run on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path as FilePath
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.errors import BadInput
from kvcache.eviction.leaf_lru import LeafLru
from kvcache.eviction.simulate.replay import LeafCache, replay
from kvcache.eviction.simulate.tree import NONE, Forest, Path
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import Trace, read_trace
from kvcache.policy import RequestContext

SHARED = FilePath(__file__).parents[3] / "shared" / "traces"
PERCENTS = (1, 3, 10, 30)
REFERENCE = {  # Prefix-token hit ratios of another simulator, at 1, 3, 10 and 30 % of the blocks.
    "mooncake_conversation_first_half": {
        "fifo": (0.0429, 0.0637, 0.1867, 0.2967),
        "leaf-lru": (0.0443, 0.0664, 0.2125, 0.3221),
        "arc-rev": (0.0525, 0.0891, 0.2164, 0.3132),
        "s3-fifo-rev": (0.0566, 0.0921, 0.1944, 0.3119),
        "belady": (0.1922, 0.2921, 0.3520, 0.3520),
    },
    "mooncake_synthetic": {
        "fifo": (0.0368, 0.1016, 0.2512, 0.4684),
        "leaf-lru": (0.0388, 0.1086, 0.2673, 0.4968),
        "lru": (0.0350, 0.1030, 0.2647, 0.4966),
        "lru-rev": (0.0388, 0.1086, 0.2673, 0.4968),
        "arc": (0.0371, 0.1055, 0.2668, 0.5168),
        "arc-rev": (0.0430, 0.1120, 0.2715, 0.5173),
        "s3-fifo": (0.0362, 0.1031, 0.2628, 0.4926),
        "s3-fifo-rev": (0.0391, 0.1117, 0.2658, 0.4939),
        "sieve": (0.0183, 0.0588, 0.1795, 0.4580),
        "sieve-rev": (0.0192, 0.0606, 0.1803, 0.4609),
        "belady": (0.1889, 0.3201, 0.5156, 0.6512),
    },
    "claude_code_dev": {
        "fifo": (0.1933, 0.5790, 0.8828, 0.9486),
        "leaf-lru": (0.2223, 0.6606, 0.9363, 0.9592),
        "belady": (0.5375, 0.8263, 0.9549, 0.9605),
    },
    "lmcache_agent_b64": {
        "fifo": (0.2227, 0.5525, 0.8694, 0.8858),
        "leaf-lru": (0.4486, 0.6975, 0.8850, 0.8881),
        "lru": (0.2297, 0.5687, 0.8847, 0.8881),
        "lru-rev": (0.4486, 0.6975, 0.8850, 0.8881),
        "arc": (0.2262, 0.5475, 0.8765, 0.8828),
        "arc-rev": (0.3952, 0.6947, 0.8821, 0.8863),
        "s3-fifo": (0.2373, 0.5450, 0.8428, 0.8841),
        "s3-fifo-rev": (0.2979, 0.6229, 0.8609, 0.8841),
        "sieve": (0.0758, 0.2880, 0.5427, 0.8066),
        "sieve-rev": (0.1447, 0.2597, 0.3717, 0.7662),
        "belady": (0.4986, 0.7409, 0.8864, 0.8882),
    },
}


def tiny(parents: Sequence[int], leaves: Sequence[int], last_tokens: int = 10) -> Trace:
    """Blocks of 10 tokens; those without children have ``last_tokens``. A request every second."""
    tokens = [10 if block in parents else last_tokens for block in range(len(parents))]
    lengths = []
    for leaf in leaves:
        length, block = 0, leaf
        while block >= 0:
            length, block = length + tokens[block], parents[block]
        lengths.append(length)
    count = len(leaves)
    return Trace(
        block_tokens=10,
        parents=array("i", parents),
        tokens=array("H", tokens),
        leaves=array("i", leaves),
        arrivals_ms=array("q", range(0, 1_000 * count, 1_000)),
        input_tokens=array("i", lengths),
        output_tokens=array("i", [1] * count),
        sessions=array("i", [-1] * count),
        kind_indexes=array("B", [0] * count),
        kinds=("tool_use",),
    )


CHAIN = tiny([-1, 0, 1], [2, 2, 1])


def test_the_whole_prompt_is_found_again() -> None:
    result = replay(CHAIN, "leaf-lru", 3)
    assert (result.blocks, result.hit_blocks) == (8, 5)
    assert (result.prompt_tokens, result.hit_tokens) == (80, 50)
    assert result.block_hit_ratio == result.prefix_token_hit_ratio == 5 / 8
    assert (result.admitted_blocks, result.evicted_blocks) == (3, 0)


def test_what_does_not_fit_is_cut_at_the_end() -> None:
    result = replay(CHAIN, "leaf-lru", 2)
    assert result.hit_blocks == 4
    assert (result.admitted_blocks, result.evicted_blocks) == (2, 0)


def test_a_partial_block_takes_a_place_and_counts_its_tokens() -> None:
    result = replay(tiny([-1, 0], [1, 1], last_tokens=3), "leaf-lru", 2)
    assert (result.hit_tokens, result.prompt_tokens) == (13, 26)
    assert replay(tiny([-1, 0], [1, 1], last_tokens=3), "leaf-lru", 1).hit_tokens == 10


def test_later_tokens_save_more() -> None:
    result = replay(CHAIN, "leaf-lru", 3)
    assert (result.hit_squared, result.prompt_squared) == (30**2 + 20**2, 30**2 + 30**2 + 20**2)
    assert result.flops_saved(10) == pytest.approx((50 + 1300 / 20) / (80 + 2200 / 20))
    assert result.flops_saved(1e12) == pytest.approx(result.prefix_token_hit_ratio)


def test_an_empty_prompt_is_a_request_all_the_same() -> None:
    result = replay(tiny([-1], [-1, 0, 0]), "leaf-lru", 1)
    assert (result.requests, result.hit_tokens) == (3, 10)


def test_no_room_for_a_block_is_refused() -> None:
    with pytest.raises(BadInput, match="0 blocks"):
        replay(CHAIN, "leaf-lru", 0)


def test_a_policy_that_breaks_its_contract_is_replaced_and_reported() -> None:
    class Wrong(LeafLru):
        def victims(self, context: RequestContext, count: int) -> Sequence[int]:
            return [0]

    trace = tiny([-1, 0, -1, -1], [1, 2, 3, 1])
    result = replay(trace, Wrong, 2)
    assert "no leaf" in result.policy_fault
    assert result.hit_blocks == replay(trace, "leaf-lru", 2).hit_blocks


def test_hints_reach_the_policy_unless_they_are_not_to() -> None:
    class Told(LeafLru):
        hints: list[str]

        def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
            self.hints.append(context.hint)

    for hints, expected in ((True, "tool_call"), (False, "unknown")):
        Told.hints = []
        replay(CHAIN, Told, 3, hints=hints)
        assert Told.hints == [expected] * 3


def test_settings_are_the_policys_own() -> None:
    with pytest.raises(BadInput, match="no setting 'depth'"):
        replay(CHAIN, "leaf-lru", 3, settings={"depth": 1})


def slow_leaf_lru(trace: Trace, capacity: int) -> int:
    """Hit blocks, counted the long way: last use of each block, leaf by leaf."""
    used: dict[int, int] = {}
    hits = 0
    for now, leaf in enumerate(trace.leaves):
        path = trace.chain(leaf)
        hit = 0
        while hit < len(path) and path[hit] in used:
            hit += 1
        hits += hit
        used.update(dict.fromkeys(path[:hit], now))
        for block in path[hit:]:
            parents = {trace.parents[each] for each in used}
            leaves = [each for each in used if each not in parents and used[each] < now]
            if len(used) == capacity:
                if not leaves:
                    break
                del used[min(leaves, key=lambda each: used[each])]
            used[block] = now
    return hits


workloads = st.builds(
    Workload,
    request_count=st.integers(1, 25),
    block_tokens=st.integers(60, 400),
    seed=st.integers(0, 1 << 32),
    session_share=st.sampled_from([0.0, 0.5, 1.0]),
    fan_out_share=st.just(0.0),
)


@given(workload=workloads, capacity=st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_leaf_lru_is_what_it_says(workload: Workload, capacity: int) -> None:
    trace = generate(workload)
    assert replay(trace, "leaf-lru", capacity).hit_blocks == slow_leaf_lru(trace, capacity)


@pytest.mark.parametrize("capacity", [1, 7, 60])
def test_the_tree_is_sound_after_every_request(capacity: int) -> None:
    forest = Forest(generate(Workload(request_count=60, block_tokens=100, seed=3)))
    cache = LeafCache(forest, LeafLru, capacity)
    random = Random(1)
    for index, leaf in enumerate(forest.trace.leaves):
        cache.serve(RequestContext(now_ns=index), leaf)
        cache.tree.check()
        assert cache.tree.count <= capacity
        assert all(cache.tree.is_evictable(block) for block in cache.tree.sample_leaves(3, random))
    assert cache.admitted - cache.evicted == cache.tree.count


def test_a_path_is_a_sequence_like_any_other() -> None:
    parents = [-1, 0, 1]
    assert list(Path(parents, 2)) == [0, 1, 2]
    assert Path(parents, 2)[-1] == 2
    assert Path(parents, 2)[-1:] == [2]
    assert Path(parents, 2)[:2] == [0, 1]
    assert len(Path(parents, 2)) == 3
    assert Path(parents, 0)
    assert not Path(parents, NONE)
    assert len(Path(parents, NONE)) == 0
    assert Path(parents, NONE)[-1:] == []
    with pytest.raises(IndexError):
        Path(parents, NONE)[-1]


def shared(name: str) -> Trace:
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"NOT TESTED on a published trace: {path.name} is not beside the project")
    return read_trace(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy"), [(name, policy) for name in REFERENCE for policy in REFERENCE[name]]
)
def test_another_simulator_says_the_same(name: str, policy: str) -> None:
    forest = Forest(shared(name))
    blocks = forest.trace.block_count
    found = [replay(forest, policy, blocks * percent // 100) for percent in PERCENTS]
    assert tuple(round(each.prefix_token_hit_ratio, 4) for each in found) == REFERENCE[name][policy]


@pytest.mark.slow
def test_the_share_of_blocks_is_theirs_too() -> None:
    """Of blocks found anywhere in the prompt, which is more than its leading part."""
    forest = Forest(shared("lmcache_agent_b64"))
    expected = {"fifo": 0.4492, "lru": 0.4524, "arc": 0.4460, "s3-fifo": 0.3952, "sieve": 0.1442}
    found = {name: round(replay(forest, name, 61).block_hit_ratio, 4) for name in expected}
    assert found == expected
