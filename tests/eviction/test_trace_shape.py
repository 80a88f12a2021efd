"""What a trace is like: against counting by hand, and against what others counted of the real ones."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.shape import percentiles, picture, shape_of, uses_of, window
from kvcache.eviction.traces.trace import Trace, read_trace

REAL = Path(__file__).parents[3] / "shared" / "traces"
workloads = st.builds(
    Workload, request_count=st.integers(1, 60), block_tokens=st.integers(1, 32), seed=st.integers(0, 99)
)


def small() -> Trace:
    """Blocks 0 <- 1 <- 2 and 0 <- 3; asked for 0-1, 0-1-2, 0-3, and nothing."""
    return Trace(
        block_tokens=4,
        parents=array("i", [-1, 0, 1, 0]),
        tokens=array("H", [4, 4, 3, 1]),
        leaves=array("i", [1, 2, 3, -1]),
        arrivals_ms=array("q", [1_000, 6_000, 9_000, 101_000]),
        input_tokens=array("i", [8, 13, 5, 2]),
        output_tokens=array("i", [2, 2, 2, 2]),
        sessions=array("i", [0, 0, -1, -1]),
        kind_indexes=array("B", [0, 1, 0, 0]),
        kinds=("turn", "end"),
        note="by hand",
    )


def test_a_small_one_by_hand() -> None:
    shape = shape_of(small())
    assert (shape.requests, shape.sessions, shape.span_s) == (4, 1, 100.0)
    assert shape.kinds == {"turn": 3, "end": 1}
    assert (shape.blocks, shape.unique_blocks, shape.found_again_blocks) == (7, 4, 2)
    assert (shape.prompt_tokens, shape.unique_tokens) == (28, 12)
    assert shape.ideal_block_hit == 3 / 7
    assert shape.ideal_token_hit == 12 / 28
    assert shape.hottest_block_share == 3 / 7
    assert shape.reuse["within 10 s"] == 1.0
    assert shape.reuse_s == {"p10": 3.0, "p50": 5.0, "p90": 5.0, "p99": 5.0}
    # 10 s: block 0 for 8 + 10 s, 1 for 5 + 10, 2 and 3 for 10 each; 1 min: 68, 65, 60, 60; of 100 s.
    assert shape.working_set_blocks == {"10 s": round(53 / 100), "1 min": round(253 / 100)}


@given(workload=workloads)
@settings(max_examples=40)
@pytest.mark.slow
def test_the_walk_agrees_with_counting(workload: Workload) -> None:
    trace = generate(workload)
    uses = uses_of(trace)
    last: dict[int, int] = {}
    gaps: Counter[int] = Counter()
    for request in trace.requests():
        known = [block for block in request.blocks if block in last]
        assert uses.known_blocks[request.index] == len(known)
        assert uses.known_tokens[request.index] == sum(trace.tokens[block] for block in known)
        assert uses.prompt_tokens[request.index] == request.prompt_tokens
        gaps.update(request.arrival_ms - last[block] for block in known)
        last.update(dict.fromkeys(request.blocks, request.arrival_ms))
    assert uses.gaps_ms == gaps


def test_percentiles_and_words() -> None:
    assert percentiles([]) == {"p10": 0, "p50": 0, "p90": 0, "p99": 0}
    assert percentiles(range(100)) == {"p10": 10, "p50": 50, "p90": 90, "p99": 99}
    assert [window(each) for each in (1, 60, 600, 21_600)] == ["1 s", "1 min", "10 min", "6 h"]


def test_the_picture_shows_it() -> None:
    shown = picture("small", shape_of(small()))
    assert shown.startswith("small: 4 requests in 100 s, 0.04 a second, 1 sessions\n")
    assert "ideal hit 42.9% of tokens, 42.9% of blocks" in shown
    assert "   within 10 s     100.0%  ####################################" in shown
    assert max(map(len, shown.splitlines())) < 110


IDEALS = {
    "claude_code_dev": (0.9624, 0.9605),
    "lmcache_agent_b64": (0.8994, 0.8882),
    "mooncake_conversation_first_half": (0.3456, 0.3520),
    "mooncake_synthetic": (0.6396, 0.6512),
}


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real traces at {REAL}: shapes are tested on our own only")
@pytest.mark.slow
@pytest.mark.parametrize("name", IDEALS)
def test_ideal_hits_of_real_traces_are_those_that_others_found(name: str) -> None:
    shape = shape_of(read_trace(REAL / f"{name}.npz"))
    assert (round(shape.ideal_block_hit, 4), round(shape.ideal_token_hit, 4)) == IDEALS[name]
