"""Rates from samples, and loading against computing anew."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.tiers.rates import Rate, load_ns, worth_loading

MIB = 1 << 20


def test_says_nothing_until_it_has_seen_enough() -> None:
    rate = Rate(samples_min=3)
    for _ in range(2):
        rate.add(100, NS_PER_S)
        assert rate.value() is None
    rate.add(100, NS_PER_S)
    assert rate.value() == pytest.approx(100)


@pytest.mark.parametrize(("amount", "duration_ns"), [(0, 5), (5, 0), (-1, 5), (5, -1)])
def test_what_tells_nothing_is_no_sample(amount: int, duration_ns: int) -> None:
    rate = Rate(samples_min=1)
    rate.add(amount, duration_ns)
    assert rate.value() is None


def test_the_recent_past_weighs_most() -> None:
    rate = Rate(samples_min=1, half_life=4)
    for _ in range(100):
        rate.add(1_000, NS_PER_S)
    for _ in range(4):
        rate.add(10, NS_PER_S)
    assert rate.value() == pytest.approx((1_000 + 10) / 2, rel=0.01)
    for _ in range(40):
        rate.add(10, NS_PER_S)
    assert rate.value() == pytest.approx(10, rel=0.2)


def test_it_is_amount_over_time_and_not_a_mean_of_rates() -> None:
    """One stall of a second among quick reads is a stall of a second."""
    rate = Rate(samples_min=1, half_life=1_000_000)
    for _ in range(9):
        rate.add(MIB, NS_PER_MS)
    rate.add(MIB, NS_PER_S)
    assert rate.value() == pytest.approx(10 * MIB / 1.009, rel=0.001)


@given(st.lists(st.tuples(st.integers(1, 1 << 40), st.integers(1, 10**12)), min_size=8, max_size=200))
def test_it_lies_between_the_slowest_and_the_fastest(samples: list[tuple[int, int]]) -> None:
    rate = Rate()
    for amount, duration_ns in samples:
        rate.add(amount, duration_ns)
    each = [amount * NS_PER_S / duration_ns for amount, duration_ns in samples]
    value = rate.value()
    assert value is not None
    assert min(each) * 0.999 <= value <= max(each) * 1.001


def test_it_can_forget() -> None:
    rate = Rate(samples_min=1)
    rate.add(1_000, NS_PER_S)
    rate.forget()
    assert rate.value() is None
    rate.add(10, NS_PER_S)
    assert rate.value() == pytest.approx(10)


def test_loading_waits_for_those_before_it() -> None:
    assert load_ns(1_000, 1_000.0, 0) == NS_PER_S
    assert load_ns(1_000, 1_000.0, 5 * NS_PER_MS) == NS_PER_S + 5 * NS_PER_MS
    assert load_ns(1_000, None, 5) is None


@pytest.mark.parametrize(
    ("rate_bytes_s", "queue_ns", "prefill_tokens_s", "expected"),
    [
        (1e9, 0, 10_000.0, True),  # 10 ms against 100 ms
        (1e8, 0, 10_000.0, True),  # 100 ms against 100 ms: not slower
        (0.99e8, 0, 10_000.0, False),
        (1e9, 90 * NS_PER_MS, 10_000.0, True),
        (1e9, 91 * NS_PER_MS, 10_000.0, False),
        (1e9, 0, 100_001.0, False),  # an engine that is faster than the disk
        (None, NS_PER_S, 10_000.0, True),
        (1.0, NS_PER_S, None, True),
        (1.0, NS_PER_S, 0, True),
        (0.0, NS_PER_S, 10_000.0, True),
    ],
)
def test_loading_against_computing(
    rate_bytes_s: float | None, queue_ns: int, prefill_tokens_s: float | None, expected: bool
) -> None:
    assert worth_loading(10_000_000, rate_bytes_s, queue_ns, 1_000, prefill_tokens_s) is expected
