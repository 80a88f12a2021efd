"""Samples of traces: prefixes stay prefixes, and the sample has its share of everything."""

from __future__ import annotations

import pytest

from kvcache.errors import BadInput
from kvcache.eviction.simulate.sample import RATE_MIN, enough, sample, uses_of
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.generate import Workload, generate
from tests.eviction.test_replay import tiny

FOREST = Forest(generate(Workload(request_count=1_500, seed=2)))


def test_uses_are_counted_along_every_path() -> None:
    assert uses_of(Forest(tiny([-1, 0, 0, 2], [1, 3, 3, 0, -1]))) == [4, 1, 2, 2]


@pytest.mark.parametrize("rate", [0.03, 0.1, 0.5])
def test_it_has_its_share(rate: float) -> None:
    small = sample(FOREST, rate, hot_share=1.0)
    trace = small.forest.trace
    assert small.rate == pytest.approx(rate, rel=0.02)
    assert trace.block_count == pytest.approx(rate * sum(map(bool, uses_of(FOREST))), abs=10)
    assert sum(trace.input_tokens) == pytest.approx(rate * sum(FOREST.trace.input_tokens), rel=0.05)
    assert (small.hot_blocks, small.hot_share) == (0, 0.0)
    assert small.cold_share == pytest.approx(1.0)
    assert small.capacity(1_000) == round(1_000 * small.rate)


def test_prefixes_stay_prefixes() -> None:
    """Of every prompt, the sample has a subsequence: the same one wherever two prompts begin alike."""
    small = sample(FOREST, 0.2).forest
    whole, cut = FOREST.trace, small.trace
    assert cut.request_count == whole.request_count
    at_block: dict[int, tuple[int, ...]] = {}
    for leaf, small_leaf in zip(whole.leaves, cut.leaves, strict=True):
        kept = tuple(cut.chain(small_leaf))
        assert len(kept) <= len(whole.chain(leaf))
        assert at_block.setdefault(leaf, kept) == kept
    assert any(len(kept) > 2 for kept in at_block.values())


def test_another_seed_draws_others() -> None:
    first, second = (sample(FOREST, 0.1, seed).forest.trace for seed in (1, 2))
    assert first.leaves != second.leaves
    assert sample(FOREST, 0.1, 1).forest.trace.leaves == first.leaves


def test_what_very_many_have_is_hot() -> None:
    # Block 0 is in all prompts, and so never in the sample.
    forest = Forest(tiny([-1, *([0] * 40)], [at % 40 + 1 for at in range(80)]))
    small = sample(forest, 0.5)
    assert small.hot_blocks == 1
    assert set(small.forest.parent) == {-1}
    assert small.hot_share == pytest.approx(79 / 160)
    assert small.cold_share == pytest.approx(80 / 160)
    assert small.ratio(1.0) == pytest.approx(159 / 160)
    assert small.capacity(21) == round(20 * small.rate)


@pytest.mark.parametrize(("share", "hot"), [(0.04, 0), (0.06, 1)])
def test_hot_is_what_more_than_a_twentieth_have(share: float, hot: int) -> None:
    count = 200
    leaves = [0] * int(share * count) + [at % 30 + 1 for at in range(count - int(share * count))]
    assert sample(Forest(tiny([-1] * 31, leaves)), 0.5).hot_blocks == hot


def test_the_whole_is_a_sample() -> None:
    small = sample(FOREST, 1.0)
    assert small.whole and small.forest is FOREST
    assert (small.capacity(77), small.ratio(0.25)) == (77, 0.25)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(BadInput, match="a sample of"):
        sample(FOREST, rate)


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="1 blocks"):
        sample(Forest(tiny([-1], [0])), 0.01)


def test_how_much_is_enough() -> None:
    assert enough(1_000_000) == RATE_MIN
    assert enough(1_000) == enough(0) == 1.0
    assert enough(100_000) == pytest.approx(0.08192)
