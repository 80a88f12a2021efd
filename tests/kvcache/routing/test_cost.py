"""The cost of a candidate: what makes it dearer, and that its terms add up to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.routing.cost import PREFILL_TERMS, TERMS, Candidate, row, usable
from kvcache.routing.weights import RANGES, Weights

TOKENS = st.integers(0, 200_000)
CANDIDATES = st.builds(
    Candidate,
    worker=st.just("w"),
    cached=st.tuples(TOKENS, TOKENS, TOKENS),
    placed=TOKENS,
    suspect=st.booleans(),
    age_ms=st.floats(0, 100_000),
    waiting_prefill_tokens=TOKENS,
    running=st.integers(0, 1_000),
    waiting=st.integers(0, 1_000),
    decode_tokens=st.integers(0, 4_000_000),
    free_share=st.floats(0, 1),
    backlog_tokens=st.floats(0, 400_000),
)
SHARES = ["load_hbm", "load_host", "load_nvme", "placed_credit", "suspect_credit"]


@st.composite
def all_weights(draw: st.DrawFn) -> Weights:
    """Any, but with loads dearer downwards, as real ones are."""
    values: dict[str, object] = {}
    for name, (low, high) in RANGES.items():
        if name not in (*SHARES, "age_ms_free", "age_ms_max", "temperature", "choices"):
            values[name] = draw(st.floats(low, min(high, 1e4), allow_nan=False))
    loads = sorted(draw(st.floats(0, 1)) for _ in range(3))
    values |= dict(zip(("load_hbm", "load_host", "load_nvme"), loads, strict=True))
    values["placed_credit"], values["suspect_credit"] = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    values["form"] = draw(st.sampled_from(["linear", "multiplicative"]))
    return Weights(**values)  # type: ignore[arg-type]  # From the table of their ranges.


def cost(w: Weights, prompt: int, c: Candidate) -> float:
    return sum(row(w, prompt, c))


def assert_not_dearer(w: Weights, prompt: int, better: Candidate, worse: Candidate) -> None:
    a, b = cost(w, prompt, better), cost(w, prompt, worse)
    assert a <= b + 1e-9 * max(1.0, abs(a), abs(b)), (better, worse)


@settings(deadline=None)
@given(w=all_weights(), prompt=TOKENS, c=CANDIDATES, more=TOKENS, tier=st.integers(0, 2))
def test_more_cached_never_costs_more(w: Weights, prompt: int, c: Candidate, more: int, tier: int) -> None:
    cached = list(c.cached)
    # Behind what it has: a longer prefix, in this tier. What is placed is behind the prefix, so it shrinks.
    cached[tier] += more
    assert_not_dearer(w, prompt, replace(c, cached=tuple(cached), placed=0), replace(c, placed=0))
    assert_not_dearer(w, prompt, replace(c, placed=c.placed + more), c)


@settings(deadline=None)
@given(w=all_weights(), prompt=TOKENS, c=CANDIDATES, share=st.floats(0, 1), down=st.sampled_from([1, 2]))
def test_a_faster_tier_never_costs_more(
    w: Weights, prompt: int, c: Candidate, share: float, down: int
) -> None:
    moved = int(c.cached[down] * share)
    cached = list(c.cached)
    cached[down] -= moved
    cached[down - 1] += moved
    assert_not_dearer(w, prompt, replace(c, cached=tuple(cached)), c)


@settings(deadline=None)
@given(
    w=all_weights(),
    prompt=TOKENS,
    c=CANDIDATES,
    name=st.sampled_from(
        ["waiting_prefill_tokens", "backlog_tokens", "running", "waiting", "decode_tokens", "age_ms"]
    ),
    more=st.integers(0, 100_000),
)
def test_more_load_and_more_age_never_cost_less(
    w: Weights, prompt: int, c: Candidate, name: str, more: int
) -> None:
    assert_not_dearer(w, prompt, c, replace(c, **{name: getattr(c, name) + more}))  # type: ignore[arg-type]


@settings(deadline=None)
@given(w=all_weights(), prompt=TOKENS, c=CANDIDATES, share=st.floats(0, 1))
def test_less_free_memory_and_doubt_never_cost_less(
    w: Weights, prompt: int, c: Candidate, share: float
) -> None:
    assert_not_dearer(w, prompt, c, replace(c, free_share=c.free_share * share))
    assert_not_dearer(w, prompt, replace(c, suspect=False), replace(c, suspect=True))


@settings(deadline=None)
@given(w=all_weights(), prompt=TOKENS, c=CANDIDATES)
def test_no_term_is_below_nothing_and_the_prompt_is_never_cached_whole(
    w: Weights, prompt: int, c: Candidate
) -> None:
    terms = row(w, prompt, c)
    assert len(terms) == len(TERMS) and all(0 <= each < float("inf") for each in terms)
    assert sum(usable(prompt, c)) <= max(0, prompt - 1)
    assert all(each >= 0 for each in usable(prompt, c))


def test_the_sum_is_the_one_that_is_written_down() -> None:
    w = Weights(
        prefill=2.0,
        request_tokens=10,
        load_host=0.25,
        load_nvme=0.5,
        placed_credit=0.5,
        suspect_credit=0.75,
        waiting_prefill=3.0,
        overdue=0.5,
        patience_tokens=1_000.0,
        running=5.0,
        decode=0.5,
        waiting=7.0,
        memory=100.0,
        memory_floor=0.2,
        scale_tokens=1_000.0,
    )
    c = Candidate("w", (400, 200, 100), 50, True, 0.0, 20, 4, 3, 60, 0.05, 1_950.0)
    told = row(w, 1_000, c, mean_backlog=900.0)
    assert told == pytest.approx(
        (2 * (250 + 10), 2 * 100, 2 * 0.25 * (700 - 100), 2 * 0.5 * 50, 60, 25, 20, 30, 21, 75)
    )
    prefill, load = sum(told[:PREFILL_TERMS]), sum(told[PREFILL_TERMS:])
    product = sum(row(replace(w, form="multiplicative"), 1_000, c, 900.0))
    assert product == pytest.approx(prefill * (1 + load / 1_000))


def test_age_takes_credit_away_in_proportion() -> None:
    w = Weights(age_ms_free=1_000, age_ms_max=3_000)
    freshness = [row(w, 1_001, Candidate("w", (1_000, 0, 0), age_ms=age))[2] for age in (999, 2_000, 9_000)]
    assert freshness == [0, 500, 1_000]
