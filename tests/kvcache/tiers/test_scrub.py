"""The scrubber on a clock that goes when it sleeps: order, pace, giving way, counts."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.block import Slot
from kvcache.clock import NS_PER_S
from kvcache.testing.clock import FakeClock
from kvcache.tiers.scrub import BEFORE_ALL, GONE, Pace, Scrubber, ScrubSettings, ScrubTarget, Verdict

BLOCK = 2_000_000
READ_MS = 1
SHARE = 0.05


class Ended(Exception):
    """The test has seen enough."""


class Tier:
    """Slots that are held, and a clock that goes on while they are read and while the scrubber sleeps."""

    def __init__(self, slots: Sequence[int], settings: ScrubSettings | None = None, start: int = -1) -> None:
        self.slots = sorted(slots)
        self.clock = FakeClock()
        self.reasons: dict[int, str] = {}
        self.seen: list[int] = []
        self.slept: list[float] = []
        self.busy_until_ns = 0
        self.end_ns = 10**30
        self.on_verify: Callable[[int], None] = lambda slot: None
        target = ScrubTarget(self.following, lambda: len(self.slots), self.verify, self.busy)
        self.scrubber = Scrubber(
            target, self.clock, self.sleep, settings or ScrubSettings(share=SHARE), Slot(start)
        )

    def following(self, slot: Slot) -> Sequence[Slot]:
        at = bisect_right(self.slots, slot)
        return [Slot(each) for each in self.slots[at : at + 3]]

    async def verify(self, slot: Slot) -> Verdict:
        self.seen.append(slot)
        self.on_verify(slot)
        if slot not in self.slots:
            return Verdict(0, GONE)
        self.clock.advance_ms(READ_MS)
        return Verdict(BLOCK, self.reasons.get(slot, ""))

    def busy(self) -> bool:
        return self.clock.now_ns() < self.busy_until_ns

    async def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.slept.append(seconds)
        self.clock.advance_ms(round(seconds * 1_000))
        if self.clock.now_ns() >= self.end_ns:
            raise Ended

    def one_pass(self) -> None:
        asyncio.run(self.scrubber.one_pass())

    def run(self, seconds: float) -> None:
        self.end_ns = self.clock.now_ns() + int(seconds * NS_PER_S)
        with pytest.raises(Ended):
            asyncio.run(self.scrubber.run())

    @property
    def now_s(self) -> float:
        return self.clock.now_ns() / NS_PER_S


def test_every_block_once_in_slot_order() -> None:
    tier = Tier([7, 3, 11, 5, 2, 13, 17])
    tier.one_pass()
    assert tier.seen == [2, 3, 5, 7, 11, 13, 17]
    assert tier.scrubber.values() == {
        "scrub_passes": 1,
        "scrubbed_blocks": 7,
        "scrub_bad_blocks": 0,
        "scrub_left_blocks": 0,
    }
    assert tier.scrubber.scrubbed_bytes == 7 * BLOCK
    assert tier.scrubber.position == BEFORE_ALL


def test_bad_blocks_are_counted_by_reason() -> None:
    tier = Tier(range(10))
    tier.reasons = {2: "checksum", 3: "header", 8: "checksum"}
    tier.one_pass()
    tier.one_pass()
    assert tier.scrubber.bad == {"checksum": 4, "header": 2}
    assert tier.scrubber.values()["scrub_bad_blocks"] == 6


def test_reads_take_their_share_of_the_time() -> None:
    tier = Tier(range(100))
    tier.one_pass()
    reading_s = 100 * READ_MS / 1_000
    assert reading_s + sum(tier.slept) == pytest.approx(reading_s / SHARE)


def test_a_pass_that_was_asked_for_takes_a_larger_share_and_the_next_does_not() -> None:
    tier = Tier(range(10), ScrubSettings(share=0.1, asked_share=0.5))
    tier.scrubber.start_now()
    tier.one_pass()
    assert tier.slept == pytest.approx([READ_MS / 1_000] * 10)
    tier.slept.clear()
    tier.one_pass()
    assert tier.slept == pytest.approx([9 * READ_MS / 1_000] * 10)


@given(
    share=st.floats(0.001, 1),
    reads=st.lists(st.tuples(st.integers(1, 1 << 30), st.integers(1, 10**8)), min_size=1),
)
def test_a_rest_is_never_negative_and_never_for_ever(share: float, reads: list[tuple[int, int]]) -> None:
    pace = Pace()
    for read_bytes, duration_ns in reads:
        assert 0 <= pace.rest_s(share, read_bytes, duration_ns) <= 30
        assert pace.rest_s(share, 0, duration_ns) == 0


def test_a_share_of_all_never_rests() -> None:
    pace = Pace()
    assert pace.rest_s(1, BLOCK, 5_000) == pytest.approx(0)


def test_gives_way_to_others() -> None:
    tier = Tier([1, 2], ScrubSettings(share=1))
    tier.busy_until_ns = tier.clock.now_ns() + NS_PER_S // 2
    starts: list[float] = []
    tier.on_verify = lambda slot: starts.append(tier.now_s)
    tier.one_pass()
    assert 1.5 <= starts[0] <= 1.53
    assert starts[1] - starts[0] < 0.01


def test_a_node_that_is_never_idle_is_scrubbed_too() -> None:
    tier = Tier(range(5), ScrubSettings(share=1, yield_s=2))
    tier.busy_until_ns = 10**30
    starts: list[float] = []
    tier.on_verify = lambda slot: starts.append(tier.now_s)
    tier.one_pass()
    assert starts == pytest.approx([3.0, 5.0, 7.0, 9.0, 11.0], abs=0.05)


def test_blocks_come_and_go_while_a_pass_lasts() -> None:
    tier = Tier(range(0, 100, 10))
    tier.reasons = {45: "checksum"}

    def change(slot: int) -> None:
        if slot == 30:
            tier.slots = [5, 40, 45, 95, 99]  # 50 was in nobody's batch yet, 40 stays; 5 is behind already.

    tier.on_verify = change
    tier.one_pass()
    assert tier.seen == [0, 10, 20, 30, 40, 50, 95, 99], "50 had been told with 30 and 40, and is gone"
    assert tier.scrubber.scrubbed_blocks == 6, "30 and 50 were gone"
    tier.one_pass()
    assert tier.seen[8:] == [5, 40, 45, 95, 99]
    assert tier.scrubber.bad == {"checksum": 1}


def test_left_goes_down_and_is_nought_at_rest_only() -> None:
    tier = Tier(range(4))
    left: list[int] = []
    tier.on_verify = lambda slot: left.append(tier.scrubber.left_blocks)
    assert tier.scrubber.left_blocks == 0
    tier.one_pass()
    assert left == [4, 3, 2, 1]
    assert tier.scrubber.left_blocks == 0


def test_more_came_than_were_there() -> None:
    tier = Tier([0])
    left: list[int] = []

    def grow(slot: int) -> None:
        left.append(tier.scrubber.left_blocks)
        if slot < 5:
            tier.slots.append(slot + 1)

    tier.on_verify = grow
    tier.one_pass()
    assert left == [1] * 6
    assert tier.scrubber.left_blocks == 0


def test_start_now_ends_the_pass_and_begins_again() -> None:
    tier = Tier(range(6))

    def ask(slot: int) -> None:
        if slot == 3 and tier.seen.count(3) == 1:
            tier.scrubber.start_now()
            assert tier.scrubber.left_blocks == 6

    tier.on_verify = ask
    tier.one_pass()
    assert tier.seen == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert tier.scrubber.passes == 1, "the one that was cut short is none"


def test_start_now_at_the_very_last_block() -> None:
    tier = Tier(range(3))
    tier.on_verify = lambda slot: tier.scrubber.start_now() if slot == 2 and tier.seen.count(2) == 1 else None
    tier.one_pass()
    assert tier.seen == [0, 1, 2, 0, 1, 2]
    assert tier.scrubber.passes == 1


def test_start_now_does_not_wait_for_the_rest_to_end() -> None:
    tier = Tier(range(3), ScrubSettings(share=1, every_s=1_000))
    tier.run(100)
    assert tier.scrubber.passes == 1
    tier.scrubber.start_now()
    assert tier.scrubber.left_blocks == 3
    tier.run(0.01)
    assert tier.scrubber.passes == 2


def test_start_now_on_an_empty_tier() -> None:
    tier = Tier([])
    tier.scrubber.start_now()
    assert tier.scrubber.left_blocks == 1
    tier.run(5)
    assert tier.scrubber.passes == 1
    assert tier.scrubber.left_blocks == 0


def test_a_pass_starts_each_period() -> None:
    tier = Tier(range(3), ScrubSettings(share=1, every_s=100))
    tier.run(350)
    assert tier.scrubber.passes == 4


def test_a_pass_longer_than_the_period_is_followed_by_the_next() -> None:
    tier = Tier(range(1_000), ScrubSettings(share=0.01, every_s=10))
    tier.run(250)  # Of 100 s each.
    assert tier.scrubber.passes == 2


def test_a_share_of_nought_scrubs_when_asked_only() -> None:
    tier = Tier(range(3), ScrubSettings(share=0))
    tier.run(10_000)
    assert tier.seen == []
    tier.scrubber.start_now()
    tier.run(10_000)
    assert tier.seen == [0, 1, 2]


def test_goes_on_where_an_earlier_node_was() -> None:
    tier = Tier(range(6), start=3)
    tier.one_pass()
    tier.one_pass()
    assert tier.seen == [4, 5, 0, 1, 2, 3, 4, 5]


def test_cancelled_while_it_reads_it_repeats_that_block() -> None:
    tier = Tier(range(6))

    def cut(slot: int) -> None:
        if slot == 4 and tier.seen.count(4) == 1:
            raise Ended

    tier.on_verify = cut
    with pytest.raises(Ended):
        tier.one_pass()
    assert tier.scrubber.position == 3
    tier.one_pass()
    assert tier.seen == [0, 1, 2, 3, 4, 4, 5]
