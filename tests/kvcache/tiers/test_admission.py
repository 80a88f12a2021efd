"""Seen keys and the daily write budget: bounded, and shut whatever the clock does."""

from __future__ import annotations

import json
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.block import StorageKey
from kvcache.clock import NS_PER_S
from kvcache.testing.clock import FakeClock
from kvcache.tiers.admission import (
    SEEN_MAX,
    UNLIMITED_BYTES,
    WINDOW_HOURS,
    Seen,
    WriteBudget,
    WriteRate,
    hours_since,
)

BUDGET = 100
HOUR = 400_000


def key(number: int, namespace: int = 0) -> StorageKey:
    halves = (("namespace", namespace), ("prefix", number))
    return StorageKey(b"".join(blake2b(repr(half).encode(), digest_size=16).digest() for half in halves))


class TestSeen:
    def test_counts_touches(self) -> None:
        seen = Seen(100)
        assert seen.count(key(1)) == 0
        seen.touch([key(1), key(2)])
        seen.touch([key(1)])
        assert [seen.count(key(number)) for number in (1, 2, 3)] == [2, 1, 0]

    def test_one_prompt_of_two_ranks_is_two_keys(self) -> None:
        seen = Seen(100)
        seen.touch([key(1, namespace=1)])
        assert seen.count(key(1, namespace=2)) == 0

    def test_counts_no_further_than_it_must(self) -> None:
        seen = Seen(10)
        seen.touch([key(1)] * (SEEN_MAX + 5))
        assert seen.count(key(1)) == SEEN_MAX

    def test_what_is_touched_again_in_time_goes_on_counting(self) -> None:
        seen = Seen(8)
        for turn in range(1, 20):
            seen.touch([key(0)])
            assert seen.count(key(0)) == turn
            seen.touch([key(100 * turn + other) for other in range(3)])

    def test_what_is_not_touched_is_forgotten(self) -> None:
        seen = Seen(8)
        seen.touch([key(0)])
        seen.touch([key(number) for number in range(1, 9)])
        assert seen.count(key(0)) == 0

    @given(entries_max=st.integers(2, 12), numbers=st.lists(st.integers(0, 20), max_size=100))
    def test_memory_is_bounded_and_the_recent_is_known(self, entries_max: int, numbers: list[int]) -> None:
        seen = Seen(entries_max)
        for number in numbers:
            seen.touch([key(number)])
            assert seen.count(key(number)) >= 1
            assert len(seen) <= entries_max
        recent: list[int] = []
        for number in reversed(numbers):
            if number not in recent:
                recent.append(number)
        for number in recent[: entries_max // 2]:
            assert seen.count(key(number)) >= 1
        for number in set(recent):
            assert seen.count(key(number)) <= numbers.count(number), "never more than there were"


class Wall:
    """A wall clock that is set by hand."""

    def __init__(self, hour: int = HOUR) -> None:
        self.hour = hour

    def __call__(self) -> int:
        return self.hour


MOVES = st.lists(
    st.tuples(st.one_of(st.just(1), st.just(0), st.integers(0, 30)), st.integers(0, BUDGET + 10)), max_size=80
)
JUMPS = st.lists(
    st.tuples(st.one_of(st.just(1), st.just(0), st.integers(-60, 60)), st.integers(0, BUDGET + 10)),
    max_size=80,
)


class TestWriteBudget:
    def test_spends_when_it_says_yes(self) -> None:
        budget = WriteBudget(BUDGET, Wall())
        assert budget.allow(60)
        assert not budget.allow(41)
        assert budget.left() == 40
        assert budget.allow(40)
        assert budget.allow(0)
        assert not budget.allow(1)
        assert budget.spent() == BUDGET

    def test_is_open_again_after_a_day(self) -> None:
        wall = Wall()
        budget = WriteBudget(BUDGET, wall)
        assert budget.allow(BUDGET)
        wall.hour += WINDOW_HOURS
        assert not budget.allow(1), "the first byte may have been spent at the end of its hour"
        wall.hour += 1
        assert budget.allow(BUDGET)

    def test_what_is_free_again_is_what_was_spent_then(self) -> None:
        wall = Wall()
        budget = WriteBudget(BUDGET, wall)
        for share in (30, 50, 20):
            assert budget.allow(share)
            wall.hour += 1
        freed = []
        for _ in range(26):
            freed.append(budget.left())
            wall.hour += 1
        assert freed == [0] * 22 + [30, 80, 100, 100]

    def test_none_is_no_limit_and_is_counted(self) -> None:
        budget = WriteBudget(None, Wall())
        assert budget.allow(1 << 50)
        assert budget.left() == UNLIMITED_BYTES
        assert budget.spent() == 1 << 50

    def test_zero_allows_nothing(self) -> None:
        assert not WriteBudget(0, Wall()).allow(1)

    @given(moves=MOVES)
    def test_no_24_hours_hold_more_than_the_budget(self, moves: list[tuple[int, int]]) -> None:
        """Also for hours that begin within a clock hour: those touch 25 of them. And it refuses only what
        does not fit."""
        wall = Wall()
        budget = WriteBudget(BUDGET, wall)
        spent: list[tuple[int, int]] = []
        for hours, amount in moves:
            wall.hour += hours
            counting = sum(each for hour, each in spent if wall.hour - hour <= WINDOW_HOURS)
            assert budget.left() == BUDGET - counting
            assert budget.allow(amount) is (counting + amount <= BUDGET)
            if counting + amount <= BUDGET:
                spent.append((wall.hour, amount))
        for start, _ in spent:
            window = sum(each for hour, each in spent if start <= hour <= start + WINDOW_HOURS)
            assert window <= BUDGET

    @given(jumps=JUMPS)
    def test_a_clock_that_is_set_back_opens_nothing(self, jumps: list[tuple[int, int]]) -> None:
        """Two spendings are in one day unless the clock went beyond where it ever was, or was seen to
        pass hour by hour, 25 times altogether."""
        wall = Wall()
        budget = WriteBudget(BUDGET, wall)
        high = wall.hour
        passed = 0
        spent: list[tuple[int, int]] = []
        for hours, amount in jumps:
            wall.hour += hours
            passed += max(wall.hour - high, int(hours == 1))
            high = max(high, wall.hour)
            if budget.allow(amount):
                spent.append((passed, amount))
        for start, _ in spent:
            assert sum(each for hour, each in spent if start <= hour <= start + WINDOW_HOURS) <= BUDGET

    def test_set_back_and_forth_it_stays_shut(self) -> None:
        wall = Wall()
        budget = WriteBudget(BUDGET, wall)
        assert budget.allow(BUDGET)
        for _ in range(100):
            for wall.hour in (HOUR - 40, HOUR, HOUR - 9_000, HOUR):
                assert not budget.allow(1)

    def test_a_clock_that_was_far_ahead_does_not_shut_it_for_ever(self) -> None:
        wall = Wall(HOUR + 600_000)
        budget = WriteBudget(BUDGET, wall)
        assert budget.allow(BUDGET)
        wall.hour = HOUR
        for _ in range(24):
            assert not budget.allow(1)
            wall.hour += 1
        assert not budget.allow(1)
        wall.hour += 1
        assert budget.allow(BUDGET)

    def test_a_restart_does_not_reset_it(self) -> None:
        wall = Wall()
        before = WriteBudget(BUDGET, wall)
        assert before.allow(70)
        saved = json.dumps(before.state())
        for later, expected in ((0, 30), (24, 30), (25, 100), (9_000, 100), (-9_000, 30)):
            after = WriteBudget(BUDGET, Wall(HOUR + later))
            assert after.restore(json.loads(saved))
            assert after.left() == expected, later

    def test_what_was_spent_already_counts_beside_what_is_restored(self) -> None:
        wall = Wall()
        before = WriteBudget(BUDGET, wall)
        assert before.allow(70)
        wall.hour += 2
        after = WriteBudget(BUDGET, wall)
        assert after.allow(20)
        assert after.restore(before.state())
        assert after.left() == 10
        wall.hour += 23
        assert after.left() == 80

    def test_a_smaller_budget_after_a_restart(self) -> None:
        before = WriteBudget(BUDGET, Wall())
        assert before.allow(BUDGET)
        after = WriteBudget(10, Wall())
        assert after.restore(before.state())
        assert after.left() == 0

    @pytest.mark.parametrize(
        "state",
        [
            {},
            {"hour": 1},
            {"hour": "1", "spent": [0] * 25},
            {"hour": True, "spent": [0] * 25},
            {"hour": 1, "spent": [0] * 24},
            {"hour": 1, "spent": [0] * 24 + [-1]},
            {"hour": 1, "spent": [0] * 24 + [0.5]},
            {"hour": 1, "spent": None},
        ],
    )
    def test_what_is_no_state_changes_nothing(self, state: dict[str, object]) -> None:
        budget = WriteBudget(BUDGET, Wall())
        assert budget.allow(5)
        assert not budget.restore(state)
        assert budget.left() == BUDGET - 5


def test_hours_go_on_from_the_wall_clock_by_a_clock_that_nobody_sets() -> None:
    clock = FakeClock(77 * NS_PER_S)
    wall_hour = hours_since(HOUR * 3_600 + 1_800, clock)
    assert wall_hour() == HOUR
    clock.advance_ms(1_799_000)
    assert wall_hour() == HOUR
    clock.advance_ms(2_000)
    assert wall_hour() == HOUR + 1


class TestWriteRate:
    def test_it_fills_evenly_and_overflows(self) -> None:
        rate = WriteRate(2.0, 0)
        assert rate.left(0) == 120
        rate.spend(130)
        assert rate.left(0) == 0  # In debt by 10.
        assert rate.left(8 * NS_PER_S) == 6
        assert rate.left(8 * NS_PER_S, unit=4) == 1
        assert rate.left(10**15) == 120

    def test_without_one_any_amount_may_be_written(self) -> None:
        rate = WriteRate(0, 0)
        rate.spend(10**15)
        assert rate.left(0, unit=10**6) > 10**9

    def test_what_is_larger_than_a_minute_waits_for_a_whole_one(self) -> None:
        rate = WriteRate(2.0, 0)
        assert rate.left(0, unit=300) == 1
        rate.spend(300)
        assert rate.left(149 * NS_PER_S, unit=300) == 0
        assert rate.left(150 * NS_PER_S, unit=300) == 1
