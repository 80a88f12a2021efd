"""The contract of a transport: every rule of ``kvcache.transport.base``, as tests.

Subclass ``TransportContract``; give ``address`` and ``make``, and what else of ``TransportHouse`` does not
fit. This file has what a healthy pair does; ``transport_faults`` has deadlines, cancels and bad peers.
"""

from __future__ import annotations

import asyncio
import mmap
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.clock import NS_PER_S
from kvcache.errors import BadInput
from kvcache.testing.transport_faults import FaultContract
from kvcache.testing.transport_pair import CALM, CLOCK, Notes, Pair, contents, noise, soon, turns
from kvcache.transport.base import (
    NOTE_BYTES_MAX,
    TICKET_BYTES_MAX,
    Limits,
    PeerLost,
    Priority,
    Ticket,
    TransferLate,
    TransferRefused,
)

SIZES = (1, 65, 4096, 3, 70_000, 64, 300_001)
MIB = 1 << 20


class TransportContract(FaultContract):
    """Every transport."""

    def test_a_read_brings_what_was_exported(self) -> None:
        async def scenario(pair: Pair) -> None:
            source, into = self.filled_memory(1, SIZES), self.rooms(SIZES)
            ticket = pair.far.export(source, soon())
            assert len(ticket) <= TICKET_BYTES_MAX
            await pair.near_end.read(ticket, into, soon())
            assert contents(into) == contents(source)

        self.play(scenario)

    def test_a_write_brings_what_was_handed_in_and_says_so(self) -> None:
        async def scenario(pair: Pair) -> None:
            source, into = self.filled_memory(2, SIZES), self.rooms(SIZES)
            seen: list[list[bytes]] = []
            ticket = pair.far.post(into, soon(), lambda: seen.append(contents(into)))
            assert len(ticket) <= TICKET_BYTES_MAX
            await pair.near_end.write(ticket, source, soon())
            assert seen == [contents(source)]  # Once, and the bytes were there.

        self.play(scenario)

    def test_he_who_was_called_can_read_and_write_as_well(self) -> None:
        async def scenario(pair: Pair) -> None:
            source, into = self.filled_memory(3, SIZES), self.rooms(SIZES)
            await pair.far_end.read(pair.near.export(source, soon()), into, soon())
            assert contents(into) == contents(source)
            back, filled = self.rooms(SIZES), asyncio.Event()
            await pair.far_end.write(pair.near.post(back, soon(), filled.set), into, soon())
            assert filled.is_set()
            assert contents(back) == contents(source)

        self.play(scenario)

    def test_registered_memory_and_other_memory_give_the_same(self) -> None:
        async def scenario(pair: Pair) -> None:
            region, target = self.memory(1 << 20), self.memory(1 << 20)
            region[:] = noise(4, 1 << 20)
            pair.far.register(region)
            pair.near.register(target)
            await self.prepared(pair.far, region)
            await self.prepared(pair.near, target)
            pieces = [region[at : at + 65_536] for at in range(0, 1 << 20, 131_072)]
            into = [target[at : at + 65_536] for at in range(65_536, 1 << 20, 131_072)]
            await pair.near_end.read(pair.far.export(pieces, soon()), into, soon())
            assert contents(into) == contents(pieces)
            assert not any(target[:65_536])  # Nothing beside them.
            other = self.rooms([65_536] * len(pieces))
            await pair.near_end.read(pair.far.export(pieces, soon()), other, soon())
            assert contents(other) == contents(pieces)

        self.play(scenario)

    def test_memory_whose_pages_went_is_read_and_filled_where_it_is_now(self) -> None:
        """A registration goes on with the pages that it found; so it is undone before they go."""

        async def scenario(pair: Pair) -> None:
            maps = [mmap.mmap(-1, MIB) for _ in range(2)]
            region, target = (memoryview(each) for each in maps)
            for seed in range(3):
                for transport, memory in ((pair.far, region), (pair.near, target)):
                    transport.register(memory)
                    if seed != 1:  # Else it may be known in part, or not yet.
                        await self.prepared(transport, memory)
                await self.moved(pair, region, target, 2 * seed)
                for transport, memory, mapped in ((pair.far, region, maps[0]), (pair.near, target, maps[1])):
                    transport.forget(memory)
                    mapped.madvise(mmap.MADV_REMOVE)
                assert not any(region[:4096])
                await self.moved(pair, region, target, 2 * seed + 1)

        self.play(scenario)

    async def moved(self, pair: Pair, region: memoryview, target: memoryview, seed: int) -> None:
        region[:] = noise(seed, len(region))
        pieces = [region[at : at + 65_536] for at in range(0, len(region), 131_072)]
        into = [target[at : at + 65_536] for at in range(65_536, len(region), 131_072)]
        reading = pair.far.export(pieces, soon())
        await pair.near_end.read(reading, into, soon())
        assert contents(into) == contents(pieces)
        target[:] = bytes(len(target))
        writing = pair.near.post(into, soon(), lambda: None)
        await pair.far_end.write(writing, pieces, soon())
        assert contents(into) == contents(pieces)
        await pair.far.withdraw(reading)
        await pair.near.withdraw(writing)

    def test_what_was_never_registered_can_be_forgotten(self) -> None:
        async def scenario(pair: Pair) -> None:
            memory = self.memory(4096)
            pair.far.forget(memory)
            pair.far.register(memory)
            pair.far.forget(memory)
            pair.far.forget(memory)

        self.play(scenario)

    def test_what_is_only_read_may_be_read_only(self) -> None:
        async def scenario(pair: Pair) -> None:
            (into,) = self.rooms([5_000])
            source = memoryview(noise(5, 5_000))
            await pair.near_end.read(pair.far.export([source], soon()), [into], soon())
            assert into == source
            (back,) = self.rooms([5_000])
            await pair.near_end.write(pair.far.post([back], soon(), lambda: None), [source], soon())
            assert back == source

        self.play(scenario)

    @pytest.mark.slow
    def test_pieces_of_any_sizes(self) -> None:
        sizes_of = st.lists(
            st.one_of(st.integers(1, 200), st.integers(1, 300_000), st.sampled_from([4096, 65_536, 1 << 20])),
            min_size=1,
            max_size=40,
        )

        @given(sizes_of, st.integers(0, 1 << 30))
        @settings(max_examples=30)
        def check(sizes: list[int], seed: int) -> None:
            async def scenario(pair: Pair) -> None:
                await self.there_and_back(pair, sizes, seed)

            self.play(scenario)

        check()

    async def there_and_back(self, pair: Pair, sizes: Sequence[int], seed: int) -> None:
        source, into, back = self.filled_memory(seed, sizes), self.rooms(sizes), self.rooms(sizes)
        reading = pair.far.export(source, soon())
        await pair.near_end.read(reading, into, soon())
        filled: list[bool] = []
        writing = pair.far.post(back, soon(), lambda: filled.append(True))
        await pair.near_end.write(writing, into, soon())
        assert contents(back) == contents(into) == contents(source)
        assert filled == [True]
        await pair.far.withdraw(reading)
        await pair.far.withdraw(writing)

    def test_many_pieces_in_one_transfer(self) -> None:
        async def scenario(pair: Pair) -> None:
            await self.there_and_back(pair, [64] * 2_500, 6)

        self.play(scenario)

    @pytest.mark.slow
    def test_many_transfers_overlap(self) -> None:
        async def scenario(pair: Pair) -> None:
            draw = random.Random(7)

            async def one(seed: int) -> None:
                sizes = [draw.randrange(1, 100_000) for _ in range(draw.randrange(1, 6))]
                await self.there_and_back(pair, sizes, seed)

            await asyncio.gather(*(one(seed) for seed in range(100)))

        self.play(scenario, Limits(2 * MIB, 3 * MIB, silence_ns=CALM.silence_ns))

    def test_a_ticket_is_good_once(self) -> None:
        async def scenario(pair: Pair) -> None:
            source, into = self.filled_memory(8, [900]), self.rooms([900])
            ticket = pair.far.export(source, soon())
            await pair.near_end.read(ticket, into, soon())
            filled: list[bool] = []
            posted = self.rooms([900])
            writing = pair.far.post(posted, soon(), lambda: filled.append(True))
            await pair.near_end.write(writing, source, soon())
            posted[0][:] = bytes(900)
            with pytest.raises(TransferRefused):
                await pair.near_end.read(ticket, into, soon())
            with pytest.raises(TransferRefused):
                await pair.near_end.write(writing, source, soon())
            assert not any(posted[0])
            assert filled == [True]
            assert not pair.near_end.is_lost

        self.play(scenario)

    def test_of_two_who_come_at_once_one_is_served(self) -> None:
        async def scenario(pair: Pair) -> None:
            source = self.filled_memory(9, [200_000])
            ticket = pair.far.export(source, soon())
            both = [self.rooms([200_000]), self.rooms([200_000])]
            reads = [pair.near_end.read(ticket, into, soon()) for into in both]
            results = await asyncio.gather(*reads, return_exceptions=True)
            assert sorted(type(result).__name__ for result in results) == ["NoneType", "TransferRefused"]
            assert contents(both[results.index(None)]) == contents(source)

        self.play(scenario)

    def test_a_ticket_has_its_time(self) -> None:
        async def scenario(pair: Pair) -> None:
            source, into = self.filled_memory(10, [900]), self.rooms([900])
            past_ns = CLOCK.now_ns() - 1
            with pytest.raises(TransferRefused):
                await pair.near_end.read(pair.far.export(source, past_ns), into, soon())
            posted = self.rooms([900])
            with pytest.raises(TransferRefused):
                await pair.near_end.write(pair.far.post(posted, past_ns, self.never), source, soon())
            assert not any(posted[0])

        self.play(scenario)

    def test_a_ticket_that_nobody_gave_is_refused(self) -> None:
        async def scenario(pair: Pair) -> None:
            source, into = self.filled_memory(11, [900]), self.rooms([900])
            ticket = pair.far.export(source, soon())
            others = pair.near.export(source, soon())
            for wrong in (bytes(len(ticket)), b"", ticket[:-1], bytes(TICKET_BYTES_MAX), others):
                with pytest.raises(TransferRefused):
                    await pair.near_end.read(Ticket(wrong), into, soon())
                with pytest.raises(TransferRefused):
                    await pair.near_end.write(Ticket(wrong), source, soon())
            await pair.near_end.read(ticket, into, soon())
            assert contents(into) == contents(source)

        self.play(scenario)

    def test_a_ticket_is_for_one_direction(self) -> None:
        async def scenario(pair: Pair) -> None:
            source, posted = self.filled_memory(12, [900]), self.rooms([900])
            with pytest.raises(TransferRefused):
                await pair.near_end.write(pair.far.export(source, soon()), self.rooms([900]), soon())
            assert any(source[0])
            with pytest.raises(TransferRefused):
                await pair.near_end.read(pair.far.post(posted, soon(), self.never), posted, soon())

        self.play(scenario)

    @pytest.mark.parametrize("sizes", [[900], [900, 70_000, 1], [901, 69_999], [900, 69_999], [70_000, 900]])
    def test_pieces_of_other_sizes_are_refused(self, sizes: list[int]) -> None:
        async def scenario(pair: Pair) -> None:
            source, into = self.filled_memory(13, [900, 70_000]), self.rooms(sizes)
            with pytest.raises(TransferRefused):
                await pair.near_end.read(pair.far.export(source, soon()), into, soon())
            assert not any(any(view) for view in into)
            posted = self.rooms([900, 70_000])
            with pytest.raises(TransferRefused):
                await pair.near_end.write(
                    pair.far.post(posted, soon(), self.never), self.filled_memory(14, sizes), soon()
                )
            assert not any(any(view) for view in posted)
            await self.there_and_back(pair, SIZES, 15)

        self.play(scenario)

    def test_notes_come_in_order_whatever_else_goes_on(self) -> None:
        async def scenario(pair: Pair) -> None:
            told = [bytes([at]) * (at * 251) for at in range(1, 100)] + [noise(16, NOTE_BYTES_MAX), b"end"]
            source, into = self.filled_memory(17, [2 * MIB]), self.rooms([2 * MIB])
            reading = asyncio.ensure_future(pair.near_end.read(pair.far.export(source, soon()), into, soon()))
            for note in told:
                await pair.near_end.notify(note, soon())
                await pair.far_end.notify(note[:9], soon())
            assert await pair.far_notes.first(len(told)) == told
            assert await pair.near_notes.first(len(told)) == [note[:9] for note in told]
            assert pair.far_notes.speakers[0] is pair.far_end
            assert pair.near_notes.speakers[0] is pair.near_end
            await reading
            assert contents(into) == contents(source)

        self.play(scenario)

    def test_what_waits_goes_by_priority_then_in_order(self) -> None:
        async def scenario(pair: Pair) -> None:
            ended: list[str] = []

            async def one(name: str, priority: Priority) -> None:
                source, into = self.filled_memory(18, [MIB]), self.rooms([MIB])
                await pair.near_end.read(pair.far.export(source, soon()), into, soon(), priority)
                ended.append(name)

            waiting = [asyncio.ensure_future(one("first", Priority.REPLICATE))]
            await turns(1)
            for name, priority in (
                ("replicate 1", Priority.REPLICATE),
                ("prefetch 1", Priority.PREFETCH),
                ("replicate 2", Priority.REPLICATE),
                ("decode", Priority.DECODE),
                ("prefetch 2", Priority.PREFETCH),
            ):
                waiting.append(asyncio.ensure_future(one(name, priority)))
                await turns(1)
            await asyncio.gather(*waiting)
            after = ["decode", "prefetch 1", "prefetch 2", "replicate 1", "replicate 2"]
            assert ended == ["first", *after]

        self.play(scenario, Limits(MIB, 8 * MIB, silence_ns=CALM.silence_ns))

    def test_a_transfer_over_the_bounds_goes_alone(self) -> None:
        async def scenario(pair: Pair) -> None:
            await asyncio.gather(*(self.there_and_back(pair, [40_000, 40_000], seed) for seed in range(4)))

        self.play(scenario, Limits(65_536, 65_536, silence_ns=CALM.silence_ns))

    def test_a_listener_says_where_and_an_address_is_one_listeners(self) -> None:
        async def scenario(pair: Pair) -> None:
            assert pair.address.startswith(f"{pair.far.scheme}://")
            assert pair.near.scheme == pair.far.scheme
            assert not pair.address.endswith(":0")
            assert pair.near_end.peer
            assert pair.far_end.peer
            with pytest.raises(BadInput):
                await pair.near.listen(pair.address, lambda _: None, Notes().hear)

        self.play(scenario)

    def test_what_is_no_address_is_refused(self) -> None:
        async def scenario(pair: Pair) -> None:
            for wrong in ("", "nonsense", f"{pair.near.scheme}://", "other://127.0.0.1:1"):
                with pytest.raises(BadInput):
                    await pair.near.connect(wrong, soon(), Notes().hear)
                with pytest.raises(BadInput):
                    await pair.near.listen(wrong, lambda _: None, Notes().hear)

        self.play(scenario)

    def test_a_closed_listener_takes_nobody_and_leaves_who_is_there(self) -> None:
        async def scenario(pair: Pair) -> None:
            spare = self.make(CALM)
            try:
                listener = await spare.listen(self.address_of(pair), lambda _: None, Notes().hear)
                end = await pair.near.connect(listener.address, soon(), Notes().hear)
                await listener.close()
                await listener.close()
                with pytest.raises((PeerLost, TransferLate)):
                    await pair.near.connect(listener.address, CLOCK.now_ns() + NS_PER_S, Notes().hear)
                source, into = self.filled_memory(19, [900]), self.rooms([900])
                await end.read(spare.export(source, soon()), into, soon())
                assert contents(into) == contents(source)
            finally:
                await spare.close()

        self.play(scenario)

    def test_several_peers_at_once(self) -> None:
        async def scenario(pair: Pair) -> None:
            guests = [self.make(CALM) for _ in range(3)]
            try:
                ends = [await guest.connect(pair.address, soon(), Notes().hear) for guest in guests]
                source = self.filled_memory(20, SIZES)
                rooms = [self.rooms(SIZES) for _ in ends]
                await asyncio.gather(
                    *(
                        end.read(pair.far.export(source, soon()), into, soon())
                        for end, into in zip(ends, rooms, strict=True)
                    )
                )
                assert all(contents(into) == contents(source) for into in rooms)
            finally:
                for guest in guests:
                    await guest.close()

        self.play(scenario)
