"""A peer of the node under test: a control connection, and an endpoint to where its bytes are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from kvcache import wire
from kvcache.channel import AsyncChannel
from kvcache.clock import SystemClock
from kvcache.transport.base import Endpoint, Ticket
from kvcache.transport.table import open_transport, scheme_of
from tests.server.talk import SIZE, SPEC, deadline, example, sums_of


class Peer:
    """``tcp`` unless told otherwise. All calls are awaited on one loop."""

    def __init__(self, channel: AsyncChannel, endpoint: Endpoint) -> None:
        self.channel = channel
        self.endpoint = endpoint
        self.namespace = b""

    async def ask(self, request: wire.Request) -> wire.Reply:
        return await self.channel.call(request, deadline())

    async def open(self) -> None:
        namespace = example()
        reply = await self.ask(
            wire.Open(namespace.to_map(), SPEC.plane_count, SPEC.head_count, SPEC.head_bytes)
        )
        assert isinstance(reply, wire.Opened)
        self.namespace = reply.namespace

    async def lease(self, blocks: Sequence[bytes], duration_ms: int = 30_000) -> wire.Leased:
        reply = await self.ask(wire.TakeLease(self.namespace, b"".join(blocks), duration_ms=duration_ms))
        assert isinstance(reply, wire.Leased)
        return reply

    async def export(
        self, lease: int, count: int, start: int = 0, via: str = "tcp", **part: int
    ) -> wire.Exported:
        reply = await self.ask(wire.Export(lease, start, count, via, **part))
        assert isinstance(reply, wire.Exported)
        return reply

    async def release(self, lease: int) -> wire.Released:
        reply = await self.ask(wire.Release(lease))
        assert isinstance(reply, wire.Released)
        return reply

    async def reserve(self, blocks: Sequence[bytes], parent: bytes = b"") -> wire.Reserved:
        reply = await self.ask(wire.Reserve(self.namespace, parent, b"".join(blocks)))
        assert isinstance(reply, wire.Reserved)
        return reply

    async def post(
        self, reservation: int, count: int, start: int = 0, via: str = "tcp", **part: int
    ) -> wire.Posted:
        reply = await self.ask(wire.Post(reservation, start, count, via, **part))
        assert isinstance(reply, wire.Posted)
        return reply

    async def commit(self, reservation: int, blocks: Sequence[bytes]) -> int:
        reply = await self.ask(wire.Commit(reservation, sums_of(*blocks)))
        assert isinstance(reply, wire.Committed)
        return reply.count

    async def stats(self) -> dict[str, float]:
        reply = await self.ask(wire.Stats())
        assert isinstance(reply, wire.StatsReply)
        return reply.values

    async def read(self, ticket: bytes, sizes: Sequence[int]) -> bytes:
        """The pieces, one after the other."""
        into = [memoryview(bytearray(size)) for size in sizes]
        await self.endpoint.read(Ticket(ticket), into, deadline())
        return b"".join(into)

    async def write(self, ticket: bytes, pieces: Sequence[bytes]) -> None:
        await self.endpoint.write(Ticket(ticket), [memoryview(piece) for piece in pieces], deadline())


@asynccontextmanager
async def peer_of(address: str, *, token: str = "", map_slab: bool = False) -> AsyncIterator[Peer]:
    """Connected to a node, its namespace opened, with an endpoint to its first data address."""
    greeting = wire.Hello(wire.PROTOCOL_VERSION, token=token, map=map_slab)
    async with await AsyncChannel.connect(address, greeting, deadline()) as channel:
        data = channel.welcome.data[0]
        transport = open_transport(scheme_of(data), clock=SystemClock())
        try:
            peer = Peer(channel, await transport.connect(data, deadline(), lambda *_: None))
            await peer.open()
            yield peer
        finally:
            await transport.close()


async def until(condition: object) -> None:
    """Give the loop turns until ``condition()`` holds."""
    assert callable(condition)
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


WHOLE = [SIZE]
