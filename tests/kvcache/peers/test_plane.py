"""The transports of a node: where they listen, which way leads to a peer, and connections that are shared."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import wraps

import pytest

from kvcache.clock import NS_PER_MS, NS_PER_S, Clock, SystemClock
from kvcache.errors import BadInput
from kvcache.peers.plane import AVOID_NS, IDLE_NS, DataPlane, with_host
from kvcache.testing.clock import FakeClock
from kvcache.transport.base import Limits, PeerLost, TransferLate, Transport
from kvcache.transport.inproc import Hub, InprocTransport
from kvcache.transport.table import open_transport

TCP = "tcp://127.0.0.1:0"


def on_a_loop(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: object, **named: object) -> None:
        asyncio.run(test(*args, **named))

    return run


def later(seconds: float = 20) -> int:
    return SystemClock().now_ns() + int(seconds * NS_PER_S)


class Places:
    """Opens ``inproc`` transports of one hub, and what the table has."""

    def __init__(self, hub: Hub | None = None) -> None:
        self.hub = hub or Hub()
        self.opened: list[Transport] = []
        self.registered: list[tuple[str, int]] = []

    def __call__(self, scheme: str, limits: Limits, clock: Clock, key: bytes) -> Transport:
        if scheme == "inproc":
            made: Transport = _Noting(self, self.hub, limits, clock)
        else:
            made = open_transport(scheme, limits, clock, key)
        self.opened.append(made)
        return made


class _Noting(InprocTransport):
    def __init__(self, places: Places, hub: Hub, limits: Limits, clock: Clock) -> None:
        super().__init__(hub, limits, clock)
        self._places = places

    def register(self, memory: memoryview) -> None:
        self._places.registered.append((self.scheme, len(memory)))

    def forget(self, memory: memoryview) -> None:
        self._places.registered.remove((self.scheme, len(memory)))


@asynccontextmanager
async def started(
    *addresses: str, clock: Clock | None = None, opener: Places | None = None
) -> AsyncIterator[DataPlane]:
    plane = DataPlane(addresses, clock or SystemClock(), opener=opener or open_transport)
    try:
        await plane.start()
        yield plane
    finally:
        await plane.close()


@asynccontextmanager
async def two(places: Places) -> AsyncIterator[DataPlane]:
    """One at ``inproc://a``, the first that is opened, and one that reads."""
    async with started("inproc://a", opener=places), started("inproc://reader", opener=places) as reader:
        yield reader


async def moved(owner: DataPlane, reader: DataPlane, address: str) -> bytes:
    """Bytes that the reader got of what the owner exported."""
    transport = owner.transport(address.partition("://")[0])
    assert transport is not None
    ticket = transport.export([memoryview(b"bytes of a block")], later())
    into = bytearray(16)
    endpoint = await reader.endpoint(address, later())
    await endpoint.read(ticket, [memoryview(into)], later())
    return bytes(into)


class TestListening:
    @on_a_loop
    async def test_the_port_that_was_taken_is_told(self) -> None:
        async with started(TCP) as plane:
            [address] = plane.addresses
            assert address.startswith("tcp://127.0.0.1:")
            assert not address.startswith(TCP)
            assert plane.address_of("tcp") == address
            assert plane.transport("tcp") is not None
            assert plane.transport("ucx") is None

    @on_a_loop
    async def test_several_addresses_of_one_scheme_share_a_transport(self) -> None:
        async with started(TCP, TCP) as owner, started() as reader:
            first, second = owner.addresses
            assert first != second
            assert await moved(owner, reader, first) == await moved(owner, reader, second)

    @on_a_loop
    async def test_nowhere(self) -> None:
        async with started() as plane:
            assert plane.addresses == []
            assert plane.transport("tcp") is None

    @on_a_loop
    async def test_an_address_that_cannot_be_had(self) -> None:
        async with started(TCP) as other:
            taken = other.addresses[0].partition("#")[0]
            plane = DataPlane([TCP, taken], SystemClock())
            with pytest.raises(BadInput) as caught:
                await plane.start()
            assert caught.value.code == "address_in_use"
            await plane.close()
            await plane.close()
            assert plane.addresses == []

    @on_a_loop
    async def test_a_scheme_that_nobody_offers(self) -> None:
        for address in ("carrier-pigeon://roof:1", "no address"):
            plane = DataPlane([address], SystemClock())
            with pytest.raises(BadInput, match="bad_config"):
                await plane.start()
            await plane.close()

    @on_a_loop
    async def test_who_was_not_told_the_key_does_not_come_in(self) -> None:
        async with started(TCP) as owner, started(TCP) as reader:
            [address] = owner.addresses
            assert await moved(owner, reader, address) == b"bytes of a block"
            with pytest.raises(PeerLost) as caught:
                await reader.endpoint(address.partition("#")[0], later())
            key = address.partition("#")[2]
            assert key
            assert key not in str(caught.value)

    @on_a_loop
    async def test_each_plane_has_a_key_of_its_own(self) -> None:
        async with started(TCP) as one, started(TCP) as other:
            assert one.addresses[0].partition("#")[2] != other.addresses[0].partition("#")[2]


