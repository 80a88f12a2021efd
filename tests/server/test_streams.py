"""Blocks that are read while they are written: what a follower is given, and when."""

from __future__ import annotations

import asyncio

import pytest

from kvcache import wire
from kvcache.server import streams
from kvcache.sums import sum_chunks
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.follower import PLANE, follow, planes, play, read, waiting
from tests.server.peer import Peer, different, peer_of, refused
from tests.server.talk import HASHES, SPEC
from tests.server.writer import Writer


@pytest.fixture
def node(serve: Serve) -> EmbeddedNode:
    return serve(tcp="127.0.0.1:0")


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
            following = asyncio.create_task(follow(follower, HASHES[:2], wait_ms=20_000))
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
            following = asyncio.create_task(follow(follower, HASHES[:2], 1, 20_000))
            await waiting(node)
            await writer.advance()
            assert (await following).planes == 1
            following = asyncio.create_task(follow(follower, HASHES[:2], 2, 20_000))
            await waiting(node)
            await writer.commit()
            assert (await following).planes == 2
            following = asyncio.create_task(follow(follower, HASHES[4:5], wait_ms=20_000))
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
