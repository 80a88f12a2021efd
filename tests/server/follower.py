"""A writer at a node and a follower elsewhere, and what they say to each other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from kvcache import wire
from kvcache.channel import AsyncChannel
from kvcache.sums import sum_chunks
from tests.server.conftest import EmbeddedNode
from tests.server.peer import Peer, different, peer_of, until, wait_for_nothing
from tests.server.talk import SPEC, deadline
from tests.server.writer import Writer

PLANE = SPEC.plane_bytes
Work = Callable[[Writer, Peer], Awaitable[None]]


def play(node: EmbeddedNode, work: Work) -> None:
    """A writer at the node and a follower elsewhere; in the end nothing is held."""

    async def run() -> None:
        writer = await Writer.at(node.node.address)
        async with peer_of(node.node.tcp_address) as follower:
            await work(writer, follower)
        writer.close()
        await stopped(node)

    asyncio.run(run())
    wait_for_nothing(node)
    assert len(node.node.core.uses) == 0
    assert len(node.node.core.progress) == 0


async def stopped(node: EmbeddedNode) -> None:
    """The writer's process says that its copies have ended."""
    await say_stopped(node.node.address)


async def say_stopped(address: str) -> None:
    hello = wire.Hello(wire.PROTOCOL_VERSION, map=True, client="writer", writes_ended=True)
    (await AsyncChannel.connect(address, hello, deadline())).close()


async def follow(
    peer: Peer, blocks: Sequence[bytes], plane: int = 0, wait_ms: int = 0, via: str = "tcp"
) -> wire.Followed:
    reply = await peer.ask(wire.Follow(peer.namespace, b"".join(blocks), via, plane, wait_ms))
    assert isinstance(reply, wire.Followed)
    return reply


async def read(peer: Peer, followed: wire.Followed) -> list[bytes]:
    """What each block's planes are, verified."""
    size = followed.planes * PLANE
    joined = await peer.read(followed.ticket, [size] * followed.count)
    pieces = [joined[at : at + size] for at in range(0, len(joined), size)]
    assert followed.sums == sum_chunks(pieces, SPEC.chunk_bytes)
    return pieces


async def waiting(node: EmbeddedNode) -> None:
    """Until a follower waits."""
    await until(lambda: node.node.core.progress.bell.waiting == 1)


def planes(block: bytes, first: int, end: int) -> bytes:
    return different(block)[first * PLANE : end * PLANE]
