"""Made-up requests: the same from the same seed, and with the sharing that the workload asks for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.errors import BadInput
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import Trace, read_trace, write_trace

workloads = st.builds(
    Workload,
    request_count=st.integers(1, 40),
    block_tokens=st.integers(1, 64),
    seed=st.integers(0, 1 << 32),
    system_prompt_count=st.integers(1, 4),
    session_share=st.sampled_from([0.0, 0.3, 1.0]),
    fan_out_share=st.just(0.0),
    turns=st.integers(1, 6),
    document_tokens=st.integers(1, 200),
)


def shared_part(trace: Trace) -> float:
    """Tokens of blocks that an earlier request had too, over all tokens: the hits of an endless cache."""
    seen: set[int] = set()
    hit = total = 0
    for request in trace.requests():
        total += request.prompt_tokens
        hit += sum(trace.tokens[block] for block in request.blocks if block in seen)
        seen.update(request.blocks)
    return hit / total


@given(workload=workloads)
@settings(max_examples=40, deadline=None)
def test_every_workload_gives_a_sound_trace(workload: Workload) -> None:
    trace = generate(workload)  # Trace checks itself when it is made.
    assert trace.request_count == workload.request_count
    for request in trace.requests():
        assert request.prompt_tokens == request.input_tokens > 0


def test_the_same_seed_gives_the_same_trace(tmp_path: Path) -> None:
    trace = generate(Workload(request_count=200, seed=7))
    assert generate(Workload(request_count=200, seed=7)) == trace
    assert generate(Workload(request_count=200, seed=8)) != trace
    write_trace(tmp_path / "t.npz", trace)
    assert read_trace(tmp_path / "t.npz") == trace


def test_a_longer_trace_begins_as_a_shorter_one() -> None:
    longer = generate(Workload(request_count=300)).head(100)
    shorter = generate(Workload(request_count=100))
    assert longer.leaves == shorter.leaves
    assert longer.arrivals_ms == shorter.arrivals_ms


def test_every_kind_occurs() -> None:
    kinds = Counter(request.kind for request in generate(Workload(request_count=500)).requests())
    assert set(kinds) == {"turn", "fan_out", "one_shot"}
    assert min(kinds.values()) > 20


def test_turns_of_a_session_extend_each_other() -> None:
    trace = generate(Workload(request_count=200, session_share=1.0, fan_out_share=0.0))
    before: dict[int, list[int]] = {}
    continued = 0
    for request in trace.requests():
        full = [block for block in request.blocks if trace.tokens[block] == trace.block_tokens]
        if request.session in before:
            continued += 1
            assert full[: len(before[request.session])] == before[request.session]
        before[request.session] = full
    assert continued > 100


def test_most_is_shared_and_one_shots_are_not() -> None:
    assert shared_part(generate(Workload(request_count=500))) > 0.5
    alone = Workload(request_count=300, session_share=0.0, fan_out_share=0.0, system_prompt_tokens=1)
    assert shared_part(generate(alone)) < 0.05


@pytest.mark.parametrize(
    "fields",
    [{"request_count": 0}, {"block_tokens": 0}, {"session_share": 1.5}, {"turns": 0}, {"turn_gap_s": 0.0}],
)
def test_a_workload_of_nothing_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(BadInput) as caught:
        Workload(**fields)
    assert next(iter(fields)) in str(caught.value)
