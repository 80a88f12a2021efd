"""Blocks that are read while they are written: what a follower is given, when, and what holds it for him."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from kvcache import wire
from kvcache.block import StorageKey
from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_S
from kvcache.errors import Unavailable
from kvcache.server import lent, streams
from kvcache.server import node as shell
from kvcache.sums import sum_chunks
from kvcache.transport.base import Ticket, TransferRefused
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.peer import Peer, different, peer_of, refused, settle, until, wait_for_nothing
from tests.server.talk import HASHES, SPEC, deadline
from tests.server.writer import Writer

PLANE = SPEC.plane_bytes
Work = Callable[[Writer, Peer], Awaitable[None]]


@pytest.fixture
def node(serve: Serve) -> EmbeddedNode:
    return serve(tcp="127.0.0.1:0")


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
    hello = wire.Hello(wire.PROTOCOL_VERSION, map=True, client="writer", writes_ended=True)
    (await AsyncChannel.connect(node.node.address, hello, deadline())).close()


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
    await until(lambda: node.node.core.progress.waiting == 1)


class Gate:
    """While it is shut, no ticket of the node is withdrawn."""

    def __init__(self, node: EmbeddedNode) -> None:
        self._node = node
        self.entered = 0
        node.call(self._shut)

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


def planes(block: bytes, first: int, end: int) -> bytes:
    return different(block)[first * PLANE : end * PLANE]


class TestFollow:
    def test_planes_are_read_as_they_are_written(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            await writer.reserve(HASHES[:3])
            assert await follow(follower, HASHES[:4]) == wire.Followed("none")
            await writer.advance()
            first = await follow(follower, HASHES[:4])
            assert (first.state, first.count, first.planes) == ("writing", 3, 1)
            assert await read(follower, first) == [planes(block, 0, 1) for block in HASHES[:3]]
            assert await follow(follower, HASHES[:4], 1) == wire.Followed("none", 3)
            await writer.advance(2)
            second = await follow(follower, HASHES[:4], 1)
            assert (second.count, second.planes) == (3, 2)
            assert await read(follower, second) == [planes(block, 1, 3) for block in HASHES[:3]]
            await writer.commit()
            third = await follow(follower, HASHES[:4], 3)
            assert (third.state, third.count, third.planes) == ("writing", 3, 1)
            assert await read(follower, third) == [planes(block, 3, 4) for block in HASHES[:3]]
            assert await follow(follower, HASHES[:4]) == wire.Followed("held", 3)

        play(node, work)

    def test_who_comes_in_the_middle_gets_all_there_is(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            await writer.reserve(HASHES[:3])
            await writer.advance(2)
            followed = await follow(follower, [HASHES[1], HASHES[2], HASHES[9]])
            assert (followed.count, followed.planes) == (2, 2)
            assert await read(follower, followed) == [planes(block, 0, 2) for block in HASHES[1:3]]
            assert (await follow(follower, [HASHES[1], HASHES[9]])).count == 1
            await writer.abort()

        play(node, work)

    @pytest.mark.parametrize("begun", [False, True])
    def test_it_waits_for_what_is_not_begun(self, node: EmbeddedNode, begun: bool) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            if begun:
                await writer.reserve(HASHES[:2])
            following = asyncio.create_task(follow(follower, HASHES[:2], wait_ms=5_000))
            await waiting(node)
            assert not following.done()
            if not begun:
                await writer.reserve(HASHES[:2])
            await writer.advance()
            assert (await following).count == 2
            await writer.commit()

        play(node, work)

    def test_it_waits_for_the_next_plane_and_for_a_commit(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            await writer.reserve(HASHES[:2])
            await writer.advance()
            await follow(follower, HASHES[:2])
            following = asyncio.create_task(follow(follower, HASHES[:2], 1, 5_000))
            await waiting(node)
            await writer.advance()
            assert (await following).planes == 1
            following = asyncio.create_task(follow(follower, HASHES[:2], 2, 5_000))
            await waiting(node)
            await writer.commit()
            assert (await following).planes == 2
            following = asyncio.create_task(follow(follower, HASHES[4:5], wait_ms=5_000))
            await waiting(node)
            await writer.reserve(HASHES[4:6])
            await writer.commit()
            assert await following == wire.Followed("held", 1)

        play(node, work)

    def test_it_answers_none_when_its_time_is_over(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            assert await follow(follower, HASHES[:2], wait_ms=1) == wire.Followed("none")
            assert await follow(follower, [], wait_ms=1) == wire.Followed("none")
            await writer.reserve(HASHES[:2])
            await writer.advance()
            await follow(follower, HASHES[:2])
            assert await follow(follower, HASHES[:2], 1, 1) == wire.Followed("none", 2)
            await writer.abort()

        play(node, work)

    def test_a_run_that_is_over_is_told_at_once(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            assert await follow(follower, HASHES[:2], 1, 60_000) == wire.Followed("none")
            await writer.reserve(HASHES[:2])
            await writer.advance()
            await follow(follower, HASHES[:2])
            assert await follow(follower, HASHES[1:3], 1, 60_000) == wire.Followed("none")
            following = asyncio.create_task(follow(follower, HASHES[:2], 1, 60_000))
            await waiting(node)
            await writer.abort()
            assert await following == wire.Followed("none")
            await writer.reserve(HASHES[:2])
            await writer.advance(2)
            assert await follow(follower, HASHES[:2], 1, 60_000) == wire.Followed("none")
            await writer.abort()

        play(node, work)

    def test_other_blocks_of_the_same_name_are_not_mixed_in(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            await writer.reserve(HASHES[:2])
            await writer.advance()
            await follow(follower, HASHES[:2])
            await writer.abort()
            await writer.reserve(HASHES[:2])
            await writer.commit()
            assert await follow(follower, HASHES[:2], 1) == wire.Followed("none")
            assert await follow(follower, HASHES[:2]) == wire.Followed("held", 2)

        play(node, work)

    def test_a_ticket_is_for_so_much(self, node: EmbeddedNode, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streams, "TICKET_BYTES_MAX", 5 * PLANE)

        async def work(writer: Writer, follower: Peer) -> None:
            await writer.reserve(HASHES[:6])
            await writer.advance(3)
            five = await follow(follower, HASHES[:6])
            assert (five.count, five.planes) == (5, 1)
            two = await follow(follower, HASHES[:2])
            assert (two.count, two.planes) == (2, 2)
            assert await read(follower, two) == [planes(block, 0, 2) for block in HASHES[:2]]
            rest = await follow(follower, HASHES[:2], 2)
            assert (rest.count, rest.planes) == (2, 1)
            await writer.commit()

        play(node, work)

    def test_what_is_refused(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            name = follower.namespace
            await refused("bad_tier", follower, wire.Follow(name, HASHES[0], "ucx"))
            await refused("unknown_namespace", follower, wire.Follow(bytes(16), HASHES[0], "tcp"))
            await refused("bad_prefix", follower, wire.Follow(name, b"short", "tcp"))
            await refused("bad_block", follower, wire.Follow(name, HASHES[0], "tcp", SPEC.plane_count))

        play(node, work)


class TestAdvance:
    def test_what_is_refused_leaves_it_open(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            number = (await writer.reserve(HASHES[:2])).reservation
            await writer.advance(2)
            two_more = writer.sums(2, 4)
            for planes_told, sums in ((2, b""), (1, b""), (5, two_more), (3, two_more), (4, two_more[8:])):
                error = await writer.refused(wire.Advance(number, planes_told, sums))
                assert error.code == "bad_block"
            await refused("bad_reservation", follower, wire.Advance(number, 4, two_more))
            await refused("bad_reservation", follower, wire.Advance(number + 1, 4, two_more))
            assert await writer.commit() == 2
            assert (await writer.refused(wire.Advance(number, 4, two_more))).code == "bad_reservation"

        play(node, work)

    def test_what_came_over_the_wire_advances_as_far_as_it_was_written(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            data = [different(block) for block in HASHES[:2]]
            sums = sum_chunks([block[:PLANE] for block in data], SPEC.chunk_bytes)
            async with peer_of(node.node.tcp_address) as pusher:
                reserved = await pusher.reserve(HASHES[:2])
                advance = wire.Advance(reserved.reservation, 1, sums)
                assert "over the wire" in await refused("bad_reservation", pusher, advance)
                posted = await pusher.post(reserved.reservation, 2, plane=0, planes=1)
                assert "over the wire" in await refused("bad_reservation", pusher, advance)
                await pusher.write(posted.ticket, [block[:PLANE] for block in data])
                assert await pusher.ask(advance) == wire.Done()
                followed = await follow(follower, HASHES[:2])
                assert await read(follower, followed) == [block[:PLANE] for block in data]

        play(node, work)

    def test_a_commit_says_what_was_promised(self, node: EmbeddedNode) -> None:
        async def work(writer: Writer, follower: Peer) -> None:
            number = (await writer.reserve(HASHES[:2])).reservation
            await writer.advance(1, bytes(len(writer.sums(0, 1))))
            writer.write(3)
            error = await writer.refused(wire.Commit(number, writer.sums(0, 4)))
            assert error.code == "bad_block"
            assert await follow(follower, HASHES[:2], wait_ms=1) != wire.Followed("held", 2)
            await writer.abort()

        play(node, work)


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
            stats = await follower.stats()
            assert (stats["reservations"], stats["limbo_blocks"]) == (1, 0)
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
            assert gate.entered == 1
            if writer_first:
                await stopped(node)
                assert (await follower.stats())["limbo_blocks"] == 2
            gate.open()
            with pytest.raises(TransferRefused):
                await read(follower, followed)
            if not writer_first:
                await settle(follower, tickets=0)
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
            await writer.commit()
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
