"""The reference transport keeps the contract."""

from __future__ import annotations

import itertools

from kvcache.testing.transport_pair import Pair
from kvcache.testing.transport_peer import Obedient, Stoppable
from kvcache.testing.transports import TransportContract
from kvcache.transport.base import Limits
from kvcache.transport.inproc import Hub, InprocTransport


class StandsHere:
    """A peer on the test's own loop."""

    def __init__(self, transport: InprocTransport, address: str) -> None:
        self.address = address
        self._transport = transport

    def stop(self) -> None:
        self._transport.is_silent = True

    def wake(self) -> None:
        self._transport.is_silent = False

    async def kill(self) -> None:
        await self._transport.close()

    async def close(self) -> None:
        await self._transport.close()


class TestInproc(TransportContract):
    address = "inproc://far"

    def setup_method(self) -> None:
        self.hub = Hub()
        self.names = itertools.count()

    def make(self, limits: Limits) -> InprocTransport:
        return InprocTransport(self.hub, limits)

    async def peer(self, limits: Limits) -> Stoppable:
        transport = self.make(limits)
        obedient = Obedient(transport)
        await transport.listen("inproc://peer", obedient.accepted, obedient.hear)
        return StandsHere(transport, "inproc://peer")

    def address_of(self, pair: Pair) -> str:
        return f"inproc://spare{next(self.names)}"

    def nobody(self, pair: Pair) -> str:
        return "inproc://nobody"
