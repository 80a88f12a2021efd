"""Connections to a peer, one question at a time: how many, who waits, and when a peer is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import cast

import pytest

from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_MS
from kvcache.errors import BadInput, Unavailable
from kvcache.peers import lines
from kvcache.peers.lines import Lines
from kvcache.testing.clock import FakeClock


class FakeChannel:
    def __init__(self) -> None:
        self.ended_by = ""

    def close(self) -> None:
        self.ended_by = self.ended_by or "closed"


class World:
    """A peer that is there, or not."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.made: list[FakeChannel] = []
        self.tries = 0
        self.is_up = True
        self.lines = Lines(self._connect, self.clock)

    async def _connect(self) -> AsyncChannel:
        self.tries += 1
        if not self.is_up:
            raise Unavailable("unavailable", "nobody is there")
        self.made.append(FakeChannel())
        return cast(AsyncChannel, self.made[-1])


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def work() -> None:
        await test(World())

    asyncio.run(work())


def test_one_question_after_another_goes_over_one_connection() -> None:
    async def work(world: World) -> None:
        for _ in range(3):
            async with world.lines.turn() as channel:
                assert cast(FakeChannel, channel) is world.made[0]
        assert world.tries == 1

    run(work)


def test_after_many_at_once_few_are_kept() -> None:
    async def work(world: World) -> None:
        many = Lines(world._connect, world.clock, 3 * lines.IDLE_MAX)
        gate = asyncio.Event()

        async def ask() -> None:
            async with many.turn():
                await gate.wait()

        asking = [asyncio.ensure_future(ask()) for _ in range(3 * lines.IDLE_MAX)]
        for _ in range(10):
            await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*asking)
        assert len(world.made) == 3 * lines.IDLE_MAX
        assert sum(not made.ended_by for made in world.made) == lines.IDLE_MAX
        async with many.turn() as channel:
            assert not channel.ended_by
        assert world.tries == 3 * lines.IDLE_MAX

    run(work)


def test_one_that_nobody_needs_for_long_is_closed() -> None:
    async def work(world: World) -> None:
        idle_ms = lines.IDLE_NS // NS_PER_MS
        async with world.lines.turn(world.clock.now_ns() + 10_000 * NS_PER_MS):
            async with world.lines.turn():
                pass
            world.clock.advance_ms(idle_ms - 1)
            world.lines.tick()
            assert [channel.ended_by for channel in world.made] == ["", ""]
            world.clock.advance_ms(1)
            world.lines.tick()
            assert [channel.ended_by for channel in world.made] == ["", "closed"], "the other is in use"
        async with world.lines.turn(world.clock.now_ns() + 5_000 * NS_PER_MS) as channel:
            assert cast(FakeChannel, channel) is world.made[0]
        world.clock.advance_ms(idle_ms)
        world.lines.tick()
        assert world.made[0].ended_by == "", "what was given on it is needed a while longer"
        world.clock.advance_ms(5_000)
        world.lines.tick()
        assert world.made[0].ended_by == "closed"
        async with world.lines.turn():
            assert len(world.made) == 3

    run(work)


def test_questions_at_the_same_time_have_connections_of_their_own_up_to_the_limit() -> None:
    async def work(world: World) -> None:
        gate, inside = asyncio.Event(), 0

        async def ask() -> None:
            nonlocal inside
            async with world.lines.turn():
                inside += 1
                await gate.wait()

        asking = [asyncio.ensure_future(ask()) for _ in range(lines.LINES_MAX + 3)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert inside == len(world.made) == lines.LINES_MAX
        gate.set()
        await asyncio.gather(*asking)
        assert len(world.made) == lines.LINES_MAX

    run(work)


def test_a_refusal_keeps_the_connection_and_anything_else_closes_it() -> None:
    async def work(world: World) -> None:
        with pytest.raises(BadInput):
            async with world.lines.turn():
                raise BadInput("bad_lease", "no")
        assert world.made[0].ended_by == ""
        for error in (Unavailable("unavailable", "gone"), ValueError(), asyncio.CancelledError()):
            with pytest.raises(type(error)):
                async with world.lines.turn():
                    raise error
            assert world.made[-1].ended_by == "closed"
        assert len(world.made) == 3

    run(work)


def test_a_connection_that_ended_meanwhile_is_not_used_again() -> None:
    async def work(world: World) -> None:
        async with world.lines.turn():
            pass
        world.made[0].ended_by = "disconnected"
        async with world.lines.turn() as channel:
            assert cast(FakeChannel, channel) is world.made[1]

    run(work)


def test_a_peer_that_is_not_there_is_tried_again_after_longer_and_longer() -> None:
    async def work(world: World) -> None:
        world.is_up = False

        async def fails() -> None:
            with pytest.raises(Unavailable):
                async with world.lines.turn():
                    raise AssertionError("there is nobody")

        delay_ns = lines.BACKOFF_NS_MIN
        for tries in range(1, 9):
            await fails()
            await fails()
            assert world.tries == tries, "nobody waits for what was tried a moment ago"
            world.clock.advance_ms(delay_ns // NS_PER_MS)
            delay_ns = min(2 * delay_ns, lines.BACKOFF_NS_MAX)
        world.is_up = True
        async with world.lines.turn():
            pass
        world.made[0].close()
        world.is_up = False
        await fails()
        world.clock.advance_ms(lines.BACKOFF_NS_MIN // NS_PER_MS)
        await fails()
        assert world.tries == 11, "the first pause is short again"

    run(work)


def test_close_ends_those_in_use_as_well() -> None:
    async def work(world: World) -> None:
        async with world.lines.turn():
            async with world.lines.turn():
                pass
            world.lines.close()
            assert [channel.ended_by for channel in world.made] == ["closed", "closed"]
        world.lines.close()

    run(work)
