"""Watching a real node: what a tenant sees, what comes after a connection broke, what after the node died."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.block import StorageKey, hints
from kvcache.channel import AsyncChannel
from kvcache.clock import SystemClock
from kvcache.event_ring import Ring
from kvcache.events import TIER_HOST
from kvcache.following import Following
from kvcache.ledger import Change
from kvcache.locality import LocalityIndex
from kvcache.server import session
from kvcache.testing.processes import NodeProcess
from kvcache.wire import EventBatch, Welcome
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.peer import until
from tests.server.talk import HASHES, connected, deadline, opened, save

NODE, ROUTER, APP, OTHER = (f"a-token-of-somebody-{number}" for number in range(4))
CREDENTIALS = f"""
master_key = "{"0f" * 32}"
credential = [
  {{ token = "{NODE}", tenant = "nodes", roles = ["reader", "writer", "peer"] }},
  {{ token = "{ROUTER}", tenant = "a", roles = ["router"] }},
  {{ token = "{APP}", tenant = "a", roles = ["reader", "writer"] }},
  {{ token = "{OTHER}", tenant = "b", roles = ["reader", "writer"] }},
]
"""
PATIENCE_S = 20


@pytest.fixture
def node(serve: Serve, tmp_path: Path) -> EmbeddedNode:
    path = tmp_path / "credentials.toml"
    path.touch(0o600)
    path.write_text(CREDENTIALS)
    return serve(credentials=str(path), tcp="127.0.0.1:0")


class Watch:
    """One connection that watches; ``all`` is everything it was told."""

    def __init__(self, channel: AsyncChannel, incarnation: int, seq: int) -> None:
        self.channel = channel
        self.all: list[EventBatch] = []
        self._events = channel.events(incarnation, seq)

    async def first(self) -> list[EventBatch]:
        """What it missed: a snapshot, or batches and a beat."""
        return await self.up_to(lambda batch: batch.beat or (batch.snapshot and not batch.left))

    async def up_to(self, is_last: Callable[[EventBatch], bool]) -> list[EventBatch]:
        found: list[EventBatch] = []
        async with asyncio.timeout(PATIENCE_S):
            while not found or not is_last(found[-1]):
                found.append(await anext(self._events))
        self.all += found
        return found


@asynccontextmanager
async def watching(
    address: str, token: str, since: tuple[int, int] = (0, 0), node: str = ""
) -> AsyncIterator[Watch]:
    hello = wire.Hello(wire.PROTOCOL_VERSION, token=token, node=node)
    channel = await AsyncChannel.connect(address, hello, deadline())
    try:
        yield Watch(channel, *since)
    finally:
        channel.close()


def play(work: Awaitable[None]) -> None:
    async def run() -> None:
        await work

    asyncio.run(run())


def spaces_of(batches: list[EventBatch]) -> set[bytes]:
    return {event.namespace for batch in batches for event in batch.events}


def test_a_tenant_sees_its_own_in_snapshots_batches_and_what_it_missed(node: EmbeddedNode) -> None:
    async def work() -> None:
        address = node.node.tcp_address
        with connected(address, APP) as app, connected(address, OTHER) as other:
            mine, theirs = opened(app), opened(other)
            save(app, mine, HASHES[:4])
            save(other, theirs, HASHES[:4])
            async with watching(address, ROUTER) as router, watching(address, NODE, node="x") as peer:
                seen, everything = await router.first(), await peer.first()
                assert spaces_of(seen) == {mine} and spaces_of(everything) == {mine, theirs}
                assert {each["tenant"] for page in seen for each in page.namespaces} == {"a"}
                assert not any(page.digests for page in seen) and everything[-1].digests
                save(app, mine, HASHES[4:5], HASHES[3])
                save(other, theirs, HASHES[4:5], HASHES[3])
                node.call(node.node.core.tell_all)
                last = node.node.core.telling._publisher.seq
                batches = await router.up_to(lambda batch: batch.seq == last)
                assert spaces_of(batches) == {mine}
                numbers = [batch.seq for batch in [seen[-1], *batches] if not batch.beat]
                assert all(after == before + 1 for before, after in pairwise(numbers)), "none is missing"
            start = (node.node.incarnation, seen[-1].seq)
            for token, name, spaces in ((ROUTER, "", {mine}), (NODE, "x", {mine, theirs})):
                async with watching(address, token, start, name) as again:
                    *missed, beat = await again.first()
                assert [batch.seq for batch in missed] == numbers[1:] and spaces_of(missed) == spaces
                assert beat.beat and beat.load and bool(beat.digests) == bool(name)

    play(work())


def test_a_broken_connection_costs_exactly_what_was_missed(node: EmbeddedNode) -> None:
    async def work() -> None:
        address = node.node.tcp_address
        with connected(address, APP) as app:
            space = opened(app)
            save(app, space, HASHES[:1])
            async with watching(address, ROUTER) as watch:
                snapshot = await watch.first()
            for at in range(1, 9):
                save(app, space, HASHES[at : at + 1], HASHES[at - 1])
            since = (node.node.incarnation, snapshot[-1].seq)
            async with watching(address, ROUTER, since) as watch:
                *missed, beat = await watch.first()
            told = [event.hashes for batch in missed for event in batch.events]
            assert told == [hints([block]) for block in HASHES[1:9]]
            async with watching(address, ROUTER, (node.node.incarnation, beat.seq)) as watch:
                assert [batch.beat for batch in await watch.first()] == [True]
            node.call(lambda: setattr(node.node.core.telling, "_ring", Ring(batches_max=1)))
            async with watching(address, ROUTER, since) as watch:
                assert all(page.snapshot for page in await watch.first()), "that is no longer kept"

    play(work())


def test_one_that_lags_is_let_go_and_told_later_what_it_missed(
    node: EmbeddedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "WATCH_BYTES_MAX", 256 << 10)
    telling = node.node.core.telling
    space = b"s" * 16
    path = [StorageKey(space + number.to_bytes(16, "little")) for number in range(1, 1 << 17)]

    def publish(at: int) -> None:
        telling.publish([Change("stored", tuple(path[at : at + 8_192]), None, "committed")], TIER_HOST)

    async def work() -> None:
        hello = wire.Hello(wire.PROTOCOL_VERSION, token=NODE, node="x")
        channel = await AsyncChannel.connect(node.node.address, hello, deadline())
        watch = Watch(channel, 0, 0)
        await watch.first()
        assert channel._transport is not None
        channel._transport.pause_reading()
        for at in range(0, len(path), 8_192):
            node.call(lambda at=at: publish(at))  # type: ignore[misc]  # Bound now.
        await until(lambda: node.node.core.counters["watchers_dropped"] == 1)
        channel.close()
        since = (node.node.incarnation, watch.all[-1].seq)
        async with watching(node.node.address, NODE, since, "x") as again:
            *missed, beat = await again.first()
        assert beat.seq == telling._publisher.seq
        assert b"".join(event.hashes for batch in missed for event in batch.events) == hints(
            key[16:] for key in path
        )

    play(work())


class Met:
    """Notes how a following goes."""

    def __init__(self) -> None:
        self.incarnations: list[int] = []
        self.parts: list[str] = []

    def met(self, welcome: Welcome) -> None:
        self.incarnations.append(welcome.incarnation)

    def parted(self, reason: str) -> None:
        self.parts.append(reason)


@pytest.mark.slow
def test_after_a_node_was_killed_its_successors_first_word_is_enough(tmp_path: Path) -> None:
    settings = {"socket": str(tmp_path / "node.sock"), "http": "none", "capacity": "8MiB", "name": "n"}
    index, met, clock = LocalityIndex(1 << 22), Met(), SystemClock()

    async def connect() -> AsyncChannel:
        return await AsyncChannel.connect(process.socket, wire.Hello(wire.PROTOCOL_VERSION), deadline())

    def blocks() -> int:
        return max((found.blocks for found in index.locate(hints(HASHES))), default=0)

    async def work() -> None:
        following = asyncio.create_task(Following("n", connect, index, met, clock).run())
        await asyncio.to_thread(save_some, 8)
        await until(lambda: blocks() == 8)
        await asyncio.to_thread(process.kill)
        await until(lambda: bool(met.parts))
        assert blocks() == 8 and not index.sources()[0].synced, "what it last knew, marked"
        await asyncio.to_thread(process.start)
        await until(lambda: len(met.incarnations) == 2)
        await until(lambda: index.sources()[0].synced)
        assert blocks() == 0 and index.entries == 0
        await asyncio.to_thread(save_some, 3)
        await until(lambda: blocks() == 3)
        assert met.incarnations[1] > met.incarnations[0] and met.parts[0] == "connection"
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        index.check()

    def save_some(count: int) -> None:
        with connected(process.socket) as channel:
            save(channel, opened(channel), HASHES[:count])

    with NodeProcess(settings, tmp_path / "node.log") as process:
        play(work())
