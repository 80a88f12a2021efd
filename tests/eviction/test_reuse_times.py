"""Reuse times: ages, counting, and the worth of a block against its definition."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from kvcache.eviction.reuse_times import _WIDTHS_MS, AGES, STARTS_MS, ReuseTimes, Use, age_index, worth


def test_ages_are_half_octaves() -> None:
    assert STARTS_MS[:6] == (0, 128, 192, 256, 384, 512)
    for at, start in enumerate(STARTS_MS):
        assert age_index(start) == at
        assert at == 0 or age_index(start - 1) == at - 1
    assert age_index(1 << 60) == AGES - 1


def by_definition(hazard: list[float], start: int) -> float:
    """The most reuses a millisecond over all stopping times, each tried."""
    best = held = used = 0.0
    left = 1.0
    for rate, width in list(zip(hazard, _WIDTHS_MS, strict=True))[start:]:
        held += width * left * (1 - rate / 2)
        used += left * rate
        left *= 1 - rate
        best = max(best, used / held)
    return best


def test_worth_is_the_best_stopping_time() -> None:
    random = Random(3)
    for _ in range(20):
        hazard = [random.random() ** 3 * 0.9 for _ in range(AGES)]
        assert worth(hazard) == pytest.approx([by_definition(hazard, at) for at in range(AGES)])


def test_where_the_hazard_falls_the_youngest_is_worth_most() -> None:
    index = worth([0.5 / (1 + at) for at in range(AGES)])
    assert all(young >= old for young, old in pairwise(index))


def test_what_never_comes_back_is_worth_nothing() -> None:
    assert worth([0.0] * AGES) == [0.0] * AGES


def test_each_age_counts_those_that_reached_it() -> None:
    times = ReuseTimes(1.0)
    kind = times.kind((1,))
    early, late = Use(kind, 3, 1_000, 1, 1.0), Use(kind, 5, 1_000, 1, 1.0)
    times.begin(early)
    times.begin(late)
    times.advance(1_150)
    times.reuse(early, 3, 1_150)
    times.advance(1_400)
    times.reuse(late, 4, 1_400)
    times.advance(10_000)
    assert kind.exposed[:5] == [8, 8, 5, 5, 5]
    assert kind.exposed[5:12] == [1] * 7
    assert kind.reused[:6] == [0, 3, 0, 0, 4, 0]
    times.check()


def test_a_class_that_saw_little_leans_on_the_wider_one() -> None:
    times = ReuseTimes(16.0)
    common, rare = times.kind((1, 0)), times.kind((1, 1))
    for at_ms in range(0, 100_000, 1_000):
        use = Use(common if at_ms else rare, 1, at_ms, 1, 1.0)
        times.begin(use)
        times.advance(at_ms + 200)
        times.reuse(use, 1, at_ms + 200)
    times.rebuild(1.0)
    assert rare.hazard[2:] == pytest.approx(common.hazard[2:], rel=0.3)
    assert rare.hazard[2] > 0.5


def test_queues_hold_no_more_than_what_may_still_come_back() -> None:
    times = ReuseTimes(1.0)
    kind = times.kind(())
    for at_ms in range(0, 20_000):
        use = Use(kind, 1, at_ms, 1, 1.0)
        times.begin(use)
        times.reuse(use, 1, at_ms)
        times.advance(at_ms)
    times.check()
    assert times._queued() < 5_000


def test_what_counts_for_nothing_teaches_nothing() -> None:
    times = ReuseTimes(1.0)
    use = Use(times.kind(()), 2, 5, 1, 0.0)
    times.begin(use)
    times.advance(9_000)
    times.reuse(use, 2, 9_000)
    assert not sum(use.kind.exposed) and not sum(use.kind.reused)
    times.check()
