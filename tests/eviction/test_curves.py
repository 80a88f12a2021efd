"""Estimates from a sample are near what a replay of the whole gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcache.errors import BadInput
from kvcache.eviction.simulate.curves import EXACT, REPLAYED, SAMPLED, Estimator, unwatched
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import read_trace

SHARED = Path(__file__).parents[3] / "shared" / "traces"
MADE = Forest(generate(Workload(request_count=3_000, seed=9)))
POINTS = 0.02


def error(forest: Forest, estimator: Estimator, policy: str, blocks: int) -> float:
    truth = replay(forest, policy, blocks).prefix_token_hit_ratio
    return estimator.estimate(policy, blocks).prefix_token_hit_ratio - truth


def test_leaf_lru_is_exact() -> None:
    estimator = Estimator(MADE, 0.1)
    found = estimator.estimate("leaf-lru", 500)
    assert found.how == EXACT
    assert found.prefix_token_hit_ratio == replay(MADE, "leaf-lru", 500).prefix_token_hit_ratio


def test_the_optimum_is_near() -> None:
    assert abs(error(MADE, Estimator(MADE, 0.1), "belady", MADE.trace.block_count // 30)) <= POINTS


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["leaf-hazard", "leaf-arc", "arc-rev", "belady"])
def test_others_are_near(policy: str) -> None:
    estimator = Estimator(MADE, 0.2)
    for percent in (3, 10, 30):
        assert abs(error(MADE, estimator, policy, MADE.trace.block_count * percent // 100)) <= POINTS


def test_shards_is_near() -> None:
    estimator = Estimator(MADE, 0.2)
    for percent in (3, 10, 30):
        blocks = MADE.trace.block_count * percent // 100
        found = estimator.shards(blocks)
        exact = estimator.exact.prefix_token_hit_ratio(blocks)
        assert found.how == SAMPLED
        assert found.prefix_token_hit_ratio == pytest.approx(exact, abs=POINTS)


def test_a_sample_of_all_is_a_replay() -> None:
    forest = Forest(generate(Workload(request_count=200, seed=9)))
    found = Estimator(forest).estimate("leaf-arc", 50)
    assert found.how == REPLAYED
    assert found.prefix_token_hit_ratio == replay(forest, "leaf-arc", 50).prefix_token_hit_ratio


def test_no_estimate_is_beyond_what_can_be_found() -> None:
    estimator = Estimator(MADE, 0.05)
    most = estimator.exact.prefix_token_hit_ratio(1 << 30)
    assert estimator.estimate("belady", MADE.trace.block_count).prefix_token_hit_ratio <= most


def test_settings_and_names_are_checked() -> None:
    estimator = Estimator(MADE)
    with pytest.raises(BadInput, match="no policy is called"):
        estimator.estimate("leaf-lro", 5)
    with pytest.raises(BadInput, match="no setting"):
        estimator.estimate("leaf-lru", 5, {"depth": 1})
    assert unwatched("", 1) is None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", ["leaf-hazard", "leaf-arc", "arc-rev", "s3-fifo-rev", "belady"])
@pytest.mark.parametrize(
    "name", ["mooncake_conversation_first_half", "mooncake_synthetic", "lmcache_agent_b64"]
)
def test_the_public_traces_are_predicted(name: str, policy: str) -> None:
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} IS NOT THERE")
    forest = Forest(read_trace(path))
    estimator = Estimator(forest)
    for percent in (1, 3, 10, 30):
        blocks = forest.trace.block_count * percent // 100
        assert abs(error(forest, estimator, policy, blocks)) <= POINTS, percent
