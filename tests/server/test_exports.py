"""Blocks that leave a node and come to it over a transport: tickets, what they hold, and their ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from tests.server.conftest import EmbeddedNode, Serve
from tests.server.peer import Peer, peer_of
from tests.server.talk import HASHES, SIZE, content, sums_of


@pytest.fixture
def node(serve: Serve) -> EmbeddedNode:
    return serve(tcp="127.0.0.1:0")


def as_peer(node: EmbeddedNode, work: Callable[[Peer], Awaitable[None]]) -> None:
    """Do it on a loop of its own: the node has another."""

    async def run() -> None:
        async with peer_of(node.node.tcp_address) as peer:
            await work(peer)

    asyncio.run(run())


async def save(peer: Peer, blocks: Sequence[bytes]) -> None:
    """By a ticket."""
    reserved = await peer.reserve(blocks)
    posted = await peer.post(reserved.reservation, reserved.count)
    await peer.write(posted.ticket, [content(block) for block in blocks])
    assert await peer.commit(reserved.reservation, blocks) == len(blocks)


class TestExport:
    def test_what_is_read_is_what_is_held(self, node: EmbeddedNode) -> None:
        async def work(peer: Peer) -> None:
            await save(peer, HASHES[:3])
            leased = await peer.lease(HASHES[:3])
            exported = await peer.export(leased.lease, 2, start=1)
            assert exported.sums == sums_of(*HASHES[1:3])
            assert exported.address == peer.channel.welcome.data[0]
            assert await peer.read(exported.ticket, [SIZE] * 2) == b"".join(map(content, HASHES[1:3]))
            assert (await peer.release(leased.lease)).intact
            stats = await peer.stats()
            assert (stats["leases"], stats["tickets"]) == (0, 0)

        as_peer(node, work)
