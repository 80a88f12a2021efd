"""Following over real sockets: whatever the network and the engine do, the index comes to the truth."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import pytest

from kvcache.clock import SystemClock
from kvcache.engine_events import zmq as following
from kvcache.engine_events.feed import EngineFeed
from kvcache.engine_events.naming import public_namespaces
from kvcache.engine_events.zmq import EngineFollowing, message
from kvcache.locality import LocalityIndex
from tests.kvcache.engine_events.model_engine import MODEL, ModelEngine, Shelf
from tests.kvcache.engine_events.publisher import Publisher

DEADLINE_S = 30.0
SOURCE = "engine:w"


def run(test: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 3 * DEADLINE_S))


async def until(true: Callable[[], bool]) -> None:
    """Checked after each turn of the loop, with a deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not true():
            await asyncio.sleep(0.005)


class World:
    """An engine, its publisher, and who follows it."""

    def __init__(self, folder: Path, replay: bool = True, seed: int = 1) -> None:
        self.endpoint = f"ipc://{folder}/events"
        self.replay = f"ipc://{folder}/replay" if replay else ""
        self.engine = ModelEngine(random.Random(seed))
        self.shelf = Shelf()
        self.feed = EngineFeed(SOURCE, public_namespaces(MODEL), 1, replay=replay)
        self.following = EngineFollowing(self.endpoint, self.replay, self.feed, self.shelf, SystemClock())

    def publisher(self, buffered: int = 10_000) -> Publisher:
        return Publisher(self.endpoint, self.replay, buffered=buffered)

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.following.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def subscribed(self, publisher: Publisher) -> None:
        await asyncio.to_thread(publisher.subscribed)
        await until(lambda: self.following.connected and self.feed.wanted is None)

    def is_exact(self) -> bool:
        return self.shelf.members == self.engine.truth() and not self.shelf.partial

    def steps(self, publisher: Publisher, count: int, lose: float = 0.0) -> None:
        for _ in range(count):
            publisher.send(*self.engine.message(), lose=self.engine.random.random() < lose)


def test_an_engine_is_followed_exactly_from_any_point_on(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(tmp_path)
        with world.publisher() as publisher:
            world.steps(publisher, 40)
            async with world.followed():
                await world.subscribed(publisher)
                await until(world.is_exact)
                world.steps(publisher, 40)
                await until(world.is_exact)
        assert world.following.connections == 1
        assert world.feed.counts["garbage"] == world.following.malformed == 0

    run(test())


def test_lost_messages_are_replayed_and_lost_ends_found_in_the_next_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "BEAT_MS", 50)

    async def test() -> None:
        world = World(tmp_path, seed=2)
        with world.publisher() as publisher:
            async with world.followed():
                await world.subscribed(publisher)
                world.steps(publisher, 60, lose=0.3)
                world.engine.store()
                world.steps(publisher, 1)
                await until(world.is_exact)
                world.engine.clear()
                world.steps(publisher, 1, lose=1.0)
                assert not world.is_exact()
                await until(world.is_exact)
        assert world.feed.counts["gaps"] > 0
        assert world.shelf.heards > 0

    run(test())


