"""Following a node: where it takes up the stream, when it ends, and what the log says of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from kvcache.block import StorageKey
from kvcache.errors import Unavailable
from kvcache.events import Publisher
from kvcache.following import PAUSE_S_MIN, POLL_S, SILENT_POLLS_MAX, Channel, Following
from kvcache.ledger import Change
from kvcache.locality import LocalityIndex
from kvcache.testing.clock import FakeClock
from kvcache.wire import EventBatch, Reply, Request, StatsReply, Welcome

SPACE = b"s" * 16


class FakeChannel:
    """A connection on which what the test says is told, until it is closed."""

    def __init__(self, incarnation: int = 1) -> None:
        self.welcome = Welcome(1, "a", incarnation, "t", [], b"", 0)
        self.asked: tuple[int, int] | None = None
        self.ended = asyncio.Event()
        self._told: asyncio.Queue[EventBatch | None] = asyncio.Queue()

    def tell(self, *batches: EventBatch) -> None:
        for batch in batches:
            self._told.put_nowait(batch)

    async def call(self, request: Request, deadline_ns: int) -> Reply:
        return StatsReply({}, [])

    async def events(self, incarnation: int = 0, seq: int = 0) -> AsyncIterator[EventBatch]:
        self.asked = (incarnation, seq)
        while (batch := await self._told.get()) is not None:
            yield batch

    def close(self) -> None:
        self.ended.set()
        self._told.put_nowait(None)


class World:
    """A node that is there, or not; a pause lasts until the test ends it."""

    def __init__(self, *, asks: bool = False) -> None:
        self.made: list[FakeChannel] = []
        self.is_up = True
        self.is_wanted = True
        self.answers = True
        self.probes = 0
        self.parts: list[str] = []
        self.pauses: list[tuple[float, asyncio.Future[None]]] = []
        self.publisher = Publisher("a", 1)
        self.index = LocalityIndex(1 << 22)
        probe = self._probe if asks else None
        self.following = Following("a", self._connect, self.index, self, FakeClock(), self._pause, probe)

    async def _connect(self) -> Channel:
        if not self.is_up:
            raise Unavailable("unavailable", "nobody is there")
        self.made.append(FakeChannel(self.publisher.incarnation))
        return self.made[-1]

    async def _pause(self, seconds: float) -> None:
        self.pauses.append((seconds, asyncio.get_running_loop().create_future()))
        await self.pauses[-1][1]

    async def _probe(self, calls: Channel) -> None:
        assert calls is self.made[-1], "not the connection of the events"
        self.probes += 1
        if not self.answers:
            raise Unavailable("unavailable", "it does not answer")

    async def pause_ends(self) -> float:
        """Returns how long it was to be."""
        await turns()
        seconds, pause = self.pauses.pop()
        if not pause.cancelled():
            pause.set_result(None)
        await turns()
        return seconds

    def stored(self, *numbers: int) -> list[EventBatch]:
        keys = tuple(StorageKey(SPACE + bytes([number]) * 16) for number in numbers)
        return self.publisher.publish([Change("stored", keys, None, "committed")])

    async def synced(self) -> None:
        await turns()
        self.made[-1].tell(*self.publisher.snapshot())
        await turns()
        [state] = self.index.sources()
        assert state.synced

    async def again(self) -> FakeChannel:
        """The connection ends, and the next one is made."""
        self.made[-1].close()
        assert await self.pause_ends() < POLL_S
        return self.made[-1]

    def met(self, welcome: Welcome) -> None:
        if not self.is_wanted:
            self.following.stop()
            raise Unavailable("unavailable", "not this one")

    def parted(self, reason: str) -> None:
        self.parts.append(reason)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def play(test: Callable[[World, asyncio.Task[None]], Awaitable[None]], *, asks: bool = False) -> None:
    async def work() -> None:
        world = World(asks=asks)
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
        assert len(world.made) == 1 and world.made[0].ended.is_set()
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
            world.made[-1].close()
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


def test_a_new_node_is_asked_for_everything_and_later_for_what_came_behind() -> None:
    async def work(world: World, running: asyncio.Task[None]) -> None:
        world.stored(1, 2)
        await world.synced()
        assert world.made[-1].asked == (0, 0)
        world.made[-1].tell(*world.stored(3))
        await turns()
        channel = await world.again()
        assert world.parts == ["connection"] and not world.index.sources()[0].synced
        assert channel.asked == (1, 2)
        channel.tell(*world.stored(4), world.publisher.beat())
        await turns()
        assert world.index.sources()[0].synced and world.index.entries == 4
        assert world.following.calls is channel and len(world.made) == 2, "one connection a time"

    play(work)


def test_a_gap_is_filled_from_where_it_began() -> None:
    async def work(world: World, running: asyncio.Task[None]) -> None:
        await world.synced()
        world.stored(1)  # Lost.
        world.made[-1].tell(*world.stored(2))
        assert await world.pause_ends() == 2 * PAUSE_S_MIN
        assert world.parts == ["gap"] and world.made[-1].asked == (1, 0)

    play(work)


def test_after_a_difference_everything_is_asked_for() -> None:
    async def work(world: World, running: asyncio.Task[None]) -> None:
        await world.synced()
        world.made[-1].tell(*world.stored(1))
        world.publisher.seq -= 1
        world.stored(2)  # Not told, and its number is used again.
        world.made[-1].tell(world.publisher.beat())
        await world.pause_ends()
        assert world.parts == ["drift"] and world.made[-1].asked == (0, 0)
        await world.synced()
        assert world.index.entries == 2

    play(work)


def test_the_first_word_of_a_node_that_started_anew_is_enough() -> None:
    async def work(world: World, running: asyncio.Task[None]) -> None:
        world.stored(1, 2)
        await world.synced()
        world.publisher = Publisher("a", 2)
        world.stored(3)
        channel = await world.again()
        assert channel.asked == (1, 1), "what it has of the life before"
        await world.synced()
        assert world.index.entries == 1
        world.publisher = Publisher("a", 3)
        world.made[-1].tell(*world.stored(4))
        await turns()
        assert world.index.entries == 0 and world.parts[-1] == "restarted"

    play(work)


def test_a_silent_node_is_left_after_three_beats() -> None:
    async def work(world: World, running: asyncio.Task[None]) -> None:
        await world.synced()
        for _ in range(SILENT_POLLS_MAX):
            assert await world.pause_ends() == POLL_S
        world.made[0].tell(world.publisher.beat())
        for _ in range(1 + SILENT_POLLS_MAX):
            assert not world.made[0].ended.is_set()
            assert await world.pause_ends() == POLL_S
        assert world.made[0].ended.is_set() and world.parts == ["silent"]
        assert "three beats" in world.following.trouble
        assert await world.pause_ends() == PAUSE_S_MIN and len(world.made) == 2

    play(work)


def test_who_asks_has_a_connection_for_that_and_goes_when_there_is_no_answer() -> None:
    async def work(world: World, running: asyncio.Task[None]) -> None:
        await turns()
        assert len(world.made) == 2 and world.following.calls is world.made[1]
        assert world.made[0].asked == (0, 0) and world.made[1].asked is None
        await world.pause_ends()
        assert world.probes == 2
        world.answers = False
        await world.pause_ends()
        assert all(channel.ended.is_set() for channel in world.made)
        assert world.parts == ["silent"] and world.following.trouble == "it does not answer"

    play(work, asks=True)
