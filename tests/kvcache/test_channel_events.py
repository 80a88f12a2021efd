"""Events on a channel: in order beside other calls, no more at a time than fits, and what ends them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvcache.channel import AsyncChannel
from kvcache.errors import NotAllowed, Unavailable
from kvcache.wire import BlockEvent, EventBatch, Failure, Stats, StatsReply, Watch
from tests.kvcache.peer import Peer, run_async, soon


def test_events_come_in_order_beside_other_calls(tmp_path: Path) -> None:
    def batch(seq: int) -> EventBatch:
        return EventBatch("node", 1, seq, False, [])

    def script(peer: Peer) -> None:
        peer.greet()
        watch, request, _ = peer.take()
        assert request == Watch(7, 12)
        peer.give(watch, batch(0))
        stats, _, _ = peer.take()
        peer.give(watch, batch(1))
        peer.give(stats, StatsReply({"a": 1.0}))
        for seq in range(2, 1_000):
            peer.give(watch, batch(seq))

    async def work(channel: AsyncChannel) -> None:
        seen: list[int] = []
        with pytest.raises(Unavailable):
            async for event in channel.events(7, 12):
                if not seen:
                    assert await channel.call(Stats(), soon()) == StatsReply({"a": 1.0})
                seen.append(event.seq)
        assert seen == list(range(1_000))

    run_async(tmp_path, script, work)


def test_who_takes_events_slowly_is_not_sent_more_than_fits(tmp_path: Path) -> None:
    """Pages of a snapshot are large: what waits here is bounded in bytes, too."""
    hashes = bytes(1 << 20)
    sent: list[int] = []

    def script(peer: Peer) -> None:
        peer.greet()
        watch, _, _ = peer.take()
        for seq in range(40):
            event = BlockEvent("stored", bytes(16), "host", b"", hashes)
            peer.give(watch, EventBatch("node", 1, seq, True, [event]))
            sent.append(seq)

    async def work(channel: AsyncChannel) -> None:
        seen = 0
        with pytest.raises(Unavailable):
            async for event in channel.events():
                assert event.seq == seen
                seen += 1
                if seen == 1:
                    while channel._transport is not None and channel._transport.is_reading():
                        await asyncio.sleep(0.001)
                    assert 8 <= len(sent) < 20, "what is in the sockets' buffers, too"
        assert seen == 40

    run_async(tmp_path, script, work)


def test_a_refused_watch_is_raised(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.give(peer.take()[0], Failure("not_allowed", "not a router"))
        peer.wait_for_end()

    async def work(channel: AsyncChannel) -> None:
        with pytest.raises(NotAllowed):
            async for _ in channel.events():
                pass

    run_async(tmp_path, script, work)
