"""Traces made of traces: what is asked for is the same as before, and nothing else is left."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.errors import BadInput
from kvcache.eviction.traces.edit import (
    anonymized,
    coarsened,
    renumbered,
    split_by_session,
    split_by_time,
    subset,
    with_sessions,
)
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import Trace


def made(seed: int = 1, count: int = 80, block_tokens: int = 16) -> Trace:
    return generate(Workload(request_count=count, block_tokens=block_tokens, seed=seed))


def shared(trace: Trace) -> list[list[int]]:
    """For each request, the tokens it shares with each one before it: what eviction can see of a trace."""
    paths = [set(request.blocks) for request in trace.requests()]
    return [
        [sum(trace.tokens[block] for block in path & other) for other in paths[:at]]
        for at, path in enumerate(paths)
    ]


def test_a_subset_has_its_requests_and_their_blocks() -> None:
    trace = made()
    part = subset(trace, [3, 10, 50], "some")
    assert part.note == "some"
    assert [request.prompt_tokens for request in part.requests()] == [
        trace.request(at).prompt_tokens for at in (3, 10, 50)
    ]
    assert sorted({block for request in part.requests() for block in request.blocks}) == list(
        range(part.block_count)
    )


@given(seed=st.integers(0, 50))
@settings(max_examples=15)
def test_renumbering_changes_nothing_that_is_shared(seed: int) -> None:
    trace = made(seed, 40)
    assert shared(renumbered(trace)) == shared(trace)
    assert renumbered(renumbered(trace)) == renumbered(trace)


def test_time_splits_where_it_says() -> None:
    trace = made()
    first, rest = split_by_time(trace, 0.25)
    edge = trace.arrivals_ms[0] + (trace.arrivals_ms[-1] - trace.arrivals_ms[0]) * 0.25
    assert first.arrivals_ms[-1] < edge <= rest.arrivals_ms[0]
    assert first.arrivals_ms + rest.arrivals_ms == trace.arrivals_ms


def test_sessions_are_not_torn() -> None:
    trace = made()
    first, rest = split_by_session(trace, 0.5)
    assert first.request_count + rest.request_count == trace.request_count
    assert not set(first.sessions) & set(rest.sessions)
    assert min(first.request_count, rest.request_count) > 10
    assert split_by_session(trace, 0.5) == (first, rest)
    assert split_by_session(trace, 0.5, seed=2) != (first, rest)


@pytest.mark.slow
def test_sessions_are_guessed_from_who_goes_on_where() -> None:
    workload = Workload(request_count=300, system_prompt_tokens=2_000, question_tokens=200, fan_out_share=0.0)
    trace = generate(workload)
    bare = replace(trace, sessions=array("i", [-1]) * trace.request_count)
    guessed = with_sessions(bare)
    pairs = [(one, other) for one in range(100, 300) for other in range(one)]
    same = [trace.sessions[one] == trace.sessions[other] for one, other in pairs]
    found = [guessed.sessions[one] == guessed.sessions[other] for one, other in pairs]
    right = sum(one == other for one, other in zip(same, found, strict=True))
    assert right / len(pairs) > 0.99
    assert sum(one and other for one, other in zip(same, found, strict=True)) > 0.8 * sum(same)
    assert with_sessions(trace) == trace
    half = array("i", [session if at % 2 else -1 for at, session in enumerate(trace.sessions)])
    assert [with_sessions(replace(trace, sessions=half)).sessions[at] for at in range(1, 300, 2)] == list(
        half[1::2]
    )


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, 7.0, float("nan")])
def test_a_share_is_a_part(share: float) -> None:
    with pytest.raises(BadInput, match="a share of"):
        split_by_time(made(), share)
    with pytest.raises(BadInput, match="a share of"):
        split_by_session(made(), share)


def test_a_part_of_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="one part has no request"):
        split_by_time(made(count=1), 0.5)


@given(seed=st.integers(0, 50), factor=st.integers(2, 5))
@settings(max_examples=20)
def test_larger_blocks_hold_the_same_tokens_and_share_whole_ones(seed: int, factor: int) -> None:
    trace = made(seed, 30)
    larger = coarsened(trace, 16 * factor)
    before, after = shared(trace), shared(larger)
    for request, other in zip(trace.requests(), larger.requests(), strict=True):
        assert other.prompt_tokens == request.prompt_tokens
        full = 16 * factor
        for then, now in zip(before[request.index], after[request.index], strict=True):
            same = then == request.prompt_tokens  # The one is the beginning of the other, or the same.
            assert now in ((then, then // full * full) if same else (then // full * full, then))
            assert now <= then


def test_blocks_grow_by_a_factor() -> None:
    assert coarsened(made(), 16) == made()
    for tokens in (8, 24, -16, 0, 1 << 20):
        with pytest.raises(BadInput, match="a multiple of 16"):
            coarsened(made(), tokens)


def test_what_is_anonymized_says_only_what_is_needed() -> None:
    plain = made()
    trace = replace(plain, note="host prod-7", kinds=("secret project", "tool_use", "x"))
    later = replace(
        trace, arrivals_ms=type(trace.arrivals_ms)("q", [at + 10**12 for at in trace.arrivals_ms])
    )
    hidden = anonymized(later, round_ms=1_000)
    assert hidden.note == "anonymized"
    assert set(hidden.kinds) <= {"tool_use", "kind-0", "kind-1", "kind-2"}
    assert hidden.arrivals_ms[0] == 0
    assert all(at % 1_000 == 0 for at in hidden.arrivals_ms)
    assert shared(hidden) == shared(trace)
    firsts = [trace.sessions.index(each) for each in trace.sessions]
    assert [hidden.sessions.index(each) for each in hidden.sessions] == firsts
    bare = anonymized(trace, kinds=False, sessions=False)
    assert (bare.kinds, set(bare.sessions), set(bare.kind_indexes)) == (("unknown",), {-1}, {0})
    with pytest.raises(BadInput, match="times in steps of 0 ms"):
        anonymized(trace, round_ms=0)