def test_a_killed_and_restarted_engine_is_another_incarnation(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(tmp_path, seed=3)
        async with world.followed():
            with world.publisher() as publisher:
                await world.subscribed(publisher)
                world.steps(publisher, 30)
                await until(world.is_exact)
            await until(lambda: world.shelf.suspects > 0)
            assert not world.following.connected
            world.engine.restart()
            with world.publisher() as publisher:
                world.steps(publisher, 30)
                await world.subscribed(publisher)
                await until(world.is_exact)
        assert world.feed.incarnation == 2
        assert world.feed.counts["restarts"] == 1

    run(test())


def test_a_cut_connection_to_the_same_engine_goes_on_where_it_was(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(tmp_path, seed=4)
        with world.publisher() as publisher:
            async with world.followed():
                await world.subscribed(publisher)
                world.steps(publisher, 30)
                await until(world.is_exact)
            world.steps(publisher, 3)
            async with world.followed():
                await until(world.is_exact)
        assert world.feed.incarnation == 1
        assert world.feed.counts["emptied"] == 1
        assert world.following.connections == 2

    run(test())


def test_without_a_replay_a_new_connection_begins_empty_and_partial(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(tmp_path, replay=False, seed=5)
        with world.publisher() as publisher:
            async with world.followed():
                await world.subscribed(publisher)
                world.steps(publisher, 20)
                await until(world.is_exact)  # It was there from message 0 on.
            async with world.followed():
                await until(lambda: world.shelf.partial)
                assert world.shelf.members == set()

    run(test())


def test_a_replay_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "BEAT_MS", 20)
    monkeypatch.setattr(following, "REPLAY_IDLE_MS", 60)

    async def test() -> None:
        world = World(tmp_path, seed=6)
        with world.publisher() as publisher:
            publisher.mute.set()
            world.steps(publisher, 20)
            async with world.followed():
                await world.subscribed(publisher)
                assert world.shelf.partial
                assert "did not answer" in world.following.trouble
                world.steps(publisher, 20)
                await until(lambda: world.feed.counts["messages"] >= 20)
        assert world.shelf.members <= world.engine.truth()

    run(test())


def test_older_frames_of_a_replay_are_read(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(tmp_path, seed=7)
        with world.publisher() as publisher:
            publisher.old_frames = True
            world.steps(publisher, 20)
            async with world.followed():
                await until(world.is_exact)

    run(test())


def test_frames_of_no_known_form_are_counted_and_harm_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(tmp_path, seed=8)
        with world.publisher() as publisher:
            async with world.followed():
                await world.subscribed(publisher)
                publisher.send(0, b"", lose=False, frames=[b"alone"])
                publisher.buffer.clear()
                publisher.send(0, b"", frames=[b"", b"short", b"x"])
                publisher.buffer.clear()
                world.steps(publisher, 20)
                await until(world.is_exact)
        assert world.following.malformed == 2

    run(test())


def test_an_index_that_lost_its_place_is_told_everything(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(tmp_path, seed=9)
        with world.publisher() as publisher:
            async with world.followed():
                await world.subscribed(publisher)
                world.steps(publisher, 20)
                await until(world.is_exact)
                world.shelf.losing = True
                world.steps(publisher, 1)
                await until(world.is_exact)

    run(test())


def test_nobody_there_is_trouble_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "CONNECT_MS", 50)

    async def test() -> None:
        world = World(tmp_path)
        pauses = 0

        async def pause(seconds: float) -> None:
            nonlocal pauses
            pauses += 1
            await asyncio.sleep(0)

        world.following = EngineFollowing(
            world.endpoint, world.replay, world.feed, world.shelf, SystemClock(), pause=pause
        )
        async with world.followed():
            await until(lambda: pauses >= 2)
        assert "unavailable" in world.following.trouble
        assert world.shelf.members == set()

    run(test())


def test_the_locality_index_follows_through_suspicion_lease_and_return(tmp_path: Path) -> None:
    """The real index: it serves what it knew while the engine is away, forgets it when its lease is over,
    and is told everything again."""

    async def test() -> None:
        world = World(tmp_path, seed=10)
        index = LocalityIndex(1 << 20)
        clock = SystemClock()
        world.following = EngineFollowing(world.endpoint, world.replay, world.feed, index, clock)

        def held() -> int:
            return index.entries

        def synced() -> bool:
            as_of = index.as_of(SOURCE)
            return as_of is not None and as_of.synced and not as_of.partial

        with world.publisher() as publisher:
            async with world.followed():
                await world.subscribed(publisher)
                world.steps(publisher, 60)
                await until(lambda: held() == len(world.engine.truth()) and synced())
            assert not synced()
            assert held() == len(world.engine.truth())
            index.tick(clock.now_ns() + 3_100_000_000)
            assert held() == 0
            async with world.followed():
                await until(lambda: held() == len(world.engine.truth()) and synced())
        index.check()

    run(test())


@pytest.mark.parametrize(
    ("frames", "found"),
    [
        ([b"", (5).to_bytes(8, "big"), b"p"], (5, b"p")),
        ([b"topic", (5).to_bytes(8, "big"), b"p"], (5, b"p")),
        ([(5).to_bytes(8, "big"), b"p"], (5, b"p")),
        ([b"topic", b"p"], None),
        ([b"p"], None),
        ([], None),
        ([b"", b"", (5).to_bytes(8, "big"), b"p"], None),
        ([b"", (-1).to_bytes(8, "big", signed=True), b""], None),
        ([b"", (5).to_bytes(7, "big"), b"p"], None),
    ],
)
def test_the_frames_of_a_message(frames: list[bytes], found: tuple[int, bytes] | None) -> None:
    assert message(frames) == found