class TestMemory:
    @on_a_loop
    async def test_every_transport_knows_all_memory(self) -> None:
        places = Places()
        plane = DataPlane(["inproc://a"], SystemClock(), opener=places)
        plane.register(memoryview(bytearray(8)))
        assert places.registered == []
        await plane.start()
        plane.register(memoryview(bytearray(16)))
        assert places.registered == [("inproc", 8), ("inproc", 16)]
        await plane.close()

    @on_a_loop
    async def test_no_transport_knows_what_was_forgotten(self) -> None:
        places = Places()
        plane = DataPlane(["inproc://a"], SystemClock(), opener=places)
        early, late = memoryview(bytearray(8)), memoryview(bytearray(8))
        plane.register(early)
        plane.register(late)
        plane.forget(early)
        await plane.start()
        assert places.registered == [("inproc", 8)], "of two with equal bytes, the one that was meant"
        plane.forget(late)
        assert places.registered == []
        await plane.close()


class TestWays:
    @on_a_loop
    async def test_in_the_order_of_our_schemes_and_else_by_tcp(self) -> None:
        async with started("inproc://a", TCP, opener=Places()) as plane:
            theirs = ["tcp://10.0.0.1:1", "ucx://10.0.0.1:2", "inproc://b", "inproc://c"]
            assert plane.usable(theirs) == "inproc://b"
            assert plane.usable(theirs[:2]) == "tcp://10.0.0.1:1"
            assert plane.usable(theirs[1:2]) == ""
            assert plane.usable([]) == ""
        async with started() as plane:
            assert plane.usable(["nixl://10.0.0.1:1", "tcp://10.0.0.1:2"]) == "tcp://10.0.0.1:2"
            assert plane.usable(["nothing that is an address"]) == ""

    @on_a_loop
    async def test_a_way_that_failed_is_avoided_for_a_while(self) -> None:
        clock = FakeClock()
        async with started("inproc://a", clock=clock, opener=Places()) as plane:
            theirs = ["inproc://nobody", "tcp://127.0.0.1:1"]
            assert plane.usable(theirs) == "inproc://nobody"
            with pytest.raises(PeerLost):
                await plane.endpoint("inproc://nobody", clock.now_ns() + NS_PER_S)
            assert plane.usable(theirs) == "tcp://127.0.0.1:1"
            assert plane.usable(theirs[:1]) == "inproc://nobody"
            clock.advance_ms(AVOID_NS // NS_PER_MS)
            plane.tick()
            assert plane.usable(theirs) == "inproc://nobody"

    @on_a_loop
    async def test_tcp_is_opened_when_a_peer_has_nothing_else(self) -> None:
        places = Places()
        async with started(TCP) as owner, started("inproc://a", opener=places) as reader:
            assert len(places.opened) == 1
            reader.register(memoryview(bytearray(8)))
            assert await moved(owner, reader, owner.addresses[0]) == b"bytes of a block"
            assert [each.scheme for each in places.opened] == ["inproc", "tcp"]
            assert reader.transport("tcp") is None
            assert reader.addresses == ["inproc://a"]

    @on_a_loop
    async def test_no_other_scheme_is(self) -> None:
        async with started() as plane:
            with pytest.raises(BadInput, match="ucx"):
                await plane.endpoint("ucx://127.0.0.1:1#0011", later())

    def test_every_interface_is_the_host_that_was_reached(self) -> None:
        assert with_host("tcp://0.0.0.0:81#aa", "10.0.0.7") == "tcp://10.0.0.7:81#aa"
        assert with_host("tcp://[::]:81", "fd00::7") == "tcp://[fd00::7]:81"
        assert with_host("tcp://10.0.0.1:81#aa", "10.0.0.7") == "tcp://10.0.0.1:81#aa"

    @pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
    @on_a_loop
    async def test_every_interface_is_reached_by_ipv4_and_ipv6(self, host: str) -> None:
        """As the control connection is, whose host the data address is given."""
        async with started("tcp://[::]:0") as owner, started() as reader:
            [address] = owner.addresses
            assert await moved(owner, reader, with_host(address, host)) == b"bytes of a block"

    @on_a_loop
    async def test_one_interface_is_reached_by_its_own_kind(self) -> None:
        async with started("tcp://[::1]:0") as owner, started() as reader:
            [address] = owner.addresses
            with pytest.raises(PeerLost):
                await moved(owner, reader, address.replace("[::1]", "127.0.0.1"))


class TestEndpoints:
    @on_a_loop
    async def test_one_for_all_who_ask(self) -> None:
        places = Places()
        async with two(places) as reader:
            asked = [reader.endpoint("inproc://a", later()) for _ in range(5)]
            assert len({id(each) for each in await asyncio.gather(*asked)}) == 1
            reading = reader.transport("inproc")
            assert isinstance(reading, InprocTransport)
            assert len(reading.endpoints) == 1

    @on_a_loop
    async def test_what_no_host_is_called_is_refused(self) -> None:
        """A peer tells the address: it must not end this node."""
        async with started(TCP) as plane:
            with pytest.raises(BadInput, match="no address"):
                await plane.endpoint("tcp://node..a:1#" + "00" * 32, later())

    @on_a_loop
    async def test_a_number_waits_for_no_look_up(self) -> None:
        """Of a name, which takes a thread of the few that the loop has, for as long as it may."""
        over = threading.Event()
        async with started(TCP) as owner, started() as reader:
            loop = asyncio.get_running_loop()
            loop.set_default_executor(ThreadPoolExecutor(1))
            looking = loop.run_in_executor(None, over.wait)
            try:
                assert await reader.endpoint(owner.addresses[0], later())
            finally:
                over.set()
                await looking

    @on_a_loop
    async def test_one_that_is_lost_is_replaced(self) -> None:
        async with started(TCP) as owner, started() as reader:
            [address] = owner.addresses
            first = await reader.endpoint(address, later())
            await first.close()
            assert first.is_lost
            second = await reader.endpoint(address, later())
            assert not second.is_lost
            assert await moved(owner, reader, address) == b"bytes of a block"

    @on_a_loop
    async def test_who_does_not_wait_does_not_end_the_others_try(self) -> None:
        places = Places()
        async with two(places) as reader:
            impatient = asyncio.create_task(reader.endpoint("inproc://a", later()))
            patient = asyncio.create_task(reader.endpoint("inproc://a", later()))
            await asyncio.sleep(0)
            impatient.cancel()
            assert not (await patient).is_lost
            assert impatient.cancelled()

    @on_a_loop
    async def test_a_deadline_is_the_askers_own(self) -> None:
        places = Places()
        async with two(places) as reader:
            silent = places.opened[0]
            assert isinstance(silent, InprocTransport)
            silent.is_silent = True
            with pytest.raises(TransferLate):
                await reader.endpoint("inproc://a", later(0.01))
            with pytest.raises(TransferLate):
                await reader.endpoint("inproc://a", SystemClock().now_ns() - 1)

    @on_a_loop
    async def test_what_nobody_uses_is_closed(self) -> None:
        clock, places = FakeClock(), Places()
        async with started("inproc://a", "inproc://b", clock=clock, opener=places) as plane:
            deadline_ns = clock.now_ns() + 2 * IDLE_NS
            idle = await plane.endpoint("inproc://a", deadline_ns)
            clock.advance_ms(IDLE_NS // NS_PER_MS - 1)
            used = await plane.endpoint("inproc://b", deadline_ns)
            plane.tick()
            await asyncio.sleep(0)
            assert not idle.is_lost
            clock.advance_ms(1)
            plane.tick()
            while not idle.is_lost:
                await asyncio.sleep(0)
            assert not used.is_lost

    @on_a_loop
    async def test_one_in_use_is_not_idle(self) -> None:
        clock, places = FakeClock(), Places()
        async with started("inproc://a", clock=clock, opener=places) as plane:
            transport = plane.transport("inproc")
            assert transport is not None
            memory = memoryview(bytearray(8 << 20))
            ticket = transport.export([memory], clock.now_ns() + 9 * IDLE_NS)
            endpoint = await plane.endpoint("inproc://a", clock.now_ns() + 9 * IDLE_NS)
            into = [memoryview(bytearray(8 << 20))]
            reading = asyncio.create_task(endpoint.read(ticket, into, clock.now_ns() + 9 * IDLE_NS))
            await asyncio.sleep(0)
            clock.advance_ms(2 * IDLE_NS // NS_PER_MS)
            plane.tick()
            await reading
            assert not endpoint.is_lost
            plane.tick()
            await asyncio.sleep(0)
            assert not endpoint.is_lost, "it was used just now"

    @on_a_loop
    async def test_close_ends_what_is_being_connected_too(self) -> None:
        places = Places()
        async with started("inproc://a", opener=places):
            silent = places.opened[0]
            assert isinstance(silent, InprocTransport)
            silent.is_silent = True
            async with started("inproc://reader", opener=places) as reader:
                asking = asyncio.create_task(reader.endpoint("inproc://a", later()))
                await asyncio.sleep(0)
                await reader.close()
                with pytest.raises(PeerLost):
                    await asking
                with pytest.raises(PeerLost):
                    await reader.endpoint("inproc://a", later())
                await reader.close()
