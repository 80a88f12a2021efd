"""What keeps the slots that a follower reads, and until when: a commit, an abort, and whoever is gone."""

from __future__ import annotations

import asyncio

import pytest

from kvcache import wire
from kvcache.block import StorageKey
from kvcache.clock import NS_PER_S
from kvcache.errors import Unavailable
from kvcache.server import lent
from kvcache.server import node as shell
from kvcache.transport.base import Ticket, TransferRefused
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.follower import follow, play, read, stopped, waiting
from tests.server.peer import Peer, different, peer_of, settle, until
from tests.server.talk import HASHES
from tests.server.writer import Writer


@pytest.fixture
def node(serve: Serve) -> EmbeddedNode:
    return serve(tcp="127.0.0.1:0")


class Gate:
    """While it is shut, no ticket of the node is withdrawn."""

    def __init__(self, node: EmbeddedNode) -> None:
        self._node = node
        self.entered = 0
        node.call(self._shut)
        node.before_close.append(self.open)

    def _shut(self) -> None:
        transport = self._node.node.core.plane.transport("tcp")
        assert transport is not None
        self._event, withdraw = asyncio.Event(), transport.withdraw

        async def later(ticket: Ticket) -> None:
            self.entered += 1
            await self._event.wait()
            await withdraw(ticket)

        transport.withdraw = later  # type: ignore[method-assign]  # For this test.

    def open(self) -> None:
        self._node.call(self._event.set)


class TestHeldForTheFollower:
    def test_after_a_commit_by_a_lease_until_he_asks_again(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            await writer.reserve(HASHES[:2])
            await writer.advance(4)
            followed = await follow(follower, HASHES[:2])
            await writer.commit()
            assert (await follower.stats())["leases"] == 1
            assert await read(follower, followed) == [different(block) for block in HASHES[:2]]
            assert await follow(follower, HASHES[:2]) == wire.Followed("held", 2)
            assert (await follower.stats())["leases"] == 0

        play(node, work)

    def test_a_ticket_of_before_is_no_good(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            await writer.reserve(HASHES[:2])
            await writer.advance()
            first = await follow(follower, HASHES[:2])
            second = await follow(follower, HASHES[:2])
            with pytest.raises(TransferRefused):
                await read(follower, first)
            await read(follower, second)
            await writer.abort()

        play(node, work)

    def test_an_abort_ends_it_first(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            await writer.reserve(HASHES[:2])
            await writer.advance()
            followed = await follow(follower, HASHES[:2])
            gate = Gate(node)
            aborting = asyncio.create_task(writer.abort())
            await until(lambda: gate.entered == 1)
            assert [(await follower.stats())["reservations"] for _ in range(20)] == [1] * 20
            gate.open()
            await aborting
            with pytest.raises(TransferRefused):
                await read(follower, followed)

        play(node, work)

    @pytest.mark.parametrize("writer_first", [False, True])
    def test_a_writer_that_is_gone(self, node: EmbeddedNode, writer_first: bool) -> None:
        """Its slots are free when his copies have ended, and the ticket too."""

        async def work(writer: Writer, follower: Peer) -> None:
            await writer.reserve(HASHES[:2])
            await writer.advance()
            followed = await follow(follower, HASHES[:2])
            gate = Gate(node)
            writer.channel.close()
            await settle(follower, limbo_blocks=2)
            await until(lambda: gate.entered == 1)
            if writer_first:
                await stopped(node)
                assert (await follower.stats())["limbo_blocks"] == 2
            gate.open()
            await settle(follower, tickets=0)
            with pytest.raises(TransferRefused):
                await read(follower, followed)
            if not writer_first:
                assert (await follower.stats())["limbo_blocks"] == 2
                await stopped(node)
            await settle(follower, limbo_blocks=0)

        play(node, work)

    def test_a_follower_that_is_gone(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            await writer.reserve(HASHES[:2])
            await writer.advance()
            await follow(follower, HASHES[:2])
            async with peer_of(node.node.tcp_address) as other:
                await follow(other, HASHES[:2])
                assert (await follower.stats())["tickets"] == 2
            await settle(follower, tickets=1)
            await writer.commit()
            async with peer_of(node.node.tcp_address) as waiter:
                asking = asyncio.create_task(follow(waiter, HASHES[7:8], wait_ms=60_000))
                await waiting(node)
                waiter.channel.close()
                with pytest.raises(Unavailable):
                    await asking

        play(node, work)

    def test_time_is_over(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shell, "EXPIRE_PERIOD_S", 0.01)
        monkeypatch.setattr(lent, "TICKET_MS", 1)
        node = serve(tcp="127.0.0.1:0")

        async def work(writer: Writer, follower: Peer) -> None:
            await writer.reserve(HASHES[:2])
            await writer.advance()
            followed = await follow(follower, HASHES[:2])
            await writer.commit()
            await settle(follower, tickets=0, leases=0)
            with pytest.raises(TransferRefused):
                await read(follower, followed)

        play(node, work)

    def test_a_parent_that_was_lost(self, node: EmbeddedNode) -> None:
        """What is committed behind it cannot be found, nor held: the ticket ends before."""

        async def work(writer: Writer, follower: Peer) -> None:
            await writer.reserve(HASHES[:1])
            await writer.commit()
            await writer.reserve(HASHES[1:3], parent=HASHES[0])
            await writer.advance()
            followed = await follow(follower, HASHES[1:3])
            node.call(lambda: quarantine(node, writer.namespace + HASHES[0]))
            gate = Gate(node)
            committing = asyncio.create_task(writer.commit())
            await until(lambda: gate.entered == 1)
            assert [(await follower.stats())["reservations"] for _ in range(20)] == [1] * 20
            gate.open()
            await committing
            assert (await follower.stats())["tickets"] == 0
            with pytest.raises(TransferRefused):
                await read(follower, followed)
            assert await follow(follower, HASHES[1:3], 1) == wire.Followed("none")

        play(node, work)


def quarantine(node: EmbeddedNode, key: bytes) -> None:
    core = node.node.core
    lease = core.ledger.borrow([StorageKey(key)], "test", core.clock.now_ns() + NS_PER_S)
    assert core.ledger.quarantine(lease.keys[0], lease.generations[0], core.clock.now_ns())
    core.ledger.release(lease.lease_id, "test", core.clock.now_ns())
    core.settle()
