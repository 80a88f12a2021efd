"""Following a node: when it ends, and what the log says of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from kvcache.errors import Unavailable
from kvcache.following import Channel, Following
from kvcache.locality import LocalityIndex
from kvcache.testing.clock import FakeClock
from kvcache.wire import EventBatch, Reply, Request, StatsReply, Welcome


class FakeChannel:
    """A connection on which nothing is told, until it is closed."""

    def __init__(self) -> None:
        self.welcome = Welcome(1, "a", 1, "t", [], b"", 0)
        self.ended = asyncio.Event()

    async def call(self, request: Request, deadline_ns: int) -> Reply:
        return StatsReply({}, [])

    async def events(self) -> AsyncIterator[EventBatch]:
        await self.ended.wait()
        for batch in ():
            yield batch

    def close(self) -> None:
        self.ended.set()


class World:
    """A node that is there, or not; a pause lasts until the test ends it."""

    def __init__(self) -> None:
        self.made: list[FakeChannel] = []
        self.is_up = True
        self.is_wanted = True
        self.pauses: list[asyncio.Future[None]] = []
        index = LocalityIndex(1 << 20)
        self.following = Following("a", self._connect, index, self, FakeClock(), self._pause)

    async def _connect(self) -> Channel:
        if not self.is_up:
            raise Unavailable("unavailable", "nobody is there")
        self.made.append(FakeChannel())
        return self.made[-1]

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(asyncio.get_running_loop().create_future())
        await self.pauses[-1]

    async def pause_ends(self) -> None:
        await turns()
        self.pauses.pop().set_result(None)
        await turns()

    def met(self, welcome: Welcome) -> None:
        if not self.is_wanted:
            self.following.stop()
            raise Unavailable("unavailable", "not this one")

    async def probe(self, calls: Channel) -> None:
        """It answers."""

    def parted(self, reason: str) -> None:
        pass


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def play(test: Callable[[World, asyncio.Task[None]], Awaitable[None]]) -> None:
    async def work() -> None:
        world = World()
        running = asyncio.ensure_future(world.following.run())
        try:
            await test(world, running)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(work())


def test_one_that_is_never_to_be_followed_is_left_and_nothing_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work(world: World, running: asyncio.Task[None]) -> None:
        world.is_wanted = False
        await turns()
        assert running.done() and running.exception() is None
        assert len(world.made) == 2 and all(channel.ended.is_set() for channel in world.made)
        assert world.following.calls is None

    with caplog.at_level(logging.INFO):
        play(work)
    assert caplog.messages == []


def test_the_log_says_why_a_node_went_away_and_once_that_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work(world: World, running: asyncio.Task[None]) -> None:
        await world.pause_ends()
        assert caplog.messages == [], "it was there all the time"
        for _ in range(2):
            world.is_up = False
            world.made[-2].close()
            for _ in range(4):
                await world.pause_ends()
            world.is_up = True
            await world.pause_ends()
            ended, away = caplog.messages
            assert "ended the stream" in ended and "nobody is there" in away
            await world.pause_ends()
            await world.pause_ends()
            assert caplog.messages[2:] == ["following a again"]
            caplog.clear()

    with caplog.at_level(logging.INFO):
        play(work)
