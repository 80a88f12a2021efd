"""Load: what a worker told, what was sent since, and that neither can grow without end."""

from __future__ import annotations

import math
import random

from kvcache.clock import NS_PER_S
from kvcache.routing.health import DOWN_NS_MAX, DOWN_NS_MIN, Health
from kvcache.routing.telemetry import NEWER_NS, REQUEST_NS_MAX, TOLD_NS_MAX, Loads, Told

S = NS_PER_S


def test_own_requests_count_until_they_end() -> None:
    loads = Loads()
    first, second = loads.begin("w", 300, 1_000, 0), loads.begin("w", 200, 500, 0)
    assert loads.estimate("w", 0).waiting_prefill_tokens == 500
    loads.first_token(first, 0)
    loads.first_token(first, 0)
    now = loads.estimate("w", 0)
    assert (now.waiting_prefill_tokens, now.running, now.decode_tokens) == (200, 1, 1_000)
    for number in (first, second, second):
        loads.end(number)
    loads.first_token(second, 0)
    assert loads.estimate("w", 0) == loads.estimate("never heard of", 0)
    loads.check()


def test_what_was_told_counts_with_what_changed_since() -> None:
    loads = Loads()
    before = loads.begin("w", 100, 100, 0)
    loads.told("w", Told(1 * S, running=5, waiting=2, waiting_prefill_tokens=700, free_share=0.3))
    assert loads.estimate("w", 2 * S).waiting_prefill_tokens == 700  # It knew of ours.
    loads.begin("w", 50, 80, 2 * S)
    loads.first_token(before, 0)
    now = loads.estimate("w", 2 * S)
    assert (now.waiting_prefill_tokens, now.running, now.waiting) == (650, 6, 2)
    assert (now.free_share, now.age_ms) == (0.3, 1_000)


def test_the_backlog_is_our_own_and_what_others_sent() -> None:
    loads = Loads()
    first = loads.begin("w", 4_000, 4_000, 0)
    assert loads.estimate("w", 0).backlog_tokens == 4_200  # 2,000 tokens before each, of 40,000.
    loads.told("w", Told(S, waiting_prefill_tokens=5_000))
    assert loads.estimate("w", S).backlog_tokens == 5_200
    loads.first_token(first, 2 * S)
    loads.first_token(first, 9 * S)
    assert loads.estimate("w", 2 * S).backlog_tokens == 1_000
    second = loads.begin("w", 4_000, 4_000, 4 * S)
    assert loads.estimate("w", 5 * S).backlog_tokens == 1_000 + 2_100  # As fast as the first: half is done.
    loads.end(second)
    loads.check()
    assert loads.estimate("w", 5 * S).backlog_tokens == 1_000


def test_it_is_never_less_than_our_own() -> None:
    loads = Loads()
    for _ in range(3):
        loads.begin("w", 100, 100, 0)
    loads.told("w", Told(S, waiting_prefill_tokens=0))
    assert loads.estimate("w", S).waiting_prefill_tokens == 300


def test_what_was_told_long_ago_or_before_counts_for_nothing() -> None:
    loads = Loads()
    loads.told("w", Told(10 * S, running=5))
    loads.told("w", Told(9 * S, running=99))
    loads.told("w", Told(10 * S + NEWER_NS - 1, running=98))
    assert loads.estimate("w", 10 * S).running == 5
    assert loads.estimate("w", 10 * S + TOLD_NS_MAX).running == 5
    late = loads.estimate("w", 10 * S + TOLD_NS_MAX + 1)
    assert (late.running, late.age_ms) == (0, -1)


def test_a_request_whose_end_nobody_tells_ends_by_itself() -> None:
    loads = Loads()
    loads.begin("w", 100, 100, 0)
    loads.begin("w", 10, 10, REQUEST_NS_MAX)
    assert loads.estimate("w", REQUEST_NS_MAX).waiting_prefill_tokens == 10
    assert (loads.expired, loads.requests) == (1, 1)


def test_requests_are_bounded_and_those_beyond_are_told() -> None:
    loads = Loads(requests_max=2)
    assert [loads.begin("w", 1, 1, 0) for _ in range(4)] == [1, 2, 0, 0]
    loads.end(0)
    loads.first_token(0, 0)
    assert (loads.uncounted, loads.requests) == (2, 2)
    loads.check()


def test_workers_that_are_gone_are_forgotten() -> None:
    loads = Loads()
    number = loads.begin("gone", 5, 5, 0)
    loads.begin("stays", 7, 7, 0)
    loads.keep(["stays"])
    loads.end(number)
    assert loads.requests == 1 and loads.estimate("stays", 0).waiting_prefill_tokens == 7
    loads.check()


def test_random_requests_leave_the_sums_right() -> None:
    loads, rng = Loads(requests_max=20, request_ns_max=30), random.Random(1)
    numbers = [0]
    for now in range(2_000):
        act = rng.randrange(4)
        if act == 0:
            numbers.append(loads.begin(rng.choice("abc"), rng.randrange(99), rng.randrange(99), now))
        elif act == 1:
            loads.first_token(rng.choice(numbers[-30:]), now)
        elif act == 2:
            loads.end(rng.choice(numbers[-30:]))
        else:
            loads.told(rng.choice("abc"), Told(now * NEWER_NS, running=rng.randrange(5)))
        loads.check()
        estimate = loads.estimate("a", now)
        assert min(estimate.running, estimate.waiting_prefill_tokens, estimate.decode_tokens) >= 0


def test_numbers_that_make_no_sense_are_not_told() -> None:
    nonsense = {"requests_running": math.nan, "requests_waiting": -3.0, "free_share": math.nan, "x": 1.0}
    assert Told.read(nonsense, 5) == Told(5)
    assert Told.read({"requests_running": math.inf}, 5).running < 1 << 41
    assert Told.read({"free_share": 0.25, "free_bytes": 0.0}, 5).free_share == 0.25
    assert Told.read({"free_share": 7.0}, 5).free_share == 1.0


def test_of_two_sources_the_busier_counts() -> None:
    one, two = Told(5, running=3, free_share=0.5), Told(4, running=1, waiting=2, free_share=0.2)
    assert one.and_of(two) == Told(4, running=3, waiting=2, free_share=0.2)


def test_a_worker_that_fails_is_left_alone_for_longer_and_longer() -> None:
    health = Health()
    now, pauses = 0, []
    for _ in range(8):
        health.failed("w", "refused", now)
        health.failed("w", "seen again", now)
        began = now
        while health.why_down("w", now):
            now += S // 2
        pauses.append(now - began)
    assert pauses[:3] == [DOWN_NS_MIN, 2 * DOWN_NS_MIN, 4 * DOWN_NS_MIN] and pauses[-1] == DOWN_NS_MAX
    health.failed("w", "refused", now)
    health.succeeded("w")
    assert health.why_down("w", now) == ""
