"""What is read for a push stays where it is, and who writes or holds it hardly knows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvcache.block import StorageKey
from kvcache.peers import push
from kvcache.transport.base import Priority, Ticket
from tests.kvcache.peers.stream_world import World, worlds
from tests.server.peer_world import Meddler
from tests.server.talk import HASHES

FOUR = HASHES[:4]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield from worlds(tmp_path)


@pytest.fixture
def two(world: World) -> World:
    world.start(pushes=True)
    return world


class Slow(Meddler):
    """A write that begins when its gate opens, and that cannot be given up before."""

    gate: asyncio.Event
    began = 0
    given_up = 0

    @classmethod
    def at(cls, world: World) -> type[Slow]:
        class Here(cls):  # type: ignore[valid-type, misc]  # Each test counts its own.
            pass

        async def make() -> asyncio.Event:
            return asyncio.Event()

        Here.gate = world.a.embedded.run(make())
        world.a.on_the_way(Here)
        return Here

    async def write(
        self,
        ticket: Ticket,
        pieces: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        kind = type(self)
        kind.began += 1
        try:
            await kind.gate.wait()
        except asyncio.CancelledError:
            kind.given_up += 1
            await kind.gate.wait()
            raise
        await self.inner.write(ticket, pieces, deadline_ns, priority)


class TestTheWriterHere:
    """Its slots are read by the push, and it hardly knows."""

    def test_a_commit_does_not_wait(self, two: World) -> None:
        slow = Slow.at(two)
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        engine.advance()
        two.a.until(lambda: slow.began == 1, "it is being written")
        assert engine.commit() == 4
        assert two.a.stat("leases") == 1, "the blocks are held for the push"
        two.a.embedded.call(slow.gate.set)
        assert two.want(FOUR, pushed=True).result() == 4
        two.until_quiet()

    def test_an_abort_waits_until_its_slots_are_not_read(self, two: World) -> None:
        slow = Slow.at(two)
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        engine.advance()
        two.a.until(lambda: slow.began == 1, "it is being written")
        with ThreadPoolExecutor(1) as pool:
            aborting = pool.submit(engine.abort)
            two.a.until(lambda: slow.given_up == 1, "it is given up")
            assert [two.a.stat("reservations") for _ in range(50)] == [1] * 50
            assert not aborting.done()
            two.a.embedded.call(slow.gate.set)
            aborting.result()
        two.until_quiet()
        assert two.b.holds(FOUR) == 0

    def test_the_slots_of_a_writer_that_is_gone_are_kept_aside_so_long(self, two: World) -> None:
        slow = Slow.at(two)
        engine = two.engine()
        engine.reserve(FOUR, push="b")
        engine.advance()
        two.a.until(lambda: slow.began == 1, "it is being written")
        engine.vanish()
        two.a.until(lambda: slow.given_up == 1, "it is given up")
        assert [two.a.stat("limbo_blocks") for _ in range(50)] == [4] * 50
        two.a.embedded.call(slow.gate.set)
        two.until_quiet()


class TestCopy:
    def copy(self, two: World, blocks: Sequence[bytes], first: int, name: str = "b") -> int:
        pusher = two.a.node.core.bringing.pusher
        assert pusher is not None
        path: list[StorageKey] = [two.a.key(block) for block in blocks]
        return two.a.embedded.run(pusher.copy(name, path, first))

    def test_held_blocks_are_copied(self, two: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(push, "COPY_BLOCKS_MAX", 2)
        engine = two.engine()
        engine.reserve(HASHES[:5])
        engine.commit()
        assert self.copy(two, HASHES[:3], 0) == 3
        assert self.copy(two, HASHES[:5], 3) == 2
        assert self.copy(two, HASHES[:5], 0) == 5
        assert two.a.stat("pushed_blocks") == 5
        assert two.want(HASHES[:5], source="").result() == 5
        two.until_quiet()

    def test_what_cannot_be_copied(self, two: World) -> None:
        engine = two.engine()
        engine.reserve(HASHES[:3])
        engine.commit()
        assert self.copy(two, HASHES[:3], 0, "nobody") == 0
        assert self.copy(two, HASHES[:3], 1) == 0
        assert two.a.stat("push_failures:parent") == 1
        assert self.copy(two, HASHES[:5], 0) == 0
        assert two.a.stat("push_failures:gone") == 1
        two.until_quiet()
