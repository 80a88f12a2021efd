"""What is in flight is bounded, and what waits goes in order, leaves when late, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from kvcache.clock import NS_PER_MS, NS_PER_S, SystemClock
from kvcache.testing.stalls import Stalls
from kvcache.transport.base import Limits, PeerLost, Priority, TransferLate
from kvcache.transport.flow import Flow, Gate, until

CLOCK = SystemClock()


def soon() -> int:
    return CLOCK.now_ns() + 20 * NS_PER_S


def flow(endpoint_bytes: int = 10, total_bytes: int = 15) -> Flow:
    return Flow(Limits(endpoint_bytes, total_bytes), CLOCK)


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    asyncio.run(main())


class Holder:
    """A transfer that ends when told to."""

    def __init__(self, gate: Gate, byte_count: int, priority: Priority = Priority.DECODE) -> None:
        self._end = asyncio.Event()
        self.is_in = False
        self.task = asyncio.ensure_future(self._run(gate, byte_count, priority))

    async def _run(self, gate: Gate, byte_count: int, priority: Priority) -> None:
        async with gate.hold(byte_count, priority, soon()):
            self.is_in = True
            await self._end.wait()

    async def end(self) -> None:
        self._end.set()
        await self.task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_an_endpoint_and_all_together_have_their_bounds() -> None:
    async def scenario() -> None:
        whole = flow()
        one, other = whole.gate(), whole.gate()
        first = [Holder(one, 6), Holder(one, 4), Holder(one, 1), Holder(other, 5), Holder(other, 1)]
        await settle()
        assert [holder.is_in for holder in first] == [True, True, False, True, False]
        assert (one.bytes_in_flight, other.bytes_in_flight, whole.total_bytes) == (10, 5, 15)
        await first[1].end()
        await settle()
        assert [holder.is_in for holder in first] == [True, True, True, True, True]
        assert whole.total_bytes == 13
        for holder in first:
            await holder.end()
        assert whole.total_bytes == 0

    play(scenario)


def test_the_better_goes_first_then_the_older() -> None:
    async def scenario() -> None:
        gate = flow().gate()
        running = Holder(gate, 10)
        await settle()
        order = [Priority.REPLICATE, Priority.PREFETCH, Priority.DECODE, Priority.PREFETCH, Priority.DECODE]
        waiting = [Holder(gate, 10, priority) for priority in order]
        await settle()
        seen = []
        for _ in order:
            await running.end()
            await settle()
            (at,) = [at for at, holder in enumerate(waiting) if holder.is_in and at not in seen]
            seen.append(at)
            running = waiting[at]
        await running.end()
        assert seen == [2, 4, 1, 3, 0]

    play(scenario)


def test_a_small_one_does_not_overtake_a_large_one() -> None:
    async def scenario() -> None:
        whole = flow(10, 15)
        one, other, third = whole.gate(), whole.gate(), whole.gate()
        holders = [Holder(one, 10), Holder(other, 8), Holder(third, 1, Priority.PREFETCH)]
        await settle()
        assert [holder.is_in for holder in holders] == [True, False, False]
        await holders[0].end()
        await settle()
        assert all(holder.is_in for holder in holders)
        for holder in holders[1:]:
            await holder.end()

    play(scenario)


def test_a_full_endpoint_holds_up_nobody_else() -> None:
    async def scenario() -> None:
        whole = flow(10, 15)
        full, free = whole.gate(), whole.gate()
        holders = [Holder(full, 10), Holder(full, 5), Holder(free, 5, Priority.REPLICATE)]
        await settle()
        assert [holder.is_in for holder in holders] == [True, False, True]
        for holder in holders:
            await holder.end()

    play(scenario)


def test_what_is_larger_than_the_bounds_goes_alone() -> None:
    async def scenario() -> None:
        whole = flow(10, 15)
        one, other = whole.gate(), whole.gate()
        small, huge, after = Holder(other, 1), Holder(one, 100), Holder(other, 1)
        await settle()
        assert [small.is_in, huge.is_in, after.is_in] == [True, False, False]
        await small.end()
        await settle()
        assert [huge.is_in, after.is_in] == [True, False]
        await huge.end()
        await settle()
        assert after.is_in
        await after.end()

    play(scenario)


@pytest.mark.timed
def test_who_waits_leaves_at_the_deadline_and_lets_others_pass() -> None:
    async def scenario() -> None:
        whole = flow()
        gate = whole.gate()
        running = Holder(gate, 8)
        await settle()
        started_ns, awake_ns = CLOCK.now_ns(), stalls.awake_ns()

        async def late() -> None:
            async with gate.hold(10, Priority.DECODE, started_ns + 20 * NS_PER_MS):
                raise AssertionError("there is no room")

        large = asyncio.ensure_future(late())
        await settle()
        small = Holder(gate, 2)
        await settle()
        assert not small.is_in or large.done()
        with pytest.raises(TransferLate):
            await large
        assert CLOCK.now_ns() - started_ns >= 20 * NS_PER_MS
        assert stalls.awake_ns() - awake_ns < 270 * NS_PER_MS
        await settle()
        assert small.is_in
        await running.end()
        await small.end()
        assert whole.total_bytes == 0

    with Stalls() as stalls:
        play(scenario)


def test_a_deadline_ends_what_is_inside_and_gives_the_room_back() -> None:
    async def scenario() -> None:
        whole = flow()
        gate = whole.gate()
        with pytest.raises(TransferLate):
            async with gate.hold(10, Priority.DECODE, CLOCK.now_ns() + 10 * NS_PER_MS):
                await asyncio.Event().wait()
        with pytest.raises(TransferLate):
            async with gate.hold(10, Priority.DECODE, CLOCK.now_ns() - 1):
                raise AssertionError("it was past")
        assert whole.total_bytes == 0

    play(scenario)


def test_a_timeout_of_somebody_elses_is_not_ours() -> None:
    async def scenario() -> None:
        with pytest.raises(TimeoutError):
            async with until(soon(), CLOCK):
                raise TimeoutError("the system's")

    play(scenario)


def test_a_closed_gate_sends_everybody_away_and_frees_what_it_held() -> None:
    async def scenario() -> None:
        whole = flow(10, 10)
        gate, other = whole.gate(), whole.gate()
        running, waiting, behind = Holder(gate, 10), Holder(gate, 1), Holder(other, 10)
        await settle()
        gate.close("gone")
        gate.close("again")
        with pytest.raises(PeerLost, match="gone"):
            await waiting.task
        with pytest.raises(PeerLost, match="gone"):
            async with gate.hold(1, Priority.DECODE, soon()):
                raise AssertionError("it is closed")
        assert not behind.is_in
        await running.end()
        await settle()
        assert behind.is_in
        await behind.end()
        assert whole.total_bytes == 0

    play(scenario)


def test_a_gate_that_closes_is_in_nobodys_way() -> None:
    async def scenario() -> None:
        whole = flow(10, 10)
        running, gone, behind = whole.gate(), whole.gate(), whole.gate()
        first, large, small = Holder(running, 8), Holder(gone, 10), Holder(behind, 2)
        await settle()
        assert not small.is_in
        gone.close()
        await settle()
        assert small.is_in
        with pytest.raises(PeerLost):
            await large.task
        await first.end()
        await small.end()

    play(scenario)


@pytest.mark.parametrize("turns", range(6))
def test_a_cancel_at_any_time_loses_no_room(turns: int) -> None:
    async def scenario() -> None:
        whole = flow()
        gate = whole.gate()
        running = Holder(gate, 10)
        await settle()
        waiting = Holder(gate, 10)
        await settle()
        ending = asyncio.ensure_future(running.end())
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.task.cancel()
        await asyncio.wait([waiting.task, ending])
        assert whole.total_bytes == 0
        after = Holder(gate, 10)
        await settle()
        assert after.is_in
        await after.end()

    play(scenario)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_random_crowd_keeps_the_bounds_and_ends(seed: int) -> None:
    draw = random.Random(seed)

    async def scenario() -> None:
        whole = flow(100, 250)
        gates = [whole.gate() for _ in range(4)]
        counts = {id(gate): 0 for gate in gates}

        async def one(gate: Gate, byte_count: int) -> None:
            deadline_ns = CLOCK.now_ns() + draw.choice([NS_PER_MS, 60 * NS_PER_S])
            async with gate.hold(byte_count, draw.choice(list(Priority)), deadline_ns):
                counts[id(gate)] += byte_count
                in_flight = gate.bytes_in_flight  # Of who has the right to go; not all may know it yet.
                assert counts[id(gate)] <= in_flight
                assert in_flight <= 100 or in_flight == byte_count
                assert sum(counts.values()) <= whole.total_bytes <= 250
                try:
                    for _ in range(draw.randrange(4)):
                        await asyncio.sleep(0)
                finally:
                    counts[id(gate)] -= byte_count

        tasks = [asyncio.ensure_future(one(draw.choice(gates), draw.randrange(1, 130))) for _ in range(400)]
        for task in draw.sample(tasks, 60):
            await asyncio.sleep(0)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = {type(result) for result in results}
        assert kinds <= {type(None), TransferLate, asyncio.CancelledError}, kinds
        assert sum(result is None for result in results) > 100
        assert whole.total_bytes == 0

    play(scenario)
