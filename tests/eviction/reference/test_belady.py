"""The optimum, against MIN as its paper has it: every block by itself, its next use looked up each time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.eviction.reference.belady import next_uses
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import Trace

NEVER = 1 << 31

workloads = st.builds(
    Workload,
    request_count=st.integers(1, 30),
    block_tokens=st.integers(60, 400),
    seed=st.integers(0, 1 << 32),
    session_share=st.sampled_from([0.0, 0.5, 1.0]),
    fan_out_share=st.just(0.0),
)


def next_use(paths: list[list[int]], block: int, now: int) -> int:
    return next((at for at in range(now + 1, len(paths)) if block in paths[at]), NEVER)


def slow_min(trace: Trace, capacity: int) -> int:
    """Hit blocks of MIN with bypass, over single blocks."""
    paths = [trace.chain(leaf) for leaf in trace.leaves]
    cached: set[int] = set()
    hits = 0
    for now, path in enumerate(paths):
        hits += sum(block in cached for block in path)
        for depth, block in enumerate(path):
            if block in cached:
                continue
            cached.add(block)
            if len(cached) > capacity:
                on_path = set(path[depth + 1 :])
                cached.remove(
                    max(
                        cached,
                        key=lambda each: (
                            now if each in on_path else next_use(paths, each, now),
                            len(trace.chain(each)),
                        ),
                    )
                )
    return hits


@given(workload=workloads, capacity=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_it_is_min(workload: Workload, capacity: int) -> None:
    trace = generate(workload)
    result = replay(trace, "belady", capacity)
    assert result.hit_blocks == slow_min(trace, capacity)
    assert 0 <= result.admitted_blocks - result.evicted_blocks <= capacity


@given(workload=workloads)
@settings(max_examples=30, deadline=None)
def test_next_uses_are_looked_up_right(workload: Workload) -> None:
    trace = generate(workload)
    paths = [trace.chain(leaf) for leaf in trace.leaves]
    for now, spans in enumerate(next_uses(Forest(trace))):
        found = [
            when
            for (end, when), at in zip(spans, [0, *(end for end, _ in spans)], strict=False)
            for _ in range(end - at)
        ]
        assert found == [next_use(paths, block, now) for block in paths[now]]


def test_what_is_never_wanted_again_is_not_stored() -> None:
    trace = generate(Workload(request_count=50, session_share=0, fan_out_share=0, system_prompt_tokens=1))
    assert replay(trace, "belady", 1_000).admitted_blocks == 0
