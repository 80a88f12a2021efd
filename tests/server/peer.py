"""A peer of the node under test: a control connection, and an endpoint to where its bytes are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.block import BlockSpec
from kvcache.channel import AsyncChannel
from kvcache.clock import SystemClock
from kvcache.errors import KVCacheError
from kvcache.namespace import shape_of
from kvcache.sums import sum_chunks
from kvcache.transport.base import Endpoint, Ticket
from kvcache.transport.table import open_transport, scheme_of
from tests.server.conftest import EmbeddedNode
from tests.server.talk import SPEC, content, deadline, example

WIDE = BlockSpec(block_tokens=16, plane_count=3, head_count=2, head_bytes=65_536)
"""A plane has two chunks."""
PATIENCE_S = 20
Work = Callable[["Peer"], Awaitable[None]]


class Peer:
    """``tcp`` unless told otherwise. All calls are awaited on one loop."""

    def __init__(self, channel: AsyncChannel, endpoint: Endpoint) -> None:
        self.channel = channel
        self.endpoint = endpoint
        self.namespace = b""
        self.spec = SPEC

    async def ask(self, request: wire.Request) -> wire.Reply:
        return await self.channel.call(request, deadline())

    async def open(self, spec: BlockSpec = SPEC) -> None:
        self.spec = spec
        namespace = example(shape=shape_of(spec))
        reply = await self.ask(
            wire.Open(namespace.to_map(), spec.plane_count, spec.head_count, spec.head_bytes)
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

    async def commit(self, reservation: int, data: Sequence[bytes]) -> int:
        """``data``: the bytes of each block."""
        reply = await self.ask(wire.Commit(reservation, sum_chunks(data, self.spec.chunk_bytes)))
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


def sums_of_bytes(*data: bytes) -> bytes:
    return sum_chunks(data, SPEC.chunk_bytes)


@asynccontextmanager
async def peer_of(
    address: str, *, token: str = "", map_slab: bool = False, client: str = "", writes_ended: bool = False
) -> AsyncIterator[Peer]:
    """Connected to a node, its namespace opened, with an endpoint to its first data address."""
    greeting = wire.Hello(wire.PROTOCOL_VERSION, token, map_slab, client, writes_ended)
    async with await AsyncChannel.connect(address, greeting, deadline()) as channel:
        data = channel.welcome.data[0]
        transport = open_transport(scheme_of(data), clock=SystemClock())
        try:
            peer = Peer(channel, await transport.connect(data, deadline(), lambda *_: None))
            await peer.open()
            yield peer
        finally:
            await transport.close()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until it holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


def as_peer(node: EmbeddedNode, *works: Work) -> None:
    """Do it on a loop of its own, as the node has another; each on a connection of its own, which ends. Then
    nothing is held."""

    async def run() -> None:
        for work in works:
            async with peer_of(node.node.tcp_address) as peer:
                await work(peer)

    asyncio.run(run())
    wait_for_nothing(node)


async def settle(peer: Peer, **expected: float) -> None:
    """Wait until the node's stats are so."""
    async with asyncio.timeout(PATIENCE_S):
        while not expected.items() <= (await peer.stats()).items():
            await asyncio.sleep(0.001)


def wait_for_nothing(node: EmbeddedNode) -> None:
    """All that connections held is given back."""
    held = ("leases", "reservations", "limbo_blocks", "tickets")

    async def settled() -> None:
        await until(lambda: not any(node.node.core.stats()[name] for name in held))

    node.run(settled())


def credentials(folder: Path, **given: tuple[str, list[str]]) -> str:
    """A file with a token, the name sixteen times, for each tenant and its roles."""
    file = folder / "credentials.toml"
    entries = [
        f'[[credential]]\ntoken = "{name * 16}"\ntenant = "{tenant}"\nroles = {roles}\n'
        for name, (tenant, roles) in given.items()
    ]
    file.write_text(f'master_key = "{"0f" * 32}"\n' + "".join(entries))
    file.chmod(0o600)
    return str(file)


def different(block: bytes, spec: BlockSpec = SPEC) -> bytes:
    """A block every plane and chunk of which differs from every other."""
    return b"".join(block[:1] + at.to_bytes(3, "little") for at in range(spec.block_bytes // 4))


async def save(peer: Peer, blocks: Sequence[bytes]) -> None:
    """By a ticket, those that are not held."""
    reserved = await peer.reserve(blocks)
    posted = await peer.post(reserved.reservation, reserved.count)
    data = [content(block) for block in blocks[reserved.start :]]
    await peer.write(posted.ticket, data)
    assert await peer.commit(reserved.reservation, data) == len(data)


async def refused(code: str, peer: Peer, request: wire.Request) -> str:
    with pytest.raises(KVCacheError) as caught:
        await peer.ask(request)
    assert caught.value.code == code
    return str(caught.value)
