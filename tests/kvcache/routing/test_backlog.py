"""What a worker has still to compute: how prompts weigh, and how far it must be with the one it is at."""

from __future__ import annotations

import random

import pytest

from kvcache.clock import NS_PER_S
from kvcache.routing.backlog import ATTENTION_TOKENS, DONE_MAX, Backlog, work_tokens

S = NS_PER_S


def seen(tokens_a_second: int = 1_000, seconds: int = 10) -> Backlog:
    """One that was seen to compute, without context, at this speed."""
    backlog = Backlog()
    backlog.begin(0, tokens_a_second * seconds, 0, 0)
    backlog.first_token(0, seconds * S)
    return backlog


def test_tokens_behind_a_long_context_weigh_more() -> None:
    assert work_tokens(0, 5_000) == 0
    assert work_tokens(10, ATTENTION_TOKENS) == pytest.approx(20, rel=1e-3)
    assert work_tokens(120_000, 120_000) == 120_000 * 2.5
    whole = work_tokens(9_000, 9_000)
    assert whole == pytest.approx(work_tokens(4_000, 4_000) + work_tokens(5_000, 9_000))


def test_what_must_be_done_by_now_does_not_count() -> None:
    backlog = seen(work_per_second := 1_000)
    backlog.begin(1, 4_000, 0, 20 * S)
    backlog.begin(2, 2_000, 0, 20 * S)
    left = [backlog.left(at * S) for at in (20, 21, 23, 24, 90)]
    assert left == pytest.approx([6_000, 5_000, 3_000, 2_000 + 4_000 * (1 - DONE_MAX), 2_200])
    backlog.first_token(1, 25 * S)
    assert backlog.left(25 * S) == pytest.approx(2_000)
    assert backlog.left(26 * S) == pytest.approx(2_000 - work_per_second, rel=0.1)


def test_of_a_worker_that_was_not_seen_computing_everything_counts() -> None:
    backlog = Backlog()
    backlog.begin(1, 4_000, 0, 0)
    assert backlog.left(100 * S) == 4_000


def test_one_that_is_given_up_says_nothing_of_the_speed() -> None:
    backlog = seen()
    backlog.begin(1, 4_000, 0, 20 * S)
    backlog.begin(2, 3_000, 0, 20 * S)
    backlog.end(1)
    backlog.end(1)
    assert backlog.left(90 * S) == 3_000
    backlog.first_token(2, 90 * S)
    backlog.first_token(2, 91 * S)
    backlog.begin(3, 4_000, 0, 100 * S)
    assert backlog.left(102 * S) == pytest.approx(2_000)


def test_any_order_of_calls_leaves_it_right() -> None:
    rng, backlog, waiting = random.Random(4), Backlog(), 0
    for now in range(3_000):
        act, number = rng.randrange(4), rng.randrange(max(1, now - 20), now + 1) if now else 0
        if act < 2:
            prompt = rng.randrange(200_000)
            backlog.begin(now, rng.randrange(prompt + 1), prompt, now * S)
        elif act == 2:
            backlog.first_token(number, rng.randrange(now + 1) * S)
        else:
            backlog.end(number)
        backlog.check()
        waiting = max(waiting, round(backlog.left(now * S)))
        assert backlog.left(now * S) >= 0
    assert waiting > 0
