"""Blocks that come to a node over a transport: written by ticket, published by commit, or given up."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.config import NodeConfig
from kvcache.server import node as shell
from kvcache.sums import sum_chunks
from kvcache.transport.base import PeerLost, TransferRefused
from tests.server.conftest import EmbeddedNode, NewEventLoop, Serve
from tests.server.peer import Peer, as_peer, different, peer_of, refused, save, settle, wait_for_nothing
from tests.server.talk import HASHES, SIZE, SPEC, content, sums_of

PLANE = SPEC.plane_bytes


@pytest.fixture
def node(serve: Serve) -> EmbeddedNode:
    return serve(tcp="127.0.0.1:0")


class TestPost:
    def test_commit_waits_for_every_plane(self, node: EmbeddedNode) -> None:
        async def work(peer: Peer) -> None:
            data = [different(block) for block in HASHES[:2]]
            reserved = await peer.reserve(HASHES[:2])
            commit = wire.Commit(reserved.reservation, sum_chunks(data, SPEC.chunk_bytes))
            for first, count in ((0, 1), (1, 3)):
                assert "2 of 2" in await refused("bad_reservation", peer, commit)
                posted = await peer.post(reserved.reservation, 2, plane=first, planes=count)
                cut = [
                    block[at * PLANE : (at + 1) * PLANE]
                    for block in data
                    for at in range(first, first + count)
                ]
                await refused("bad_reservation", peer, commit)
                await peer.write(posted.ticket, cut)
            assert await peer.commit(reserved.reservation, data) == 2
            leased = await peer.lease(HASHES[:2])
            exported = await peer.export(leased.lease, 2)
            assert await peer.read(exported.ticket, [SIZE] * 2) == b"".join(data)

        as_peer(node, work)

    def test_a_refused_commit_leaves_the_ticket_good(self, node: EmbeddedNode) -> None:
        async def work(peer: Peer) -> None:
            reserved = await peer.reserve(HASHES[:2])
            first = await peer.post(reserved.reservation, 1)
            second = await peer.post(reserved.reservation, 1, start=1)
            commit = wire.Commit(reserved.reservation, sums_of(*HASHES[:2]))
            await peer.write(first.ticket, [content(HASHES[0])])
            assert "1 of 2" in await refused("bad_reservation", peer, commit)
            await peer.write(second.ticket, [content(HASHES[1])])
            assert await peer.ask(commit) == wire.Committed(2)

        as_peer(node, work)

    def test_tickets_that_nobody_used_end_with_the_commit(self, node: EmbeddedNode) -> None:
        async def work(peer: Peer) -> None:
            reserved = await peer.reserve(HASHES[:1])
            spare = await peer.post(reserved.reservation, 1)
            posted = await peer.post(reserved.reservation, 1)
            await peer.write(posted.ticket, [content(HASHES[0])])
            assert await peer.commit(reserved.reservation, [content(HASHES[0])]) == 1
            with pytest.raises(TransferRefused):
                await peer.write(spare.ticket, [bytes(SIZE)])
            assert (await peer.stats())["tickets"] == 0

        as_peer(node, work)

    def test_bytes_that_changed_on_the_way_are_not_published(self, node: EmbeddedNode) -> None:
        async def work(peer: Peer) -> None:
            reserved = await peer.reserve(HASHES[:1])
            posted = await peer.post(reserved.reservation, 1)
            wrong = bytearray(content(HASHES[0]))
            wrong[SIZE // 2] ^= 1
            await peer.write(posted.ticket, [bytes(wrong)])
            await refused("bad_block", peer, wire.Commit(reserved.reservation, sums_of(HASHES[0])))
            assert (await peer.lease(HASHES[:1])).count == 0
            assert (await peer.stats())["rejected_blocks:transfer"] == 1
            posted = await peer.post(reserved.reservation, 1)
            await peer.write(posted.ticket, [content(HASHES[0])])
            assert await peer.commit(reserved.reservation, [content(HASHES[0])]) == 1

        as_peer(node, work)

    def test_an_abort_ends_the_ticket(self, node: EmbeddedNode) -> None:
        async def work(peer: Peer) -> None:
            reserved = await peer.reserve(HASHES[:1])
            posted = await peer.post(reserved.reservation, 1)
            assert await peer.ask(wire.Abort(reserved.reservation)) == wire.Done()
            assert (await peer.stats())["reservations"] == 0
            with pytest.raises(TransferRefused):
                await peer.write(posted.ticket, [content(HASHES[0])])
            await refused("bad_reservation", peer, wire.Post(reserved.reservation, 0, 1, "tcp"))
            await refused("bad_reservation", peer, wire.Abort(reserved.reservation))

        as_peer(node, work)

    def test_a_cut_in_the_middle_of_a_write(self, node: EmbeddedNode) -> None:
        async def work(peer: Peer) -> None:
            reserved = await peer.reserve(HASHES[:64])
            posted = await peer.post(reserved.reservation, 64)
            writing = asyncio.create_task(peer.write(posted.ticket, [content(each) for each in HASHES[:64]]))
            await asyncio.sleep(0)
            peer.channel.close()
            with suppress(TransferRefused, PeerLost):  # Or it was faster.
                await writing

        as_peer(node, work)
        assert node.call(lambda: node.node.core.stats()["blocks:host"]) == 0

    def test_a_ticket_has_its_time(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shell, "EXPIRE_PERIOD_S", 0.01)
        node = serve(tcp="127.0.0.1:0", lease_ms_max=1)

        async def work(peer: Peer) -> None:
            reserved = await peer.reserve(HASHES[:1])
            await peer.post(reserved.reservation, 1)
            await settle(peer, tickets=0)
            stats = await peer.stats()
            assert (stats["tickets_expired"], stats["reservations"]) == (1, 1)

        as_peer(node, work)

    def test_slots_of_a_mapped_writer_wait_for_his_copies_too(self, node: EmbeddedNode) -> None:
        """The process that mapped them is this one, and lives."""

        async def run() -> None:
            async with peer_of(node.node.address, map_slab=True, client="w") as peer:
                reserved = await peer.reserve(HASHES[:2])
                ticket = (await peer.post(reserved.reservation, 2)).ticket
            async with peer_of(node.node.address) as peer:
                await settle(peer, tickets=0)
                assert (await peer.stats())["limbo_blocks"] == 2
                with pytest.raises(TransferRefused):
                    await peer.write(ticket, [bytes(SIZE)] * 2)
            async with peer_of(node.node.address, client="w", writes_ended=True):
                pass

        asyncio.run(run())
        wait_for_nothing(node)

    def test_a_mapped_writer_with_a_ticket_commits_what_came(self, node: EmbeddedNode) -> None:
        async def run() -> None:
            async with peer_of(node.node.address, map_slab=True) as peer:
                reserved = await peer.reserve(HASHES[:2])
                posted = await peer.post(reserved.reservation, 2)
                commit = wire.Commit(reserved.reservation, sums_of(*HASHES[:2]))
                await refused("bad_reservation", peer, commit)
                await peer.write(posted.ticket, [content(HASHES[0])] * 2)
                await refused("bad_block", peer, commit)
                posted = await peer.post(reserved.reservation, 1, start=1)
                await peer.write(posted.ticket, [content(HASHES[1])])
                assert await peer.ask(commit) == wire.Committed(2)

        asyncio.run(run())
        wait_for_nothing(node)


def test_a_node_that_ends_waits_for_its_tickets(tmp_path: Path, new_event_loop: NewEventLoop) -> None:
    config = NodeConfig(
        socket=str(tmp_path / "node.sock"), http="none", capacity="8MiB", tcp="127.0.0.1:0", populate=False
    )
    node = EmbeddedNode(config, new_event_loop())

    async def run() -> None:
        async with peer_of(node.node.tcp_address) as peer:
            await save(peer, HASHES[:4])
            leased = await peer.lease(HASHES[:4])
            ticket = (await peer.export(leased.lease, 4)).ticket
            reserved = await peer.reserve(HASHES[4:6], HASHES[3])
            await peer.post(reserved.reservation, 2)
            reading = asyncio.create_task(peer.read(ticket, [SIZE] * 4))
            await asyncio.to_thread(node.close)
            with suppress(TransferRefused, PeerLost):  # Or it was faster.
                assert await reading == b"".join(map(content, HASHES[:4]))

    asyncio.run(run())
    assert len(node.node.core.tickets) == 0
    assert len(node.node.core.uses) == 0
