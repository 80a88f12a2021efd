"""The prefill rate, from steps one after the other and from steps planned ahead."""

from __future__ import annotations

import pytest

from kvcache.client.connectors.vllm_rate import PENDING_MAX, SAMPLES_MIN, TOKENS_MIN, PrefillMeter
from kvcache.clock import NS_PER_MS

STEP_NS = 100 * NS_PER_MS
TOKENS = 1_000
RATE = 10_000.0


def test_it_says_nothing_before_it_has_seen_enough() -> None:
    meter = PrefillMeter()
    for at in range(SAMPLES_MIN):
        assert meter.tokens_s == 0
        meter.ended((at + 1) * STEP_NS, meter.planned(at * STEP_NS, TOKENS, TOKENS))
    assert meter.tokens_s == pytest.approx(RATE)


def test_what_an_idle_engine_does_not_do_takes_no_time() -> None:
    meter, now_ns = PrefillMeter(), 0
    for _ in range(10):
        now_ns += 3_600_000 * NS_PER_MS
        step = meter.planned(now_ns, TOKENS, TOKENS)
        now_ns += STEP_NS
        meter.ended(now_ns, step)
    assert meter.tokens_s == pytest.approx(RATE)


def test_steps_planned_while_another_runs_have_their_own_time() -> None:
    """Two in flight, as with asynchronous scheduling: each plan comes a step before its turn, the first
    two come together."""
    meter, ends_ns = PrefillMeter(), 0
    flying = [meter.planned(0, TOKENS, TOKENS)]
    for _ in range(10):
        flying.append(meter.planned(ends_ns, TOKENS, TOKENS))
        ends_ns += STEP_NS
        meter.ended(ends_ns, flying.pop(0))
    assert meter.tokens_s == pytest.approx(RATE)


def test_an_empty_step_between_shifts_nothing() -> None:
    """It may be reported or not; it takes no time of its own."""
    for reported in (True, False):
        meter, now_ns = PrefillMeter(), 0
        for _ in range(5):
            assert meter.planned(now_ns, 0, 0) == 0
            step = meter.planned(now_ns, TOKENS, TOKENS)
            if reported:
                meter.ended(now_ns, 0)
            now_ns += STEP_NS
            meter.ended(now_ns, step)
        assert meter.tokens_s == pytest.approx(RATE)


def test_only_steps_that_are_nearly_all_prefill_and_large_are_timed() -> None:
    meter = PrefillMeter()
    assert meter.planned(0, TOKENS_MIN, TOKENS_MIN) > 0
    assert meter.planned(0, TOKENS_MIN - 1, TOKENS_MIN - 1) == 0
    assert meter.planned(0, 900, 1_000) > 0
    assert meter.planned(0, 899, 1_000) == 0
    assert meter.planned(0, 0, 1_000) == 0


def test_steps_of_which_nothing_is_heard_are_forgotten() -> None:
    meter = PrefillMeter()
    steps = [meter.planned(0, TOKENS, TOKENS) for _ in range(PENDING_MAX + 1)]
    for _ in range(SAMPLES_MIN):
        meter.ended(STEP_NS, steps[0])
    assert meter.tokens_s == 0
    for at, step in enumerate(steps[1 : SAMPLES_MIN + 1], 2):
        meter.ended(at * STEP_NS, step)
    assert meter.tokens_s == pytest.approx(RATE)


def test_the_recent_weighs_most() -> None:
    meter, now_ns = PrefillMeter(), 0
    for tokens in [TOKENS] * 50 + [2 * TOKENS] * 100:
        step = meter.planned(now_ns, tokens, tokens)
        now_ns += STEP_NS
        meter.ended(now_ns, step)
    assert meter.tokens_s == pytest.approx(2 * RATE, rel=0.05)
