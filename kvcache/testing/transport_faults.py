"""The part of a transport's contract that is about what goes wrong. Use ``transports.TransportContract``."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

import pytest

from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.testing.transport_pair import (
    CALM,
    CLOCK,
    LATE_NS,
    Guest,
    Notes,
    Pair,
    TransportHouse,
    contents,
    lost,
    soon,
    turns,
)
from kvcache.testing.transport_peer import digest, peer_bytes
from kvcache.transport.base import Limits, PeerLost, Ticket, TransferLate, TransferRefused

BIG = 8 << 20
AFTER_TURNS = (0, 1, 2, 3, 5, 8, 13, 21, 34)
WARY = Limits(heartbeat_ns=100 * NS_PER_MS, silence_ns=800 * NS_PER_MS)


def keep(filled: list[bytes], piece: memoryview) -> None:
    filled.append(bytes(piece))


class FaultContract(TransportHouse):
    """Deadlines, cancels, withdrawals, closes; peers that are silent, slow, or gone."""

    def address_of(self, pair: Pair) -> str:
        """Another address to listen at, beside the pair's."""
        return self.address

    def nobody(self, pair: Pair) -> str:
        """An address where nobody listens."""
        raise NotImplementedError

    @staticmethod
    def never() -> None:
        raise AssertionError("filled was called for a transfer that was refused")

    def test_a_deadline_that_is_past_changes_nothing(self) -> None:
        async def scenario(pair: Pair) -> None:
            source, into = self.filled_memory(30, [900]), self.rooms([900])
            ticket, past_ns = pair.far.export(source, soon()), CLOCK.now_ns() - 1
            with pytest.raises(TransferLate):
                await pair.near_end.read(ticket, into, past_ns)
            with pytest.raises(TransferLate):
                await pair.near_end.write(pair.far.post(into, soon(), self.never), source, past_ns)
            with pytest.raises(TransferLate):
                await pair.near_end.notify(b"late", past_ns)
            with pytest.raises(TransferLate):
                await pair.near.connect(pair.address, past_ns, Notes().hear)
            assert not any(into[0])
            await pair.near_end.read(ticket, into, soon())
            assert contents(into) == contents(source)

        self.play(scenario)

    @pytest.mark.timed
    @pytest.mark.slow
    def test_a_call_ends_by_its_deadline_and_writes_nothing_after(self) -> None:
        async def visit(guest: Guest) -> None:
            reading = await guest.ask("export", 4, BIG)
            writing = await guest.ask("post", 1, BIG)
            again = await guest.ask("export", 3, 1000)
            into, (source,) = self.rooms([BIG] * 4), self.filled_memory(31, [BIG])
            guest.peer.stop()
            started_ns, awake_ns = CLOCK.now_ns(), guest.stalls.awake_ns()
            results = await asyncio.gather(
                guest.end.read(reading, into, started_ns + 200 * NS_PER_MS),
                guest.end.write(writing, [source], started_ns + 300 * NS_PER_MS),
                return_exceptions=True,
            )
            ended_ns, took_ns = CLOCK.now_ns(), guest.stalls.awake_ns() - awake_ns
            before = contents(into)
            guest.peer.wake()
            assert [type(result) for result in results] == [TransferLate, TransferLate]
            assert ended_ns - started_ns >= 300 * NS_PER_MS
            assert took_ns <= 300 * NS_PER_MS + LATE_NS
            fence = self.rooms([1000] * 3)
            await guest.end.read(again, fence, soon())
            assert contents(fence) == peer_bytes(3, 1000)
            assert contents(into) == before

        self.visit(visit)

    @pytest.mark.timed
    @pytest.mark.slow
    def test_a_peer_that_stands_still_in_the_middle(self) -> None:
        async def visit(guest: Guest) -> None:
            for count in (1, 3, 5, 8):
                reading = await guest.ask("export", count, BIG)
                again = await guest.ask("export", 3, 1000)
                into = self.rooms([BIG] * count)
                deadline_ns = CLOCK.now_ns() + 400 * NS_PER_MS
                task = asyncio.ensure_future(guest.end.read(reading, into, deadline_ns))
                while not into[0][4096] and not task.done():
                    await asyncio.sleep(0)
                guest.peer.stop()
                with contextlib.suppress(TransferLate):  # It may have been whole by then.
                    await task
                    assert contents(into) == peer_bytes(count, BIG)
                ended_ns = CLOCK.now_ns()
                assert ended_ns - deadline_ns - guest.stalls.stood_ns(deadline_ns, ended_ns) <= LATE_NS
                before = contents(into)
                guest.peer.wake()
                fence = self.rooms([1000] * 3)
                await guest.end.read(again, fence, soon())
                assert contents(fence) == peer_bytes(3, 1000)
                assert contents(into) == before

        self.visit(visit)

    @pytest.mark.timed
    @pytest.mark.slow
    def test_a_silent_peer_is_lost(self) -> None:
        async def visit(guest: Guest) -> None:
            ticket = await guest.ask("export", 1, 1000)
            guest.peer.stop()
            started_ns = guest.stalls.awake_ns()
            with pytest.raises(PeerLost):
                await guest.end.read(ticket, self.rooms([1000]), soon())
            assert guest.stalls.awake_ns() - started_ns <= WARY.silence_ns + LATE_NS
            assert guest.end.is_lost
            with pytest.raises(PeerLost):
                await guest.end.notify(b"export 1 1", soon())
            guest.peer.wake()
            with pytest.raises(PeerLost):  # For good: who comes back makes a new endpoint.
                await guest.end.read(ticket, self.rooms([1000]), soon())

        self.visit(visit, WARY)

    @pytest.mark.timed
    @pytest.mark.slow
    def test_a_silent_peer_is_lost_when_nobody_asks_him(self) -> None:
        async def visit(guest: Guest) -> None:
            guest.peer.stop()
            started_ns = guest.stalls.awake_ns()
            await lost(guest.end)
            assert guest.stalls.awake_ns() - started_ns <= WARY.silence_ns + LATE_NS

        self.visit(visit, WARY)

    @pytest.mark.timed
    @pytest.mark.slow
    def test_an_idle_peer_that_lives_is_not_lost(self) -> None:
        async def visit(guest: Guest) -> None:
            until_ns = CLOCK.now_ns() + 3 * WARY.silence_ns
            while CLOCK.now_ns() < until_ns:
                assert not guest.end.is_lost
                await asyncio.sleep(0.002)
            ticket = await guest.ask("export", 1, 1000)
            into = self.rooms([1000])
            await guest.end.read(ticket, into, soon())
            assert contents(into) == peer_bytes(1, 1000)

        self.visit(visit, WARY)

    @pytest.mark.timed
    @pytest.mark.slow
    @pytest.mark.parametrize("size", [1000, BIG])
    def test_a_peer_that_is_gone_is_lost(self, size: int) -> None:
        async def visit(guest: Guest) -> None:
            ticket = await guest.ask("export", 4, size)
            into = self.rooms([size] * 4)
            if size == BIG:
                task = asyncio.ensure_future(guest.end.read(ticket, into, soon()))
                while not into[0][4096] and not task.done():
                    await asyncio.sleep(0)
                await guest.peer.kill()
                with contextlib.suppress(PeerLost):  # All may have come.
                    await task
                    assert contents(into) == peer_bytes(4, size)
            else:
                await guest.peer.kill()
            started_ns = guest.stalls.awake_ns()
            with pytest.raises(PeerLost):
                await guest.end.read(ticket, into, soon())
            assert guest.stalls.awake_ns() - started_ns <= WARY.silence_ns + LATE_NS
            assert guest.end.is_lost

        self.visit(visit, WARY)

    @pytest.mark.slow
    def test_a_peer_in_another_process_is_written_to(self) -> None:
        async def visit(guest: Guest) -> None:
            source = self.filled_memory(32, [300_000] * 3)
            ticket = await guest.ask("post", 3, 300_000)
            await guest.end.write(ticket, source, soon())
            assert (await guest.notes.first(2))[1] == b"filled " + digest(source)

        self.visit(visit)

    @pytest.mark.timed
    def test_nobody_there_is_a_peer_lost(self) -> None:
        async def scenario(pair: Pair) -> None:
            started_ns = pair.stalls.awake_ns()
            with pytest.raises((PeerLost, TransferLate)):
                await pair.near.connect(self.nobody(pair), CLOCK.now_ns() + NS_PER_S, Notes().hear)
            assert pair.stalls.awake_ns() - started_ns <= NS_PER_S + LATE_NS

        self.play(scenario)

    @pytest.mark.slow
    def test_a_cancelled_read_writes_nothing_more(self) -> None:
        async def scenario(pair: Pair) -> None:
            for after in AFTER_TURNS:
                source, into = self.filled_memory(33, [BIG, 1000]), self.rooms([BIG, 1000])
                ticket = pair.far.export(source, soon())
                task = asyncio.ensure_future(pair.near_end.read(ticket, into, soon()))
                await turns(after)
                task.cancel()
                await asyncio.wait([task])
                before = contents(into)
                await self.fence(pair)
                assert contents(into) == before
                await pair.far.withdraw(ticket)

        self.play(scenario)

    @pytest.mark.slow
    def test_a_cancelled_write_is_not_filled_and_leaves_the_memory_alone(self) -> None:
        async def scenario(pair: Pair) -> None:
            for after in AFTER_TURNS:
                source, into = self.filled_memory(34, [BIG, 1000]), self.rooms([BIG, 1000])
                filled: list[bytes] = []
                ticket = pair.far.post(into, soon(), partial(keep, filled, into[0]))
                expected = bytes(source[0])
                task = asyncio.ensure_future(pair.near_end.write(ticket, source, soon()))
                await turns(after)
                task.cancel()
                await asyncio.wait([task])
                source[0][:] = bytes(BIG)  # Ours again: what goes on reading it would send zeroes.
                await pair.far.withdraw(ticket)
                before = contents(into)
                await self.fence(pair)
                assert contents(into) == before
                assert filled in ([], [expected])  # Whole, when it was too late to cancel it.

        self.play(scenario)

    async def fence(self, pair: Pair) -> None:
        """Whatever was still under way is here, or was thrown away."""
        source, into = self.filled_memory(35, [70_000]), self.rooms([70_000])
        await pair.near_end.read(pair.far.export(source, soon()), into, soon())
        assert contents(into) == contents(source)
        await pair.near_end.write(pair.far.post(source, soon(), lambda: None), into, soon())

    def test_what_was_withdrawn_is_refused(self) -> None:
        async def scenario(pair: Pair) -> None:
            source, into = self.filled_memory(36, [900]), self.rooms([900])
            reading, posted = pair.far.export(source, soon()), self.rooms([900])
            writing = pair.far.post(posted, soon(), self.never)
            for ticket in (reading, writing, reading, Ticket(bytes(len(reading)))):
                await pair.far.withdraw(ticket)
            with pytest.raises(TransferRefused):
                await pair.near_end.read(reading, into, soon())
            with pytest.raises(TransferRefused):
                await pair.near_end.write(writing, source, soon())
            assert not any(into[0])
            assert not any(posted[0])

        self.play(scenario)

    @pytest.mark.slow
    def test_after_a_withdrawal_no_transfer_reads_the_memory(self) -> None:
        async def scenario(pair: Pair) -> None:
            for after in AFTER_TURNS:
                source, into = self.filled_memory(37, [BIG, 1000]), self.rooms([BIG, 1000])
                expected, ticket = contents(source), pair.far.export(source, soon())
                task = asyncio.ensure_future(pair.near_end.read(ticket, into, soon()))
                await turns(after)
                await pair.far.withdraw(ticket)
                source[0][:] = bytes(BIG)
                with contextlib.suppress(TransferRefused):
                    await task
                    assert contents(into) == expected

        self.play(scenario)

    @pytest.mark.slow
    def test_after_a_withdrawal_no_transfer_fills_the_memory(self) -> None:
        async def scenario(pair: Pair) -> None:
            for after in AFTER_TURNS:
                source, into = self.filled_memory(38, [BIG, 1000]), self.rooms([BIG, 1000])
                filled: list[bool] = []
                ticket = pair.far.post(into, soon(), partial(filled.append, True))
                task = asyncio.ensure_future(pair.near_end.write(ticket, source, soon()))
                await turns(after)
                await pair.far.withdraw(ticket)
                before, was_filled = contents(into), bool(filled)
                (result,) = await asyncio.gather(task, return_exceptions=True)
                assert result is None if was_filled else isinstance(result, TransferRefused)
                assert bool(filled) == was_filled
                await self.fence(pair)
                assert contents(into) == before

        self.play(scenario)

    @pytest.mark.slow
    @pytest.mark.parametrize("who", ["near", "far"])
    def test_a_close_in_the_middle(self, who: str) -> None:
        async def scenario(pair: Pair) -> None:
            source, into, posted = self.filled_memory(39, [BIG]), self.rooms([BIG]), self.rooms([BIG])
            calls = [
                asyncio.ensure_future(pair.near_end.read(pair.far.export(source, soon()), into, soon())),
                asyncio.ensure_future(
                    pair.near_end.write(pair.far.post(posted, soon(), self.never), source, soon())
                ),
            ]
            await turns(2)
            await (pair.near_end if who == "near" else pair.far_end).close()
            before = contents(into if who == "near" else posted)
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(result) for result in results] == [PeerLost, PeerLost]
            assert contents(into if who == "near" else posted) == before
            await lost(pair.near_end)
            await lost(pair.far_end)
            await pair.near_end.close()
            for end in (pair.near_end, pair.far_end):
                with pytest.raises(PeerLost):
                    await end.read(Ticket(b"x"), into, soon())
                with pytest.raises(PeerLost):
                    await end.write(Ticket(b"x"), source, soon())
                with pytest.raises(PeerLost):
                    await end.notify(b"x", soon())

        self.play(scenario)

    @pytest.mark.slow
    def test_a_transport_ends_everything_it_has(self) -> None:
        async def scenario(pair: Pair) -> None:
            source, into = self.filled_memory(40, [BIG]), self.rooms([BIG])
            reading = asyncio.ensure_future(pair.near_end.read(pair.far.export(source, soon()), into, soon()))
            await turns(2)
            await pair.far.close()
            await pair.far.close()
            source[0][:] = bytes(BIG)
            with pytest.raises(PeerLost):
                await reading
            with pytest.raises((PeerLost, TransferLate)):
                await pair.near.connect(pair.address, CLOCK.now_ns() + NS_PER_S, Notes().hear)

        self.play(scenario, CALM)
