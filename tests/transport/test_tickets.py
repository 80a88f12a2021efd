"""Tickets: good once, for their time, for what they were given for; and a withdrawal that means it."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvcache.clock import NS_PER_MS
from kvcache.testing.clock import FakeClock
from kvcache.transport.base import Ticket, TransferRefused
from kvcache.transport.tickets import TOKEN_BYTES, Book, Use

SIZES = [3, 5]


def pieces() -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in SIZES]


class Fixture:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.book = Book(self.clock)
        self.filled = 0

    def until(self, milliseconds: int = 100) -> int:
        return self.clock.now_ns() + milliseconds * NS_PER_MS

    def count(self) -> None:
        self.filled += 1


@pytest.fixture
def fixture() -> Fixture:
    return Fixture()


def test_a_ticket_is_random_and_of_one_length(fixture: Fixture) -> None:
    tickets = {fixture.book.export(pieces(), fixture.until()) for _ in range(100)}
    assert len(tickets) == 100
    assert {len(ticket) for ticket in tickets} == {TOKEN_BYTES}


def test_it_gives_the_pieces_once(fixture: Fixture) -> None:
    mine = pieces()
    ticket = fixture.book.export(mine, fixture.until())
    use = fixture.book.take_export(ticket, SIZES)
    assert all(given is piece for given, piece in zip(use.pieces, mine, strict=True))
    with pytest.raises(TransferRefused):
        fixture.book.take_export(ticket, SIZES)
    use.complete()
    with pytest.raises(TransferRefused):
        fixture.book.take_export(ticket, SIZES)


@pytest.mark.parametrize("sizes", [[], [3], [5, 3], [3, 5, 0], [3, 4], [8]])
def test_other_sizes_are_refused_and_spend_it(fixture: Fixture, sizes: list[int]) -> None:
    ticket = fixture.book.export(pieces(), fixture.until())
    for asked in (sizes, SIZES):
        with pytest.raises(TransferRefused):
            fixture.book.take_export(ticket, asked)


def test_what_was_withdrawn_takes_no_memory_until_its_time_is_over(fixture: Fixture) -> None:
    """That of a ticket to write is the longest lease: as much as a day."""

    async def work() -> int:
        kept = fixture.book.export(pieces(), fixture.until(10))
        tracemalloc.start()
        for _ in range(5_000):
            await fixture.book.withdraw(fixture.book.export(pieces(), fixture.until(86_400_000)))
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(fixture.book) == 1, "the one that is out still is"
        fixture.clock.advance_ms(10)
        fixture.book.export(pieces(), fixture.until())
        assert len(fixture.book) == 1, "and ends in time"
        with pytest.raises(TransferRefused):
            fixture.book.take_export(kept, SIZES)
        return size

    assert asyncio.run(work()) < 500_000


def test_the_other_direction_is_refused(fixture: Fixture) -> None:
    with pytest.raises(TransferRefused):
        fixture.book.take_post(fixture.book.export(pieces(), fixture.until()), SIZES)
    with pytest.raises(TransferRefused):
        fixture.book.take_export(fixture.book.post(pieces(), fixture.until(), fixture.count), SIZES)
    assert fixture.filled == 0


def test_its_time_ends_at_the_moment_that_was_said(fixture: Fixture) -> None:
    early, late = (fixture.book.export(pieces(), fixture.until(100)) for _ in range(2))
    fixture.clock.advance_ms(99)
    fixture.book.take_export(early, SIZES)
    fixture.clock.advance_ms(1)
    with pytest.raises(TransferRefused, match="expired"):
        fixture.book.take_export(late, SIZES)


def test_a_transfer_that_has_begun_may_go_on_past_the_time(fixture: Fixture) -> None:
    use = fixture.book.take_post(fixture.book.post(pieces(), fixture.until(), fixture.count), SIZES)
    fixture.clock.advance_ms(10_000)
    fixture.book.export(pieces(), fixture.until())
    assert not use.is_stopped
    use.complete()
    assert fixture.filled == 1


def test_filled_is_said_once_and_only_of_what_is_complete(fixture: Fixture) -> None:
    use = fixture.book.take_post(fixture.book.post(pieces(), fixture.until(), fixture.count), SIZES)
    use.complete()
    use.end()
    assert fixture.filled == 1
    other = fixture.book.take_post(fixture.book.post(pieces(), fixture.until(), fixture.count), SIZES)
    other.end()
    with pytest.raises(AssertionError):
        other.complete()
    assert fixture.filled == 1


def test_nothing_is_kept_of_what_is_over(fixture: Fixture) -> None:
    for _ in range(10):
        fixture.book.export(pieces(), fixture.until(50))
    running = fixture.book.take_export(fixture.book.export(pieces(), fixture.until(50)), SIZES)
    fixture.clock.advance_ms(50)
    fixture.book.export(pieces(), fixture.until(50))
    assert len(fixture.book) == 2  # The one that runs, so that it can be withdrawn, and the new one.
    running.end()
    fixture.clock.advance_ms(50)
    last = fixture.book.export(pieces(), fixture.until(50))
    asyncio.run(fixture.book.withdraw(last))
    assert len(fixture.book) == 0


def test_pieces_are_flat_bytes_and_what_is_posted_can_be_written(fixture: Fixture) -> None:
    for wrong in ([], [memoryview(b"")], [memoryview(bytearray(8)).cast("I")]):
        with pytest.raises(AssertionError):
            fixture.book.export(wrong, fixture.until())
    with pytest.raises(AssertionError):
        fixture.book.post([memoryview(b"const")], fixture.until(), fixture.count)


def test_a_withdrawal_waits_for_the_transfer_that_runs(fixture: Fixture) -> None:
    async def main() -> None:
        ticket = fixture.book.export(pieces(), fixture.until())
        use = fixture.book.take_export(ticket, SIZES)
        waits = [asyncio.ensure_future(fixture.book.withdraw(ticket)) for _ in range(2)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert use.is_stopped
        assert not any(wait.done() for wait in waits)
        use.end()
        await asyncio.gather(*waits)
        assert len(fixture.book) == 0

    asyncio.run(main())


def test_a_transfer_that_can_stop_is_told_to(fixture: Fixture) -> None:
    async def main() -> None:
        ticket = fixture.book.export(pieces(), fixture.until())
        use = fixture.book.take_export(ticket, SIZES)
        use.when_stopped(use.end)
        await fixture.book.withdraw(ticket)
        assert use.is_over
        late = Use(pieces(), None)
        stopping = asyncio.ensure_future(late.stopped())
        await asyncio.sleep(0)
        late.when_stopped(late.end)  # It was too late to be told, and is told all the same.
        await stopping

    asyncio.run(main())


def test_a_closed_book_has_nothing(fixture: Fixture) -> None:
    ticket = fixture.book.export(pieces(), fixture.until())
    asyncio.run(fixture.book.close())
    asyncio.run(fixture.book.close())
    with pytest.raises(TransferRefused):
        fixture.book.take_export(ticket, SIZES)


class AnyOrder(RuleBasedStateMachine):
    """Of any order of steps: a ticket is taken at most once, in its time, and never after a withdrawal."""

    tickets = Bundle("tickets")
    uses = Bundle("uses")

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.book = Book(self.clock)
        self.good: dict[Ticket, int] = {}
        self.filled = 0
        self.completed = 0

    @rule(target=tickets, milliseconds=st.integers(0, 20))
    def post(self, milliseconds: int) -> Ticket:
        until_ns = self.clock.now_ns() + milliseconds * NS_PER_MS
        ticket = self.book.post(pieces(), until_ns, self._fill)
        self.good[ticket] = until_ns
        return ticket

    @rule(target=uses, ticket=tickets, sizes=st.sampled_from([SIZES, SIZES, [8]]))
    def take(self, ticket: Ticket, sizes: list[int]) -> Use | None:
        until_ns = self.good.pop(ticket, 0)
        if until_ns <= self.clock.now_ns() or sizes != SIZES:
            with pytest.raises(TransferRefused):
                self.book.take_post(ticket, sizes)
            return None
        use = self.book.take_post(ticket, sizes)
        use.when_stopped(use.end)
        return use

    @rule(use=consumes(uses), whole=st.booleans())
    def end(self, use: Use | None, whole: bool) -> None:
        if use is None:
            return
        if whole and not use.is_over:
            self.completed += 1
            use.complete()
        use.end()

    @rule(ticket=tickets)
    def withdraw(self, ticket: Ticket) -> None:
        self.good.pop(ticket, None)
        asyncio.run(self.book.withdraw(ticket))

    @rule(milliseconds=st.integers(0, 15))
    def wait(self, milliseconds: int) -> None:
        self.clock.advance_ms(milliseconds)

    @invariant()
    def told_of_each_that_is_complete(self) -> None:
        assert self.filled == self.completed

    def _fill(self) -> None:
        self.filled += 1


@pytest.mark.slow
class TestAnyOrder(AnyOrder.TestCase):  # type: ignore[misc]  # hypothesis makes it when asked.
    settings = settings(max_examples=50, stateful_step_count=30)
