"""``nixl://`` on one host (cma) keeps the contract of transports. Without NIXL these tests fail."""

from __future__ import annotations

import asyncio

import pytest

from kvcache.address import TcpAddress, parse
from kvcache.testing.transport_faults import FaultContract
from kvcache.testing.transport_pair import CALM, Notes, Pair, noise, soon
from kvcache.testing.transports import TransportContract
from kvcache.transport.base import Endpoint, Limits, PeerLost, Transport
from kvcache.transport.keys import NONCE_BYTES, PROOF_BYTES, new_key, shown, with_key
from kvcache.transport.nixl_wire import VERSION, Opening, Proof, encode
from kvcache.transport.table import open_transport

pytestmark = [pytest.mark.nixl, pytest.mark.slow]


class TestNixl(TransportContract):
    address = "nixl://127.0.0.1:0"

    def make(self, limits: Limits) -> Transport:
        return open_transport("nixl", limits)

    def nobody(self, pair: Pair) -> str:
        return "nixl://127.0.0.1:1"


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
