"""``nixl://`` on one host (cma) keeps the contract of transports. Without NIXL these tests fail."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from kvcache.address import TcpAddress, parse
from kvcache.testing.transport_faults import FaultContract
from kvcache.testing.transport_pair import CALM, Notes, Pair, lost, noise, soon, turns
from kvcache.testing.transports import TransportContract
from kvcache.transport.base import Endpoint, Limits, PeerLost, Transport
from kvcache.transport.keys import NONCE_BYTES, PROOF_BYTES, new_key, shown, with_key
from kvcache.transport.nixl_wire import VERSION, Opening, Proof, encode
from kvcache.transport.table import open_transport
from tests.transport.ucx_events import assert_ucx_sees_them_go

if TYPE_CHECKING:
    from kvcache.transport.nixl import Agents
    from kvcache.transport.nixl_regions import Region

pytestmark = [pytest.mark.nixl, pytest.mark.slow]


class TestNixl(TransportContract):
    address = "nixl://127.0.0.1:0"

    def make(self, limits: Limits) -> Transport:
        return open_transport("nixl", limits)

    def nobody(self, pair: Pair) -> str:
        return "nixl://127.0.0.1:1"

    async def prepared(self, transport: Transport, memory: memoryview) -> None:
        await pinned(transport, memory)

    def test_memory_is_read_where_it_is_until_it_is_forgotten(self) -> None:
        async def scenario(pair: Pair) -> None:
            far = agents(pair.far)
            memory = self.memory(1 << 20)
            before = len(await far.description())
            pair.far.register(memory)
            assert far.regions.places([memory]) == [], "it is not waited for"
            await pinned(pair.far, memory)
            assert len(await far.description()) > before
            [(address, device)] = far.regions.places([memory])
            pair.far.forget(memory)
            assert far.regions.places([memory]) == [], "at once"
            assert len(await far.description()) == before, "soon it is pinned no more"
            pair.far.register(memory)
            await pinned(pair.far, memory)
            [(again, other)] = far.regions.places([memory])
            assert again == address
            assert other != device, "else NIXL would refuse its new key, where the old one is known"

        self.play(scenario)

    def test_what_is_forgotten_before_it_is_pinned_is_never_pinned(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pinning gives memory its pages: they would come back after they went."""

        async def scenario(pair: Pair) -> None:
            far, memory, added, thread = agents(pair.far), self.memory(1 << 20), [], threading.Event()
            monkeypatch.setattr(far, "_add", added.append)
            before = len(await far.description())
            busy = far._run(thread.wait)
            pair.far.register(memory)
            pair.far.forget(memory)
            thread.set()
            await busy
            assert len(await far.description()) == before
            await turns(10)
            assert added == []
            assert far.regions.places([memory]) == []

        self.play(scenario)

    def test_what_is_forgotten_while_it_is_pinned_is_waited_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvcache.transport.nixl.PIN_S", 20.0)
        assert self.forgotten_while_it_is_pinned(monkeypatch, pin_s=0.2) == "pinned first"

    def test_a_pin_that_does_not_end_is_not_waited_for_without_end(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvcache.transport.nixl.PIN_S", 0.01)
        assert self.forgotten_while_it_is_pinned(monkeypatch, pin_s=20) == "forgotten first"

    def forgotten_while_it_is_pinned(self, monkeypatch: pytest.MonkeyPatch, pin_s: float) -> str:
        """Which was over first? Pinning takes so long, or until it is forgotten."""
        first: list[str] = []

        async def scenario(pair: Pair) -> None:
            far, memory = agents(pair.far), self.memory(1 << 20)
            began, returned = threading.Event(), threading.Event()
            add = far._add

            def add_slowly(region: Region) -> None:
                began.set()
                first.append("forgotten first" if returned.wait(pin_s) else "pinned first")
                add(region)

            before = len(await far.description())
            monkeypatch.setattr(far, "_add", add_slowly)
            pair.far.register(memory)
            assert await asyncio.to_thread(began.wait, 20)
            pair.far.forget(memory)
            returned.set()
            assert len(await far.description()) == before
            await turns(10)
            assert far.regions.places([memory]) == []

        self.play(scenario)
        return first[0]

    def test_a_reading_agent_that_is_replaced_knows_what_was_registered_since(self) -> None:
        async def scenario(pair: Pair) -> None:
            region, target = self.memory(1 << 20), self.memory(1 << 20)
            for transport, memory in ((pair.far, region), (pair.near, target)):
                transport.register(memory)
                await pinned(transport, memory)
            await self.moved(pair, region, target, 1)
            for transport in (pair.far, pair.near):
                await agents(transport)._run(agents(transport)._replace_reading)
            await self.moved(pair, region, target, 2)

        self.play(scenario)

    def test_memory_that_cannot_be_pinned_goes_through_buffers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def scenario(pair: Pair) -> None:
            from kvcache.transport.nixl import bindings

            def refuse(region: object) -> None:
                raise bindings.nixlBackendError("no more memory can be locked")

            far, region, target = agents(pair.far), self.memory(1 << 20), self.memory(1 << 20)
            with monkeypatch.context() as patched:
                patched.setattr(far, "_add", refuse)
                pair.far.register(region)
                await far.description()
                await turns(10)
            assert far.regions.places([region]) == []
            await self.moved(pair, region, target, 1)
            pair.far.register(region)
            await pinned(pair.far, region)
            await self.moved(pair, region, target, 2)

        self.play(scenario)

    def test_what_is_registered_anew_is_not_taken_for_what_was_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scenario(pair: Pair) -> None:
            from kvcache.transport.nixl import bindings

            far, region = agents(pair.far), self.memory(1 << 20)
            add, added = far._add, threading.Event()

            def refuse_once(wanted: Region) -> None:
                if not added.is_set():
                    added.set()
                    raise bindings.nixlBackendError("no more memory can be locked")
                add(wanted)

            monkeypatch.setattr(far, "_add", refuse_once)
            pair.far.register(region)
            assert added.wait(20), "the loop does not hear of it yet"
            pair.far.forget(region)
            pair.far.register(region)
            await far.description()
            await pinned(pair.far, region)
            pair.far.forget(region)
            assert far.regions.places([region]) == []

        self.play(scenario)

    def test_a_peer_that_comes_meanwhile_knows_all_memory(self) -> None:
        async def scenario(pair: Pair) -> None:
            coming = asyncio.ensure_future(pair.near.connect(pair.address, soon(), Notes().hear))
            regions: list[memoryview] = []
            while not coming.done() or len(regions) < 8:
                if len(regions) < 64:
                    regions.append(memoryview(noise(len(regions), 4096)))
                    pair.far.register(regions[-1])
                await asyncio.sleep(0.001)
            for region in regions:
                await pinned(pair.far, region)
            into = self.rooms([4096] * len(regions))
            await coming.result().read(pair.far.export(regions, soon()), into, soon())
            assert into == regions

        self.play(scenario)

    def test_who_registers_without_end_is_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvcache.transport.nixl_lane.REGIONS_MAX", 3)

        async def scenario(pair: Pair) -> None:
            for _ in range(4):
                memory = self.memory(4096)
                pair.far.register(memory)
                await pinned(pair.far, memory)
                pair.far.forget(memory)
            await lost(pair.near_end)

        self.play(scenario)

    def test_ucx_sees_the_pages_of_the_host_tier_go(self) -> None:
        async def scenario(pair: Pair) -> None:
            assert_ucx_sees_them_go()

        self.play(scenario)


class TestReadsThatCannotBeCalledBack(FaultContract):
    """Over sockets, where UCX emulates reads: one that waits for a peer that stands still stays in flight
    and would write later, so this is where the reading agent is replaced."""

    address = "nixl://127.0.0.1:0"

    @pytest.fixture(autouse=True)
    def emulated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCX_TLS", "tcp")
        monkeypatch.setenv("UCX_PROTO_EMULATION_ENABLE", "y")

    def make(self, limits: Limits) -> Transport:
        return open_transport("nixl", limits)

    def nobody(self, pair: Pair) -> str:
        return "nixl://127.0.0.1:1"

    # The reading agent's end, in the middle of a read that is emulated, makes UCX abort the owner's process.
    # This is why the transport forbids emulated reads unless the environment asks for them.
    test_a_peer_that_stands_still_in_the_middle = None


def agents(transport: Transport) -> Agents:
    from kvcache.transport.nixl_transport import NixlTransport  # Not where these tests are only collected.

    assert isinstance(transport, NixlTransport)
    return transport.agents


async def pinned(transport: Transport, memory: memoryview) -> None:
    async with asyncio.timeout(20):
        while not agents(transport).regions.places([memory]):
            await asyncio.sleep(0.001)


def test_only_who_knows_the_key_has_an_endpoint_and_hears_of_memory() -> None:
    key = new_key()

    async def main() -> None:
        far, near = open_transport("nixl", CALM, key=key), open_transport("nixl", CALM)
        accepted: list[Endpoint] = []
        listener = await far.listen("nixl://127.0.0.1:0", accepted.append, Notes().hear)
        try:
            for address in (shown(listener.address), with_key(shown(listener.address), new_key())):
                with pytest.raises(PeerLost, match="closed"):
                    await near.connect(address, soon(), Notes().hear)
            where = parse(shown(listener.address).replace("nixl", "tcp"))
            assert isinstance(where, TcpAddress)
            reader, writer = await asyncio.open_connection(where.host, where.port)
            writer.write(encode(Opening(VERSION, bytes(NONCE_BYTES))) + encode(Proof(bytes(PROOF_BYTES))))
            assert len(await reader.read()) < 64, "a challenge, and no more"
            writer.close()
            assert accepted == []
            end = await near.connect(listener.address, soon(), Notes().hear)
            into = [memoryview(bytearray(70_000))]
            source = [memoryview(noise(1, 70_000))]
            await end.read(far.export(source, soon()), into, soon())
            assert into[0] == source[0]
        finally:
            await near.close()
            await far.close()

    asyncio.run(main())
