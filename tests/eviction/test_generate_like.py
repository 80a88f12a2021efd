"""Requests like those of another trace: how alike, in figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcache.errors import BadInput
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.generate_like import fit, generate_like
from kvcache.eviction.traces.shape import Shape, shape_of
from kvcache.eviction.traces.trace import Trace, read_trace

REAL = Path(__file__).parents[3] / "shared" / "traces"
SIZES = {0.01: 0.05, 0.03: 0.035, 0.1: 0.02, 0.3: 0.02}
"""Share of the unique blocks in the cache, and how far leaf-lru's hit ratio may be off there."""


def cumulative(shape: Shape) -> list[float]:
    """The share of blocks found again within each time."""
    shares, total = [], 0.0
    for share in shape.reuse.values():
        total += share
        shares.append(total)
    return shares


def assert_alike(trace: Trace, other: Trace) -> None:
    """Within what docs/traces.md states."""
    one, two = shape_of(trace), shape_of(other)
    assert other.request_count == trace.request_count
    assert two.span_s == pytest.approx(one.span_s, rel=0.02, abs=1)
    assert two.ideal_token_hit == pytest.approx(one.ideal_token_hit, abs=0.01)
    assert two.blocks == pytest.approx(one.blocks, rel=0.02)
    assert two.unique_blocks == pytest.approx(one.unique_blocks, rel=0.02)
    for name in ("p50", "p90"):
        assert two.prompt_depth[name] == pytest.approx(one.prompt_depth[name], rel=0.25, abs=600), name
        assert two.new_tokens[name] == pytest.approx(one.new_tokens[name], rel=0.05, abs=50), name
    for before, after in zip(cumulative(one), cumulative(two), strict=True):
        assert after == pytest.approx(before, abs=0.12)
    for share, tolerance in SIZES.items():
        capacity = int(one.unique_blocks * share)
        hits = [replay(each, "leaf-lru", capacity).prefix_token_hit_ratio for each in (trace, other)]
        assert hits[1] == pytest.approx(hits[0], abs=tolerance), share


def assert_no_clone(trace: Trace, other: Trace) -> None:
    """What it shares with whom is drawn anew."""
    same = sum(
        one.prompt_tokens == two.prompt_tokens
        for one, two in zip(trace.requests(), other.requests(), strict=True)
    )
    assert same < trace.request_count / 2


@pytest.mark.slow
def test_it_is_like_a_trace_of_ours() -> None:
    trace = generate(Workload(request_count=1_500, seed=3))
    other = generate_like(fit(trace), trace.request_count)
    assert_alike(trace, other)
    assert_no_clone(trace, other)
    assert other.kinds == trace.kinds
    assert generate_like(fit(trace), 1_500) == other
    assert generate_like(fit(trace), 1_500, seed=2) != other


@pytest.mark.slow
def test_more_or_fewer_requests_come_at_the_same_rate() -> None:
    trace = generate(Workload(request_count=600, seed=3))
    for count in (200, 1_800):
        other = shape_of(generate_like(fit(trace), count))
        assert other.requests_a_second == pytest.approx(shape_of(trace).requests_a_second, rel=0.2)
        assert other.ideal_token_hit == pytest.approx(shape_of(trace).ideal_token_hit, abs=0.06)


def test_one_request_and_prompts_without_blocks() -> None:
    trace = generate(Workload(request_count=1))
    other = generate_like(fit(trace), 3)
    assert [request.prompt_tokens for request in other.requests()] == [trace.request(0).prompt_tokens] * 3
    assert len({request.blocks[0] for request in other.requests()}) == 3
    with pytest.raises(BadInput, match="0 requests"):
        generate_like(fit(trace), 0)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real traces at {REAL}: likeness is tested on our own only")
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["claude_code_dev", "lmcache_agent_b64", "mooncake_conversation_first_half", "mooncake_synthetic"]
)
def test_it_is_like_a_real_trace(name: str) -> None:
    trace = read_trace(REAL / f"{name}.npz")
    other = generate_like(fit(trace), trace.request_count)
    assert_alike(trace, other)
    assert_no_clone(trace, other)
