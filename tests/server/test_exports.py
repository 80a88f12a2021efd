"""Blocks that leave a node over a transport: what a ticket gives, what it holds, and how it ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.block import StorageKey
from kvcache.channel import AsyncChannel
from kvcache.errors import NotAllowed
from kvcache.server import exports, tickets
from kvcache.server import node as shell
from kvcache.sums import sum_chunks
from kvcache.transport.base import TransferRefused
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.peer import (
    WIDE,
    Peer,
    as_peer,
    credentials,
    different,
    peer_of,
    refused,
    save,
    settle,
    wait_for_nothing,
)
from tests.server.talk import HASHES, SIZE, SPEC, content, deadline, sums_of


@pytest.fixture
def node(serve: Serve) -> EmbeddedNode:
    return serve(tcp="127.0.0.1:0")


class TestExport:
    def test_what_is_read_is_what_is_held(self, node: EmbeddedNode) -> None:
        async def work(peer: Peer) -> None:
            await save(peer, HASHES[:3])
            leased = await peer.lease(HASHES[:3])
            exported = await peer.export(leased.lease, 2, start=1)
            assert exported.sums == sums_of(*HASHES[1:3])
            assert exported.address == peer.channel.welcome.data[0]
            assert 0 < exported.remaining_ms <= leased.remaining_ms
            assert await peer.read(exported.ticket, [SIZE] * 2) == b"".join(map(content, HASHES[1:3]))
            assert (await peer.release(leased.lease)).intact
            stats = await peer.stats()
            assert (stats["leases"], stats["tickets"]) == (0, 0)
            assert (stats["exported_blocks"], stats["exported_bytes"]) == (2, 2 * SIZE)
            assert (stats["posted_blocks"], stats["posted_bytes"]) == (3, 3 * SIZE)

        as_peer(node, work)

    @pytest.mark.parametrize(
        "part",
        [
            {"plane": 1, "planes": 2},
            {"plane": 2},
            {"offset": WIDE.chunk_bytes},
            {"length": WIDE.chunk_bytes},
            {"plane": 1, "planes": 1, "offset": WIDE.chunk_bytes, "length": WIDE.chunk_bytes},
            {"plane": 0, "planes": WIDE.plane_count, "length": WIDE.plane_bytes},
        ],
        ids=str,
    )
    def test_a_part_of_every_block(self, node: EmbeddedNode, part: dict[str, int]) -> None:
        data = [different(block, WIDE) for block in HASHES[:2]]
        first = part.get("plane", 0)
        planes = range(first, first + (part.get("planes", 0) or WIDE.plane_count - first))
        start = part.get("offset", 0)
        length = part.get("length", 0) or WIDE.plane_bytes - start

        async def work(peer: Peer) -> None:
            await peer.open(WIDE)
            reserved = await peer.reserve(HASHES[:2])
            posted = await peer.post(reserved.reservation, 2)
            await peer.write(posted.ticket, data)
            await peer.commit(reserved.reservation, data)
            leased = await peer.lease(HASHES[:2])
            exported = await peer.export(leased.lease, 2, **part)
            begins = [at * WIDE.plane_bytes + start for at in planes]
            expected = [block[at : at + length] for block in data for at in begins]
            is_whole = len(planes) * length == WIDE.block_bytes
            sizes = [WIDE.block_bytes] * 2 if is_whole else [length] * len(expected)
            assert await peer.read(exported.ticket, sizes) == b"".join(expected)
            assert exported.sums == sum_chunks(data, WIDE.chunk_bytes)
            assert (await peer.stats())["exported_bytes"] == sum(sizes)

        as_peer(node, work)

    def test_what_is_no_part_of_a_block(self, node: EmbeddedNode) -> None:
        chunk, whole = WIDE.chunk_bytes, WIDE.plane_bytes
        beside = ((1, 0), (0, 1), (0, chunk - 1), (chunk, whole), (whole, 0), (whole, chunk), (1 << 60, 0))

        async def work(peer: Peer) -> None:
            await peer.open(WIDE)
            reserved = await peer.reserve(HASHES[:1])
            posted = await peer.post(reserved.reservation, 1)
            await peer.write(posted.ticket, [different(HASHES[0], WIDE)])
            await peer.commit(reserved.reservation, [different(HASHES[0], WIDE)])
            lease = (await peer.lease(HASHES[:1])).lease
            for plane, planes in ((3, 0), (3, 1), (0, 4), (2, 2), (1 << 60, 1 << 60)):
                text = await refused("bad_block", peer, wire.Export(lease, 0, 1, "tcp", plane, planes))
                assert f"{WIDE.plane_count} planes" in text
            for offset, length in beside:
                request = wire.Export(lease, 0, 1, "tcp", 0, 0, offset, length)
                assert f"chunks of {chunk}" in await refused("bad_block", peer, request)
            for start, count in ((0, 0), (0, 2), (1, 1), (1 << 60, 1)):
                await refused("bad_lease", peer, wire.Export(lease, start, count, "tcp"))
            stats = await peer.stats()
            assert (stats["tickets"], stats["leases"]) == (0, 1)

        as_peer(node, work)

    def test_a_transport_that_is_not_there(self, node: EmbeddedNode) -> None:
        async def work(peer: Peer) -> None:
            await save(peer, HASHES[:1])
            leased = await peer.lease(HASHES[:1])
            assert "--data" in await refused("bad_tier", peer, wire.Export(leased.lease, 0, 1, "ucx"))
            reserved = await peer.reserve(HASHES[1:2], HASHES[0])
            await refused("bad_tier", peer, wire.Post(reserved.reservation, 0, 1, ""))

        as_peer(node, work)

    def test_anothers_lease(self, serve: Serve, tmp_path: Path) -> None:
        every = ["reader", "writer", "operator", "peer"]
        file = credentials(tmp_path, a=("one", every), b=("two", every))
        node = serve(tcp="127.0.0.1:0", credentials=file)

        async def run() -> None:
            address = node.node.tcp_address
            async with (
                peer_of(address, token="a" * 16) as mine,
                peer_of(address, token="a" * 16) as sister,
                peer_of(address, token="b" * 16) as stranger,
            ):
                await save(mine, HASHES[:1])
                leased = await mine.lease(HASHES[:1])
                reserved = await mine.reserve(HASHES[1:2], HASHES[0])
                said = set()
                for other in (sister, stranger):
                    said.add(await refused("bad_lease", other, wire.Export(leased.lease, 0, 1, "tcp")))
                    post = wire.Post(reserved.reservation, 0, 1, "tcp")
                    await refused("bad_reservation", other, post)
                said.add(
                    (await refused("bad_lease", mine, wire.Export(77, 0, 1, "tcp"))).replace(
                        "77", str(leased.lease)
                    )
                )
                assert len(said) == 1, "what is missing and what is another's look the same"
                exported = await mine.export(leased.lease, 1)
                await refused("bad_lease", stranger, wire.Release(leased.lease))
                assert await mine.read(exported.ticket, [SIZE]) == content(HASHES[0])

        asyncio.run(run())
        wait_for_nothing(node)

    def test_a_lease_that_is_over(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shell, "EXPIRE_PERIOD_S", 0.01)
        node = serve(tcp="127.0.0.1:0", lease_ms_max=1)

        async def work(peer: Peer) -> None:
            reserved = await peer.reserve(HASHES[:1])
            await peer.channel.call(
                wire.Write(reserved.reservation, 0, 1), deadline(), [memoryview(content(HASHES[0]))]
            )
            await peer.commit(reserved.reservation, [content(HASHES[0])])
            leased = await peer.lease(HASHES[:1])
            await settle(peer, leases=0)
            await refused("bad_lease", peer, wire.Export(leased.lease, 0, 1, "tcp"))
            assert not (await peer.release(leased.lease)).intact

        as_peer(node, work)

    def test_a_block_that_was_written_anew(self, node: EmbeddedNode) -> None:
        """Its lease is for what lay there before, found damaged by somebody else meanwhile."""

        async def work(peer: Peer) -> None:
            await save(peer, HASHES[:2])
            leased = await peer.lease(HASHES[:2])
            node.call(lambda: damage(node, peer.namespace + HASHES[1]))
            found = await peer.lease(HASHES[:2])
            await peer.ask(wire.Release(found.lease, failed=[1]))
            await peer.export(leased.lease, 1)
            await refused("bad_lease", peer, wire.Export(leased.lease, 0, 2, "tcp"))
            await save(peer, HASHES[:2])
            text = await refused("bad_lease", peer, wire.Export(leased.lease, 0, 2, "tcp"))
            assert "take a new lease" in text
            again = await peer.lease(HASHES[:2])
            exported = await peer.export(again.lease, 2)
            assert await peer.read(exported.ticket, [SIZE] * 2) == b"".join(map(content, HASHES[:2]))

        as_peer(node, work)

    def test_released_it_is_good_no_more(self, node: EmbeddedNode) -> None:
        async def work(peer: Peer) -> None:
            await save(peer, HASHES[:1])
            leased = await peer.lease(HASHES[:1])
            exported = await peer.export(leased.lease, 1)
            await peer.release(leased.lease)
            with pytest.raises(TransferRefused):
                await peer.read(exported.ticket, [SIZE])
            await refused("bad_lease", peer, wire.Release(leased.lease))

        as_peer(node, work)

    def test_failed_blocks_are_looked_at_before_they_are_let_go(self, node: EmbeddedNode) -> None:
        async def work(peer: Peer) -> None:
            await save(peer, HASHES[:2])
            leased = await peer.lease(HASHES[:2])
            await peer.export(leased.lease, 2)
            reply = await peer.ask(wire.Release(leased.lease, failed=[1]))
            assert reply == wire.Released(True)
            stats = await peer.stats()
            assert (stats["reader_disagreed_blocks"], stats["tickets"], stats["leases"]) == (1, 0, 0)

        as_peer(node, work)

    def test_a_connection_that_ends_ends_its_tickets(self, node: EmbeddedNode) -> None:
        left: list[bytes] = []

        async def leave(peer: Peer) -> None:
            await save(peer, HASHES[:2])
            left.append((await peer.export((await peer.lease(HASHES[:2])).lease, 2)).ticket)
            reserved = await peer.reserve(HASHES[2:4], HASHES[1])
            left.append((await peer.post(reserved.reservation, 2)).ticket)

        async def come(peer: Peer) -> None:
            await settle(peer, tickets=0)
            with pytest.raises(TransferRefused):
                await peer.read(left[0], [SIZE] * 2)
            with pytest.raises(TransferRefused):
                await peer.write(left[1], [bytes(SIZE)] * 2)

        as_peer(node, leave, come)

    def test_too_much_at_once(self, node: EmbeddedNode, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exports, "PIECES_MAX", 9)
        monkeypatch.setattr(exports, "SUMS_BYTES_MAX", 3 * SPEC.chunk_count * 8)

        async def work(peer: Peer) -> None:
            reserved = await peer.reserve(HASHES[:16])
            text = await refused("too_large", peer, wire.Post(reserved.reservation, 0, 10, "tcp"))
            assert "9 blocks at a time" in text
            await peer.post(reserved.reservation, 9)
            text = await refused("too_large", peer, wire.Post(reserved.reservation, 0, 5, "tcp", 0, 2))
            assert "4 blocks at a time" in text
            await peer.ask(wire.Abort(reserved.reservation))
            await save(peer, HASHES[:4])
            leased = await peer.lease(HASHES[:4])
            text = await refused("too_large", peer, wire.Export(leased.lease, 0, 4, "tcp"))
            assert "3 blocks at a time" in text
            await peer.export(leased.lease, 3)

        as_peer(node, work)

    def test_tickets_have_a_limit(self, node: EmbeddedNode, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tickets, "CONNECTION_TICKETS_MAX", 3)

        async def work(peer: Peer) -> None:
            await save(peer, HASHES[:1])
            leased = await peer.lease(HASHES[:1])
            for _ in range(3):
                await peer.export(leased.lease, 1)
            assert "release" in await refused("too_large", peer, wire.Export(leased.lease, 0, 1, "tcp"))
            assert (await peer.stats())["leases"] == 4
            await peer.release(leased.lease)
            leased = await peer.lease(HASHES[:1])
            await peer.export(leased.lease, 1)

        as_peer(node, work)

    def test_roles(self, serve: Serve, tmp_path: Path) -> None:
        file = credentials(
            tmp_path,
            a=("one", ["reader", "peer"]),
            b=("one", ["writer", "peer"]),
            c=("one", ["reader", "writer"]),
        )
        node = serve(tcp="127.0.0.1:0", credentials=file)

        async def run() -> None:
            address = node.node.tcp_address
            async with (
                peer_of(address, token="a" * 16) as reader,
                peer_of(address, token="b" * 16) as writer,
            ):
                await refused("not_allowed", writer, wire.Export(1, 0, 1, "tcp"))
                await refused("not_allowed", reader, wire.Post(1, 0, 1, "tcp"))
            greeting = wire.Hello(wire.PROTOCOL_VERSION, token="c" * 16)
            async with await AsyncChannel.connect(address, greeting, deadline()) as channel:
                assert channel.welcome.data == []
                for request in (wire.Export(1, 0, 1, "tcp"), wire.Post(1, 0, 1, "tcp")):
                    with pytest.raises(NotAllowed):
                        await channel.call(request, deadline())

        asyncio.run(run())


def damage(node: EmbeddedNode, key: bytes) -> None:
    slot = node.node.core.ledger.slot_of(StorageKey(key))
    assert slot is not None
    node.node.core.host.view(slot, SIZE)[7] ^= 1
